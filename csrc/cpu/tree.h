// Raw kernels of tree search over diffusion states: descents, and the soft values of nodes. A tree is flat arrays; the
// children of node i are pool[start[i]] ... pool[start[i] + count[i] - 1], in the order in which they were made.
#pragma once
#include <stdint.h>

namespace fastcifar {

struct TreeProblem {
  const double* value = nullptr;     // [nodes]
  const int64_t* start = nullptr;    // [nodes]
  const int64_t* count = nullptr;    // [nodes]
  const int64_t* pool = nullptr;     // [slots]
  int64_t* visits = nullptr;         // [nodes]; null where a descent draws and changes nothing
  int64_t* taken = nullptr;          // [nodes]: children, with those that descents of this round are about to make
  const int64_t* allowed = nullptr;  // [allowances]: how many children a node of so many visits may have
  int64_t nodes = 0, slots = 0, allowances = 1;
  int64_t levels = 0;  // from the root to where there is nothing below
  int64_t width = 1;   // children that a descent makes where it ends
  double lam = 1, c_uct = 1;
};

struct TreeKernels {
  // The node where a descent from `root` ends; `uniform` has a number for each level, or is null for the largest upper
  // bound (UCT). -1 where the arrays are not a tree.
  int64_t (*descend)(const TreeProblem&, int64_t root, const double* uniform);
  // The soft values of n nodes from those of their children, into `value`; a node without children keeps its own.
  // False where the arrays are not a tree.
  bool (*soften)(const TreeProblem&, double* value, const int64_t* nodes, int64_t n);
};

}  // namespace fastcifar
