// The host's implementation of csrc/cuda/hopper.cuh. Boxes land when their barrier is waited for, and not
// earlier; until then their place holds NaN. Products are made at once: that they are waited for is not
// checked.
#pragma once

#include "emulation.h"

#define FNAC_HOPPER_KERNEL(threads) inline void
#define FNAC_CONSTANT

namespace fnac::emulation {

struct Barrier {
    int count;        // of arrivals to a phase
    int arrived;      // in this phase
    int waiting;      // threads
    int64_t bytes;    // announced and not come
    uint64_t passed;  // phases
};

struct Box {
    char* to;
    const char* from;                    // of the matrix
    int64_t row, column, rows, columns;  // of the box; of the matrix
    int box_rows;
    Barrier* barrier;
};

int64_t grid_x();
void group_barrier(int id, int threads);
void arrive(Barrier& barrier, int64_t bytes);
void wait(Barrier& barrier, int parity);
void start(const Box& box);

// Where the tensor cores look for the byte at this address of rows that are not permuted.
inline const char* permuted(const char* address) {
    const auto bits = reinterpret_cast<uintptr_t>(address);
    return reinterpret_cast<const char*>(bits ^ (bits >> 7 & 7) << 4);
}

// An operand of a product: see along_rows() and across_rows().
struct Operand {
    const char* first;
    int box_bytes;  // 0: along rows
};

}  // namespace fnac::emulation

namespace fnac::cuda {

using emulation::Barrier;
using emulation::Operand;

struct Matrix {
    const char* data;
    int64_t rows, columns;
    int box_rows;
};

inline Matrix make_matrix(const void* data, int64_t rows, int64_t columns, int box_rows) {
    if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || columns % 8 != 0 || box_rows < 1 || box_rows > 256)
        throw std::runtime_error("the copy engine does not know such a matrix");
    return {static_cast<const char*>(data), rows, columns, box_rows};
}

FNAC_DEVICE int64_t grid_x() { return emulation::grid_x(); }
template <int kThreads>
void group_barrier(int id) {
    emulation::group_barrier(id, kThreads);
}
FNAC_DEVICE bool any(bool own) {
    int all = own;
    for (int mask = 1; mask < kWarpSize; mask *= 2) all |= shuffle_xor(all, mask);
    return all != 0;
}

FNAC_DEVICE void barrier_init(Barrier& barrier, int count) { barrier = {count, 0, 0, 0, 0}; }
FNAC_DEVICE void barriers_are_ready() {}
FNAC_DEVICE void barrier_arrive(Barrier& barrier) { emulation::arrive(barrier, 0); }
FNAC_DEVICE void barrier_expect(Barrier& barrier, int bytes) { emulation::arrive(barrier, bytes); }
FNAC_DEVICE void barrier_wait(Barrier& barrier, int parity) { emulation::wait(barrier, parity); }
FNAC_DEVICE void copy_box(void* to, const Matrix& matrix, int64_t column, int64_t row, Barrier& barrier) {
    emulation::start({static_cast<char*>(to), matrix.data, row, column, matrix.rows, matrix.columns,
                      matrix.box_rows, &barrier});
}

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

FNAC_DEVICE Operand along_rows(const void* first) { return {static_cast<const char*>(first), 0}; }
FNAC_DEVICE Operand across_rows(const void* first, int box_bytes) {
    return {static_cast<const char*>(first), box_bytes};
}

FNAC_DEVICE void products_begin() {}
FNAC_DEVICE void products_end() {}
template <int kPending>
void products_wait() {}

// Element k of the 16 that a product goes along, of an operand's row (sound, cell) or column (channel).
template <class T>
float element(const Operand& operand, int row, int k) {
    const char* address = operand.box_bytes == 0 ? operand.first + row * kBoxRowBytes + k * 2
                                                 : operand.first + row / kBoxColumns * operand.box_bytes +
                                                       k * kBoxRowBytes + row % kBoxColumns * 2;
    T value;
    std::memcpy(&value, emulation::permuted(address), sizeof value);
    return widen(value);
}

// `left(half, k)` is element k of the lane's row + 8 half.
template <class T, int kCount, class Left>
void multiply_rows(float (&d)[kCount], const Left& left, const Operand& b, bool keep) {
    const int lane = thread_index() % kWarpSize;
    for (int i = 0; i < kCount; ++i) {
        float sum = keep ? d[i] : 0.f;
        for (int k = 0; k < 16; ++k)
            sum += left(i / 2 % 2, k) * element<T>(b, i / 4 * 8 + lane % 4 * 2 + i % 2, k);
        d[i] = sum;
    }
}

template <class T, int kCount>
void product(T, float (&d)[kCount], const Operand& a, const Operand& b, bool keep) {
    warp_barrier();
    const int row = thread_index() % kGroupSize / kWarpSize * 16 + thread_index() % kWarpSize / 4;
    float rows[2][16];
    for (int half = 0; half < 2; ++half)
        for (int k = 0; k < 16; ++k) rows[half][k] = element<T>(a, row + 8 * half, k);
    multiply_rows<T>(d, [&](int half, int k) { return rows[half][k]; }, b, keep);
}

inline void product(float (&d)[128], const uint32_t (&a)[4], const Operand& b, bool keep) {
    struct Lane {
        uint32_t words[4][4];  // of the four lanes that share rows; handed in as the first
    } mine{};
    std::memcpy(mine.words[0], a, sizeof a);
    emulation::collective(emulation::Operation::kMultiply, &mine, sizeof mine, [](char* slots) {
        uint32_t own[kWarpSize][4];
        for (int lane = 0; lane < kWarpSize; ++lane)
            std::memcpy(own[lane], emulation::slot<Lane>(slots, lane).words[0], sizeof own[lane]);
        for (int lane = 0; lane < kWarpSize; ++lane)
            for (int i = 0; i < 4; ++i)
                std::memcpy(emulation::slot<Lane>(slots, lane).words[i], own[lane / 4 * 4 + i],
                            sizeof own[0]);
    });
    const auto left = [&](int half, int k) {
        const uint32_t word = mine.words[k % 8 / 2][half + k / 8 * 2];
        return widen(BFloat16{static_cast<uint16_t>(k % 2 == 0 ? word : word >> 16)});
    };
    multiply_rows<BFloat16>(d, left, b, keep);
}

constexpr uint32_t kNoCell = 0x7fff;
FNAC_DEVICE uint32_t equal_halves(uint32_t x, uint32_t y) {
    const auto mask = [&](uint32_t half) {
        return (x & half) == (y & half) && (x & half & kNoCell * 0x10001u) != (half & kNoCell * 0x10001u)
                   ? half
                   : 0;
    };
    return mask(0xffff) | mask(0xffff0000u);
}

FNAC_DEVICE float nan_maximum(float x, float y) { return x != x || x > y ? x : y; }

}  // namespace fnac::cuda
