// The host's implementation of csrc/cuda/primitives.cuh and launch.cuh: the kernels run block by block, each
// thread a fiber. What makes it a test and not only a way to run:
//
// - Shared memory is a fresh allocation of exactly the bytes asked for, filled with NaN: what is read before
//   it is written shows, and AddressSanitizer sees what is read or written outside of it.
// - Warps run one after the other, each as far as the next block barrier, and lanes one after the other as
//   far as the next operation of the warp. FNAC_CUDA_EMULATION_ORDER (forward, reverse, random) says in which
//   order: where a barrier is missing, some order reads too early or overwrites too early.
// - Asynchronous copies land when they are waited for, and not earlier.
// - An operation of a warp that not all of its lanes reach, or a barrier that not all threads reach, is an
//   error.
// - FNAC_CUDA_EMULATION_CHIP (sm_80, sm_90a) says whose kernels run.
// - FNAC_CUDA_EMULATION_TRACE, if set, prints every launch to standard error.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include "cuda/primitives.cuh"

#define FNAC_DEVICE inline
#define FNAC_KERNEL(threads, blocks) inline void
#define __global__
#define __host__
#define __device__

namespace fnac::emulation {

struct Index {
    int64_t x, y, z;
};

// Of the thread that runs now.
int thread_index();
const Index& block_index();
char* shared_memory();
void block_barrier();

// An operation of a warp: every lane hands in `bytes` (at most kSlot), the last to come calls `complete` with
// all slots; then each gets its own back.
constexpr int kSlot = 64;
enum class Operation { kBarrier, kShuffle, kMatch, kLoadMatrices, kMultiply };
void collective(Operation operation, void* mine, size_t bytes, void (*complete)(char* slots));

void copy_async(void* to, const void* from, bool read, size_t bytes);
void copy_commit();
void copy_wait(int pending);

// Runs body as every thread of every block.
void run_grid(const std::string& name, const Index& grid, int threads, int64_t shared,
              const std::function<void()>& body);

template <class T>
T& slot(char* slots, int lane) {
    return *reinterpret_cast<T*>(slots + lane * kSlot);
}

// A lane's part of a tensor-core product, see multiply() in primitives.cuh.
struct Product {
    float d[4];
    uint32_t a[4], b[2];
};

}  // namespace fnac::emulation

namespace fnac::cuda {

FNAC_DEVICE int thread_index() { return emulation::thread_index(); }
FNAC_DEVICE int64_t block_x() { return emulation::block_index().x; }
FNAC_DEVICE int block_y() { return static_cast<int>(emulation::block_index().y); }
FNAC_DEVICE int block_z() { return static_cast<int>(emulation::block_index().z); }
FNAC_DEVICE char* shared_memory() { return emulation::shared_memory(); }
FNAC_DEVICE void block_barrier() { emulation::block_barrier(); }

FNAC_DEVICE void warp_barrier() {
    char none = 0;
    emulation::collective(emulation::Operation::kBarrier, &none, 1, [](char*) {});
}

template <class T>
T shuffle_xor(T x, int mask) {
    struct Lane {
        T value;
        int mask;
        T result;
    } mine{x, mask, x};
    emulation::collective(emulation::Operation::kShuffle, &mine, sizeof mine, [](char* slots) {
        for (int lane = 0; lane < kWarpSize; ++lane) {
            Lane& to = emulation::slot<Lane>(slots, lane);
            to.result = emulation::slot<Lane>(slots, lane ^ to.mask).value;
        }
    });
    return mine.result;
}

FNAC_DEVICE uint32_t match(int key) {
    struct Lane {
        int key;
        uint32_t lanes;
    } mine{key, 0};
    emulation::collective(emulation::Operation::kMatch, &mine, sizeof mine, [](char* slots) {
        for (int i = 0; i < kWarpSize; ++i)
            for (int j = 0; j < kWarpSize; ++j)
                if (emulation::slot<Lane>(slots, i).key == emulation::slot<Lane>(slots, j).key)
                    emulation::slot<Lane>(slots, i).lanes |= 1u << j;
    });
    return mine.lanes;
}

FNAC_DEVICE int count_bits(uint32_t x) { return std::popcount(x); }
FNAC_DEVICE int lowest_bit(uint32_t x) { return x == 0 ? -1 : std::countr_zero(x); }
FNAC_DEVICE float multiply_add(float x, float y, float z) { return x * y + z; }

FNAC_DEVICE float widen(float x) { return x; }
FNAC_DEVICE float widen(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
FNAC_DEVICE float widen(Float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    if (rest >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    const float magnitude = rest < 0x400 ? static_cast<float>(rest) * 0x1p-24f
                                         : std::bit_cast<float>((rest << 13) + ((127 - 15) << 23));
    return sign != 0 ? -magnitude : magnitude;
}

template <class T>
T narrow(float x);
template <>
inline float narrow(float x) {
    return x;
}
template <>
inline BFloat16 narrow(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Float16 narrow(float x) {
    const auto sign = static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16 & 0x8000);
    const float magnitude = std::fabs(x);
    if (x != x) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (magnitude >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00)};
    // Rounding to the nearest, ties to even, at the unit of the last place: rint does it.
    int exponent = 0;
    std::frexp(magnitude, &exponent);
    const int unit = magnitude < 0x1p-14f ? -24 : exponent - 11;
    const auto count = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -unit)));
    return {static_cast<uint16_t>(sign | (count + static_cast<uint32_t>(unit + 24) * 0x400))};
}

template <int kBytes = 16>
void copy_async(void* to, const void* from, bool read) {
    emulation::copy_async(to, from, read, kBytes);
}
FNAC_DEVICE void copy_commit() { emulation::copy_commit(); }
template <int kPending>
void copy_wait() {
    emulation::copy_wait(kPending);
}

FNAC_DEVICE void load_matrices(uint32_t (&words)[4], const void* row) {
    struct Lane {
        const void* row;
        uint32_t words[4];
    } mine{row, {}};
    emulation::collective(emulation::Operation::kLoadMatrices, &mine, sizeof mine, [](char* slots) {
        for (int lane = 0; lane < kWarpSize; ++lane)
            for (int matrix = 0; matrix < 4; ++matrix) {
                const void* from = emulation::slot<Lane>(slots, matrix * 8 + lane / 4).row;
                std::memcpy(&emulation::slot<Lane>(slots, lane).words[matrix],
                            static_cast<const char*>(from) + lane % 4 * 4, 4);
            }
    });
    std::memcpy(words, mine.words, sizeof words);
}

FNAC_DEVICE void load_matrices_turned(uint32_t (&words)[4], const void* row) {
    struct Lane {
        const void* row;
        uint32_t words[4];
    } mine{row, {}};
    emulation::collective(emulation::Operation::kLoadMatrices, &mine, sizeof mine, [](char* slots) {
        for (int lane = 0; lane < kWarpSize; ++lane)
            for (int matrix = 0; matrix < 4; ++matrix)
                for (int half = 0; half < 2; ++half) {
                    const void* from = emulation::slot<Lane>(slots, matrix * 8 + lane % 4 * 2 + half).row;
                    uint16_t element;
                    std::memcpy(&element, static_cast<const char*>(from) + lane / 4 * 2, 2);
                    emulation::slot<Lane>(slots, lane).words[matrix] |= static_cast<uint32_t>(element)
                                                                        << 16 * half;
                }
    });
    std::memcpy(words, mine.words, sizeof words);
}

FNAC_DEVICE void split(float x, uint32_t (&bits)[3]) {
    bits[0] = std::bit_cast<uint32_t>(x) & 0xffff0000u;
    const float rest = x - std::bit_cast<float>(bits[0]);
    bits[1] = std::bit_cast<uint32_t>(rest) & 0xffff0000u;
    bits[2] = std::bit_cast<uint32_t>(rest - std::bit_cast<float>(bits[1]));
}
FNAC_DEVICE uint32_t upper_halves(uint32_t low, uint32_t high) { return low >> 16 | (high & 0xffff0000u); }

template <class T>
uint32_t operand(uint32_t word) {
    return word;
}
template <>
inline uint32_t operand<TensorFloat32>(uint32_t word) {
    const bool finite = (word & 0x7f800000) != 0x7f800000;
    return (finite ? word + 0x1000 : word) & ~0x1fffu;  // to the nearest, ties away from zero
}

FNAC_DEVICE void unpack(BFloat16, uint32_t word, float (&x)[2]) {
    x[0] = widen(BFloat16{static_cast<uint16_t>(word)});
    x[1] = widen(BFloat16{static_cast<uint16_t>(word >> 16)});
}
FNAC_DEVICE void unpack(Float16, uint32_t word, float (&x)[2]) {
    x[0] = widen(Float16{static_cast<uint16_t>(word)});
    x[1] = widen(Float16{static_cast<uint16_t>(word >> 16)});
}
FNAC_DEVICE void unpack(TensorFloat32, uint32_t word, float (&x)[2]) {
    x[0] = std::bit_cast<float>(word);
    x[1] = 0.f;
}

template <class T>
void multiply(T, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    using emulation::Product;
    Product mine{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    emulation::collective(emulation::Operation::kMultiply, &mine, sizeof mine, [](char* slots) {
        float a[16][16], b[16][8], d[16][8] = {};
        for (int lane = 0; lane < kWarpSize; ++lane) {
            const Product& from = emulation::slot<Product>(slots, lane);
            const int row = lane / 4, word = lane % 4 * 2;
            for (int half = 0; half < 2; ++half) {
                float x[2];
                unpack(T{}, from.b[half], x);
                for (int i = 0; i < 2; ++i) b[word + 8 * half + i][row] = x[i];
                for (int low = 0; low < 2; ++low) {
                    unpack(T{}, from.a[2 * half + low], x);
                    for (int i = 0; i < 2; ++i) a[row + 8 * low][word + 8 * half + i] = x[i];
                }
            }
        }
        for (int row = 0; row < 16; ++row)
            for (int k = 0; k < 16; ++k)
                for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
        for (int lane = 0; lane < kWarpSize; ++lane)
            for (int i = 0; i < 4; ++i)
                emulation::slot<Product>(slots, lane).d[i] += d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    });
    std::memcpy(d, mine.d, sizeof d);
}

}  // namespace fnac::cuda
