// The CPU kernels over a traits type V (vector width, registers, a few instructions); each kernels_<isa>.cpp
// defines its V and includes this once. Everything here has internal linkage: code compiled for one
// instruction set must never be the copy that the linker keeps for another, so no standard container is used
// either.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace fnac {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace fnac

// clang-format off: each needs those before it
#include "cpu/pack_impl.h"
#include "cpu/tiles_impl.h"
#include "cpu/one_cell_impl.h"
#include "cpu/max_logits_impl.h"
#include "cpu/pool_impl.h"
#include "cpu/feature_backward_impl.h"
#include "cpu/softmax_impl.h"
#include "cpu/triangle_impl.h"
#include "cpu/adjacency_impl.h"
#include "cpu/adjacency_backward_impl.h"
// clang-format on

namespace fnac {
namespace {

template <class V>
const Kernels& kernels_of() {
    static const Kernels table{V::kName,     max_logits<V>,        pool<V>, feature_backward<V>,
                               adjacency<V>, adjacency_backward<V>};
    return table;
}

}  // namespace
}  // namespace fnac
