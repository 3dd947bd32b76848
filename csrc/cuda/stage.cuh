// Operands on their way to the multiplier. A stage holds some rows, sounds or cells, of 64 bytes each: that
// many channels, in four chunks of 16 bytes. Whatever the layout in memory, in shared memory a row's channels
// lie next to each other, which is what tensor cores (ldmatrix) and 128-bit loads want.
//
// The four chunks of a row are permuted by its number, so that eight rows' chunks of one column are in
// different banks.
#pragma once

#include "cuda/primitives.cuh"

namespace fnac::cuda {

constexpr int kRowBytes = 64;
constexpr int kChunks = 4;
// Elements of a chunk, channels of a stage.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kDepth = kChunks * kVector<T>;

FNAC_DEVICE char* chunk_of(char* rows, int row, int chunk) {
    return rows + row * kRowBytes + ((chunk ^ (row >> 1 & 3)) << 4);
}

// Channels c.. of a row whose channels lie next to each other; zeros beyond the last channel, and where the
// row is not to be read. Where rows are not multiples of 16 bytes, element by element, and at once.
template <class T>
FNAC_DEVICE void copy_chunk(char* to, const T* row, bool read, int c, int channels, bool aligned) {
    if (aligned) {
        read = read && c < channels;
        copy_async(to, read ? row + c : row, read);
        return;
    }
    union {
        T elements[kVector<T>];
        Bits128 bits;
    } chunk;
    for (int i = 0; i < kVector<T>; ++i) chunk.elements[i] = read && c + i < channels ? row[c + i] : T{};
    *reinterpret_cast<Bits128*>(to) = chunk.bits;
}

// A chunk of a cell of NCHW features, whose channels lie a plane apart: loaded into registers early, so that
// it arrives during the products, and stored late. Neighbouring lanes hold neighbouring cells.
template <class T>
struct PlaneChunk {
    T elements[kVector<T>];

    FNAC_DEVICE void load(const T* cell, int64_t plane, bool read, int c, int channels) {
        cell += c * plane;
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) {
            elements[i] = read && c + i < channels ? *cell : T{};
            cell += plane;
        }
    }
    FNAC_DEVICE void store(char* to) const {
        union {
            T elements[kVector<T>];
            Bits128 bits;
        } chunk;
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) chunk.elements[i] = elements[i];
        *reinterpret_cast<Bits128*>(to) = chunk.bits;
    }
};

}  // namespace fnac::cuda
