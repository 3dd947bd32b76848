// bfloat16 and float16 as bits. Internal linkage, as all code that is compiled
// once per instruction set: see kernels_impl.h.
#pragma once

#include <bit>
#include <cstdint>

#include "common/features.h"

namespace fnac {
namespace {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

template <class Body>
void with_dtype(Dtype dtype, Body&& body) {
    switch (dtype) {
        case Dtype::kFloat32:
            return body(float{});
        case Dtype::kBFloat16:
            return body(BFloat16{});
        case Dtype::kFloat16:
            return body(Float16{});
    }
}

}  // namespace
}  // namespace fnac
