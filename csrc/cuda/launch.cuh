// What every launch goes through, on the current device: limits checked, errors turned into exceptions. In
// the emulation a launch is a loop over the grid.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"
#include "cuda/primitives.cuh"

namespace fnac::cuda {

struct Grid {
    int64_t x;
    int64_t y = 1, z = 1;
};

// A kernel with what an error has to say about it.
struct Shape {
    const char* kernel;
    int64_t n, m, c, p;

    std::string describe() const {
        return std::string(kernel) + " (n=" + std::to_string(n) + ", m=" + std::to_string(m) +
               ", c=" + std::to_string(c) + ", p=" + std::to_string(p) + ")";
    }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Calls body with a value of the element type.
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

#ifdef FNAC_CUDA_EMULATION

inline int most_shared(int) { return std::numeric_limits<int>::max(); }  // a launch beyond it is refused

template <class Arguments>
void launch(void (*kernel)(Arguments), const Shape& shape, const Grid& grid, int threads, int64_t shared,
            const Launch&, const Arguments& arguments) {
    emulation::run_grid(shape.describe(), {grid.x, grid.y, grid.z}, threads, shared,
                        [&] { kernel(arguments); });
}

#else

inline void check(cudaError_t status, const Shape& shape, int device) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // or the next call would report it again
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction)
        if (const std::string why = problem(device); !why.empty()) throw std::runtime_error(why);
    throw std::runtime_error("CUDA kernel " + shape.describe() + ": " + cudaGetErrorName(status) + ", " +
                             cudaGetErrorString(status));
}

// Bytes of shared memory that a block may have.
inline int most_shared(int device) {
    int most = 0;
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          {"launch", 0, 0, 0, 0}, device);
    return most;
}

// A launch beyond the device's limits is refused with both numbers, not with "invalid argument".
inline void check_limits(const Shape& shape, const Grid& grid, int64_t shared, int64_t most) {
    if (shared > most)
        throw std::runtime_error("CUDA kernel " + shape.describe() + " needs " + std::to_string(shared) +
                                 " bytes of shared memory a block, the device has " + std::to_string(most));
    if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
        throw std::runtime_error("CUDA kernel " + shape.describe() + " needs a grid of " +
                                 std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                                 std::to_string(grid.z) + ", the limits are 2147483647 x 65535 x 65535");
}

template <class Arguments>
void launch(void (*kernel)(Arguments), const Shape& shape, const Grid& grid, int threads, int64_t shared,
            const Launch& where, const Arguments& arguments) {
    constexpr int64_t kWithoutOptIn = 48 * 1024;
    const int most = most_shared(where.device);
    check_limits(shape, grid, shared, most);
    // As much for every launch: the kernel, not the launch, has this limit, and another thread may need more.
    if (shared > kWithoutOptIn)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), shape,
              where.device);
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                      static_cast<unsigned>(grid.z));
    void* pointers[] = {const_cast<Arguments*>(&arguments)};
    check(
        cudaLaunchKernel(reinterpret_cast<const void*>(kernel), blocks, dim3(static_cast<unsigned>(threads)),
                         pointers, static_cast<size_t>(shared), static_cast<cudaStream_t>(where.stream)),
        shape, where.device);
}

#endif

}  // namespace fnac::cuda
