// Everything that the kernels use of CUDA beyond C++, under names of our own. Each has two implementations:
// this file for the device, tests/emulation/emulation.h for the host, so that the same kernels run in the
// tests without a GPU. Keep it small: what stands here must be emulated.
//
// Chips before sm_80 have neither asynchronous copies nor bfloat16 tensor cores: they get the plain path, the
// same results from ordinary instructions.
#pragma once

#include <cstdint>
#include <limits>

namespace fnac::cuda {

// 16-bit floats as bits.
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};
// A type for the tensor cores alone: float32 operands with 10 bits of mantissa.
struct TensorFloat32 {};

struct alignas(8) Float2 {
    float x, y;
};
struct alignas(16) Float4 {
    float x, y, z, w;
};
struct alignas(16) Bits128 {
    uint32_t words[4];
};

constexpr int kWarpSize = 32;
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

}  // namespace fnac::cuda

#ifdef FNAC_CUDA_EMULATION
#include "emulation.h"
#else

#include <cuda_fp16.h>

#define FNAC_DEVICE __device__ __forceinline__
#define FNAC_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace fnac::cuda {

FNAC_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FNAC_DEVICE int64_t block_x() { return blockIdx.x; }
FNAC_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
FNAC_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }

// The block's dynamic shared memory, undefined when the block starts.
FNAC_DEVICE char* shared_memory() {
    extern __shared__ __align__(128) char memory[];
    return memory;
}

FNAC_DEVICE void block_barrier() { __syncthreads(); }
// Orders the memory accesses of a warp's lanes.
FNAC_DEVICE void warp_barrier() { __syncwarp(); }

// Every lane of the warp takes part in what follows.
FNAC_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
FNAC_DEVICE int shuffle_xor(int x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
// The set of lanes that hold the same key.
FNAC_DEVICE uint32_t match(int key) { return __match_any_sync(~0u, key); }

FNAC_DEVICE int count_bits(uint32_t x) { return __popc(x); }
FNAC_DEVICE int lowest_bit(uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }

// x * y + z, rounded once.
FNAC_DEVICE float multiply_add(float x, float y, float z) { return fmaf(x, y, z); }

FNAC_DEVICE float widen(float x) { return x; }
FNAC_DEVICE float widen(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
FNAC_DEVICE float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
FNAC_DEVICE T narrow(float x);
template <>
FNAC_DEVICE float narrow(float x) {
    return x;
}
template <>
FNAC_DEVICE Float16 narrow(float x) {
    return {__half_as_ushort(__float2half_rn(x))};
}
template <>
FNAC_DEVICE BFloat16 narrow(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

// Copies 16 or 4 bytes to shared memory without waiting, or writes zeros where the source is not to be read.
// Both addresses are multiples of as many.
template <int kBytes = 16>
FNAC_DEVICE void copy_async(void* to, const void* from, bool read) {
    static_assert(kBytes == 16 || kBytes == 4);
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    if constexpr (kBytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                     "r"(read ? 16 : 0)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from),
                     "r"(read ? 4 : 0)
                     : "memory");
    }
}
// Closes a group of copies; waits until all but the last `kPending` groups of this thread have arrived.
FNAC_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
FNAC_DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#else

template <int kBytes = 16>
FNAC_DEVICE void copy_async(void* to, const void* from, bool read) {
    if constexpr (kBytes == 16) {
        *static_cast<Bits128*>(to) = read ? *static_cast<const Bits128*>(from) : Bits128{};
    } else {
        *static_cast<uint32_t*>(to) = read ? *static_cast<const uint32_t*>(from) : 0;
    }
}
FNAC_DEVICE void copy_commit() {}
template <int kPending>
FNAC_DEVICE void copy_wait() {}

#endif

// Four 8 x 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8 (16 bytes),
// and receives of each matrix the 32-bit word l % 4 of row l / 4.
FNAC_DEVICE void load_matrices(uint32_t (&words)[4], const void* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
}

// The same of the matrices' transposes: a lane receives column l / 4 of rows 2 (l % 4) and the next.
FNAC_DEVICE void load_matrices_turned(uint32_t (&words)[4], const void* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
}

// x as a sum of three bfloat16, the leading one first, each with the next bits of x.
FNAC_DEVICE void split(float x, uint32_t (&bits)[3]) {
    bits[0] = __float_as_uint(x) & 0xffff0000u;
    const float rest = x - __uint_as_float(bits[0]);
    bits[1] = __float_as_uint(rest) & 0xffff0000u;
    bits[2] = __float_as_uint(rest - __uint_as_float(bits[1]));
}
// The upper halves of two words in one, `low`'s in the lower half.
FNAC_DEVICE uint32_t upper_halves(uint32_t low, uint32_t high) { return __byte_perm(low, high, 0x7632); }

// Rounds a float32 operand to TensorFloat32; operands of 16 bits are as they are.
template <class T>
FNAC_DEVICE uint32_t operand(uint32_t word) {
    return word;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

template <>
FNAC_DEVICE uint32_t operand<TensorFloat32>(uint32_t word) {
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(word)));
    return rounded;
}

#define FNAC_MMA(instruction)                                                                   \
    asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// d += a b on the tensor cores: a is 16 rows by 32 bytes, b 32 bytes by 8 columns, in the layout of PTX's
// m16n8k16 (16 bits) and m16n8k8 (TensorFloat32): lane l holds of d the columns 2 (l % 4) and the next of
// rows l / 4 and l / 4 + 8.
FNAC_DEVICE void multiply(BFloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    FNAC_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
}
FNAC_DEVICE void multiply(Float16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    FNAC_MMA("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
}
FNAC_DEVICE void multiply(TensorFloat32, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    FNAC_MMA("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef FNAC_MMA

#else

FNAC_DEVICE void unpack(BFloat16, uint32_t word, float (&x)[2]) {
    x[0] = __uint_as_float(word << 16);
    x[1] = __uint_as_float(word & 0xffff0000u);
}
FNAC_DEVICE void unpack(Float16, uint32_t word, float (&x)[2]) {
    x[0] = __half2float(__ushort_as_half(static_cast<uint16_t>(word)));
    x[1] = __half2float(__ushort_as_half(static_cast<uint16_t>(word >> 16)));
}
FNAC_DEVICE void unpack(TensorFloat32, uint32_t word, float (&x)[2]) {
    x[0] = __uint_as_float(word);
    x[1] = 0.f;
}

template <class T>
FNAC_DEVICE void multiply(T type, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const int lane = thread_index() % kWarpSize;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        // Words k % 4 of the low (k < 4) and the high half of the rows and columns that this lane's d needs.
        const int row = lane / 4 * 4 + k % 4, column = lane % 4 * 8 + k % 4;
        float x[2][2], y[2][2];
        unpack(type, __shfl_sync(~0u, a[k / 4 * 2], row), x[0]);
        unpack(type, __shfl_sync(~0u, a[k / 4 * 2 + 1], row), x[1]);
        unpack(type, __shfl_sync(~0u, k < 4 ? b0 : b1, column), y[0]);
        unpack(type, __shfl_sync(~0u, k < 4 ? b0 : b1, column + 4), y[1]);
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 2; ++j) d[i] = fmaf(x[i / 2][j], y[i % 2][j], d[i]);
    }
}

#endif

}  // namespace fnac::cuda

#endif  // FNAC_CUDA_EMULATION
