// Tree search. What it takes is a read of each child's value from a place of its own, and an exponential each; the
// children are listed by index so that these reads do not wait for each other, and are gathered a block at a time, so
// that the exponentials are taken a register at a time. Sums are in the order of the children, in float64, and so no
// instruction set or number of threads changes a bit.
#pragma once
#include "tree.h"
#include "vec.h"

namespace fastcifar::FASTCIFAR_ISA {

// Children that are gathered together; of more than this many, the draw computes the weights a second time.
constexpr int64_t kTreeBlock = 256;

struct alignas(64) TreeBlock {
  double at[kTreeBlock];
};

// Whether a node's list of children lies in the pool.
FC_INLINE bool has_list(const TreeProblem& p, int64_t node) {
  const int64_t start = p.start[node], count = p.count[node];
  return start >= 0 && count >= 0 && start <= p.slots && count <= p.slots - start;
}

// The values of up to kTreeBlock children, filled up to whole registers with their last. False: not a tree.
static bool gather(const TreeProblem& p, const int64_t* children, int64_t n, TreeBlock& block) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t child = children[i];
    if ((uint64_t)child >= (uint64_t)p.nodes) return false;
    block.at[i] = p.value[child];
  }
  for (int64_t i = n; i % kLanes<double>; ++i) block.at[i] = block.at[n - 1];
  return true;
}

// exp(lam (v - top)) in place; 1 of what equals top, which may be infinite, and 0 of a NaN.
static void weigh(TreeBlock& block, int64_t n, double top, double lam) {
  for (int64_t i = 0; i < n; i += kLanes<double>) {
    const V<double> v = load(block.at + i, Full{});
    const V<double> d = select<double>(v == top, V<double>{}, (v - top) * lam);
    const V<double> w = lam == 0 ? splat<double>(1) : exp_nonpositive<double>(d);
    store(block.at + i, select<double>(v == v, w, V<double>{}), Full{});
  }
}

// What all of a node's children say.
struct Siblings {
  double top, total, mean;  // the largest value that is no NaN, the sum of the weights, the mean where lam is 0
  bool has_nan;
};

// Leaves the last block's weights in `block`.
static bool look_at(const TreeProblem& p, const int64_t* children, int64_t count, TreeBlock& block, Siblings& s) {
  double top = -__builtin_inf(), mean = 0, total = 0;
  bool has_nan = false;
  for (int64_t from = 0; from < count; from += kTreeBlock) {
    const int64_t n = count - from < kTreeBlock ? count - from : kTreeBlock;
    if (!gather(p, children + from, n, block)) return false;
    for (int64_t i = 0; i < n; ++i) {
      const double v = block.at[i];
      top = v > top ? v : top;
      has_nan |= v != v;
    }
    if (p.lam == 0)  // each divided by itself: the sum of the largest might overflow
      for (int64_t i = 0; i < n; ++i) mean += block.at[i] / double(count);
  }
  for (int64_t from = 0; from < count; from += kTreeBlock) {
    const int64_t n = count - from < kTreeBlock ? count - from : kTreeBlock;
    if (count > kTreeBlock && !gather(p, children + from, n, block)) return false;
    weigh(block, n, top, p.lam);
    for (int64_t i = 0; i < n; ++i) total += block.at[i];
  }
  s = {top, total, mean, has_nan};
  return true;
}

// The child in whose share of the weights a uniform number falls. Rounding may leave none: then the last that has a
// share, and the first where none has (all are NaN).
static int64_t draw(const TreeProblem& p, const int64_t* children, int64_t count, double uniform) {
  TreeBlock block;
  Siblings s;
  if (!look_at(p, children, count, block, s)) return -1;
  const double threshold = uniform * s.total;
  double running = 0;
  int64_t last = 0;
  for (int64_t from = 0; from < count; from += kTreeBlock) {
    const int64_t n = count - from < kTreeBlock ? count - from : kTreeBlock;
    if (count > kTreeBlock) {
      if (!gather(p, children + from, n, block)) return -1;
      weigh(block, n, s.top, p.lam);
    }
    for (int64_t i = 0; i < n; ++i) {
      if (block.at[i] > 0) last = from + i;
      running += block.at[i];
      if (running > threshold) return children[from + i];
    }
  }
  return children[last];
}

// The first child of the largest v + c sqrt(ln N / n); a NaN is never the largest.
static int64_t upper_bound(const TreeProblem& p, const int64_t* children, int64_t count, int64_t visits) {
  const double ln = log<double>(splat<double>(double(visits)))[0];
  double best = -__builtin_inf();
  int64_t at = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t child = children[i];
    if ((uint64_t)child >= (uint64_t)p.nodes) return -1;
    const double score = p.value[child] + p.c_uct * __builtin_sqrt(ln / double(p.visits[child]));
    if (score > best) best = score, at = i;
  }
  return children[at];
}

static int64_t descend(const TreeProblem& p, int64_t root, const double* uniform) {
  int64_t node = root;
  for (int64_t level = 0;; ++level) {
    if ((uint64_t)node >= (uint64_t)p.nodes || !has_list(p, node)) return -1;
    const int64_t* children = p.pool + p.start[node];
    const int64_t count = p.count[node];
    int64_t visits = 0;
    if (p.visits != nullptr) {
      visits = p.visits[node] = int64_t(uint64_t(p.visits[node]) + 1);
      if (visits < 1) return -1;
    }
    if (level == p.nodes) return -1;  // it goes round in a circle
    if (level == p.levels) return node;
    if (p.visits != nullptr) {
      const int64_t allowance = p.allowed[visits < p.allowances ? visits : p.allowances - 1];
      // Where all children are still to be made there is nothing to descend into.
      if (p.taken[node] < allowance || count == 0) {
        p.taken[node] = int64_t(uint64_t(p.taken[node]) + uint64_t(p.width));
        return node;
      }
    } else if (count == 0) {
      return node;
    }
    if (uniform == nullptr)
      node = upper_bound(p, children, count, visits);
    else
      node = count == 1 ? children[0] : draw(p, children, count, uniform[level]);
  }
}

static bool soften(const TreeProblem& p, double* value, const int64_t* nodes, int64_t n) {
  TreeBlock block;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t node = nodes[i];
    if ((uint64_t)node >= (uint64_t)p.nodes || !has_list(p, node)) return false;
    const int64_t* children = p.pool + p.start[node];
    const int64_t count = p.count[node];
    if (count == 0) continue;
    if (count == 1) {  // its own mean
      if ((uint64_t)children[0] >= (uint64_t)p.nodes) return false;
      value[node] = p.value[children[0]];
      continue;
    }
    Siblings s;
    if (!look_at(p, children, count, block, s)) return false;
    if (s.has_nan)
      value[node] = __builtin_nan("");
    else if (p.lam == 0)
      value[node] = s.mean;
    else
      value[node] = s.top + log<double>(splat<double>(s.total / double(count)))[0] / p.lam;
  }
  return true;
}

extern const TreeKernels tree_kernels;
const TreeKernels tree_kernels = {descend, soften};

}  // namespace fastcifar::FASTCIFAR_ISA
