// What both halves of the binding share: how tensors come over from Python.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>

#include "common/features.h"

namespace fnac {

// The address of a tensor's data; 0 is null.
template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// (data, dtype, n, c, p, stride_c, stride_p)
using Image = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t, int64_t>;

inline FeatureMap feature_map(const Image& image) {
    const auto& [data, dtype, n, c, p, stride_c, stride_p] = image;
    return {at<const void>(data), static_cast<Dtype>(dtype), n, c, p, stride_c, stride_p};
}

// Adds the functions of the CUDA kernels to a module.
void bind_cuda(pybind11::module_&);

}  // namespace fnac
