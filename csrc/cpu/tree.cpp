// Host side of tree search: checks, the split over torch's threads, and the order in which a backup visits the nodes.
#include "tree.h"

#include <atomic>
#include <limits>

#include "../ops.h"

namespace fastcifar {

namespace {

// A node on the way down or up takes some ten nanoseconds a child and as much again.
constexpr int64_t kNodeCost = 32;
// Trees (or draws) that are worth a thread, of so many nodes each.
int64_t grain_of(int64_t nodes) { return kGrain / (kNodeCost * std::clamp<int64_t>(nodes, 1, kGrain)) + 1; }

template <class T>
T* vector_data(const Tensor& t, int64_t elements, ScalarType dtype, const char* op, const char* what) {
  FC_CHECK(t.is_cpu() && t.dim() == 1 && t.is_contiguous() && t.scalar_type() == dtype &&
               (elements < 0 || t.size(0) == elements),
           op, ": expected ", what, " to be a contiguous vector on the CPU, int64 (values: float64), one a node");
  return (T*)t.data_ptr();
}

// The part of a tree that every op takes.
TreeProblem tree_of(const Tensor& value, const Tensor& start, const Tensor& count, const Tensor& pool, double lam,
                    const char* op) {
  TreeProblem p;
  p.value = vector_data<double>(value, -1, ScalarType::Double, op, "value");
  p.nodes = value.size(0);
  p.start = vector_data<int64_t>(start, p.nodes, ScalarType::Long, op, "start");
  p.count = vector_data<int64_t>(count, p.nodes, ScalarType::Long, op, "count");
  p.pool = vector_data<int64_t>(pool, -1, ScalarType::Long, op, "pool");
  p.slots = pool.size(0);
  FC_CHECK(lam >= 0 && lam <= std::numeric_limits<double>::max(), op, ": expected lam of at least 0");
  p.lam = lam;
  return p;
}

void check_is_tree(const std::atomic<bool>& broken, const char* op) {
  FC_CHECK(!broken.load(), op, ": expected a tree, got a child or a list of children outside of the arrays");
}

}  // namespace

Tensor tree_select(Tensor value, Tensor visits, Tensor taken, Tensor start, Tensor count, Tensor pool, Tensor allowed,
                   Tensor roots, OptionalTensor uniform, int64_t descents, int64_t levels, int64_t width, double lam,
                   double c_uct) {
  const char* const op = "tree_select";
  TreeProblem p = tree_of(value, start, count, pool, lam, op);
  p.visits = vector_data<int64_t>(visits, p.nodes, ScalarType::Long, op, "visits");
  p.taken = vector_data<int64_t>(taken, p.nodes, ScalarType::Long, op, "taken");
  p.allowed = vector_data<int64_t>(allowed, -1, ScalarType::Long, op, "allowed");
  p.allowances = allowed.size(0);
  FC_CHECK(p.allowances >= 1 && descents >= 0 && levels >= 0 && width >= 1, op,
           ": expected an allowance, descents and levels of at least 0, and a width of at least 1");
  p.levels = std::min(levels, p.nodes);  // no descent of a tree is longer
  p.width = width;
  p.c_uct = c_uct;
  const int64_t* root = vector_data<int64_t>(roots, -1, ScalarType::Long, op, "roots");
  const int64_t trees = roots.size(0);
  FC_CHECK(!uniform || (uniform->is_cpu() && uniform->dim() == 3 && uniform->is_contiguous() &&
                        uniform->scalar_type() == ScalarType::Double && uniform->size(0) == trees &&
                        uniform->size(1) == descents && uniform->size(2) == levels),
           op, ": expected uniform [trees, descents, levels], float64, contiguous");
  const double* numbers = uniform ? (const double*)uniform->data_ptr() : nullptr;
  Tensor leaves = empty_strided({trees, descents}, {descents, 1}, ScalarType::Long);
  int64_t* leaf = (int64_t*)leaves.data_ptr();

  // A tree's descents are one after the other, since each sees the visits of those before it.
  const auto descend = tree_kernels(checked_isa()).descend;
  std::atomic<bool> broken{false};
  const int64_t grain = grain_of(std::min(descents, kGrain) * std::min(p.levels, kGrain));
  parallel_for(trees, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * descents; i < end * descents; ++i) {
      leaf[i] = descend(p, root[i / descents], numbers == nullptr ? nullptr : numbers + i * levels);
      if (leaf[i] < 0) broken.store(true);
    }
  });
  check_is_tree(broken, op);
  return leaves;
}

Tensor tree_sample(Tensor value, Tensor start, Tensor count, Tensor pool, Tensor roots, Tensor uniform, double lam) {
  const char* const op = "tree_sample";
  TreeProblem p = tree_of(value, start, count, pool, lam, op);
  const int64_t* root = vector_data<int64_t>(roots, -1, ScalarType::Long, op, "roots");
  const int64_t draws = roots.size(0);
  FC_CHECK(uniform.is_cpu() && uniform.dim() == 2 && uniform.is_contiguous() &&
               uniform.scalar_type() == ScalarType::Double && uniform.size(0) == draws,
           op, ": expected uniform [draws, levels], float64, contiguous");
  const double* numbers = (const double*)uniform.data_ptr();
  const int64_t levels = uniform.size(1);
  p.levels = std::min(levels, p.nodes);
  Tensor leaves = empty_strided({draws}, {1}, ScalarType::Long);
  int64_t* leaf = (int64_t*)leaves.data_ptr();

  const auto descend = tree_kernels(checked_isa()).descend;
  std::atomic<bool> broken{false};
  parallel_for(draws, grain_of(p.levels), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      leaf[i] = descend(p, root[i], numbers + i * levels);
      if (leaf[i] < 0) broken.store(true);
    }
  });
  check_is_tree(broken, op);
  return leaves;
}

void tree_backup(Tensor value, Tensor parent, Tensor depth, Tensor start, Tensor count, Tensor pool, Tensor nodes,
                 double lam) {
  const char* const op = "tree_backup";
  const TreeProblem p = tree_of(value, start, count, pool, lam, op);
  double* values = (double*)value.data_ptr();
  const int64_t* up = vector_data<int64_t>(parent, p.nodes, ScalarType::Long, op, "parent");
  const int64_t* deep = vector_data<int64_t>(depth, p.nodes, ScalarType::Long, op, "depth");
  FC_CHECK(nodes.is_cpu() && nodes.dim() == 2 && nodes.is_contiguous() && nodes.scalar_type() == ScalarType::Long, op,
           ": expected nodes [trees, descents], int64, contiguous");
  const int64_t trees = nodes.size(0), each = nodes.size(1);
  const int64_t* const given = (const int64_t*)nodes.data_ptr();
  for (int64_t i = 0; i < trees * each; ++i)
    FC_CHECK(given[i] >= 0 && given[i] < p.nodes, op, ": expected nodes of the tree, got one outside of it");

  // Level by level from the deepest up, so that a node is computed once, when all below it is done.
  const auto soften = tree_kernels(checked_isa()).soften;
  std::atomic<bool> broken{false};
  const auto climb = [&](const int64_t* first) {
    Dims waiting(first, first + each), level;
    std::sort(waiting.begin(), waiting.end(), [&](int64_t a, int64_t b) { return deep[a] < deep[b]; });
    while (!waiting.empty() || !level.empty()) {
      // The level below has become its parents, which are one up.
      const int64_t at = level.empty() ? deep[waiting.back()] : deep[level[0]];
      for (; !waiting.empty() && deep[waiting.back()] == at; waiting.pop_back()) level.push_back(waiting.back());
      if (!std::is_sorted(level.begin(), level.end())) std::sort(level.begin(), level.end());
      level.erase(std::unique(level.begin(), level.end()), level.end());
      if (!soften(p, values, level.data(), int64_t(level.size()))) return false;
      size_t kept = 0;
      for (const int64_t node : level) {
        if (up[node] < 0) continue;  // a root
        if (up[node] >= p.nodes || deep[up[node]] != at - 1) return false;
        level[kept++] = up[node];
      }
      level.resize(kept);
    }
    return true;
  };
  parallel_for(trees, grain_of(each), [&](int64_t begin, int64_t end) {
    for (int64_t tree = begin; tree < end; ++tree)
      if (!climb(given + tree * each)) broken.store(true);
  });
  check_is_tree(broken, op);
}

}  // namespace fastcifar
