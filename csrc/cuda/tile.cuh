// The multiplier: 64 rows (sounds) by 64 columns (cells) of products a warp, in registers, summed over the
// channels in float32. Two kinds share an interface: TensorTile multiplies 16-bit or TensorFloat32 operands
// on the tensor cores, PlainTile multiplies float32 exactly. A lane owns kRows rows by kColumns columns; the
// other columns of its rows are with the lanes that differ from it in the low bits of kLanes.
#pragma once

#include "cuda/stage.cuh"

namespace fnac::cuda {

constexpr int kTile = 64;

template <class Type>
struct TensorTile {
    static constexpr int kRows = 8, kColumns = 16, kLanes = 4;
    float sums[4][8][4];  // 16 x 8 blocks in the layout of multiply()

    FNAC_DEVICE static int row(int lane, int i) { return i / 2 * 16 + i % 2 * 8 + lane / 4; }
    FNAC_DEVICE static int column(int lane, int j) { return j / 2 * 8 + lane % 4 * 2 + j % 2; }
    FNAC_DEVICE float at(int i, int j) const { return sums[i / 2][j / 2][i % 2 * 2 + j % 2]; }

    FNAC_DEVICE void clear() {
#pragma unroll
        for (auto& block_row : sums)
#pragma unroll
            for (auto& block : block_row)
#pragma unroll
                for (float& sum : block) sum = 0.f;
    }

    // Adds the products of half of a stage. Of the columns only the first `columns` are wanted.
    FNAC_DEVICE void add(char* rows, char* cells, int half, int columns, int lane) {
        const int first = half * 2;  // of the half's chunks
        uint32_t a[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            load_matrices(a[i], chunk_of(rows, i * 16 + lane % 16, first + lane / 16));
#pragma unroll
            for (uint32_t& word : a[i]) word = operand<Type>(word);
        }
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            if (pair * 16 >= columns) break;
            uint32_t b[4];
            load_matrices(b, chunk_of(cells, pair * 16 + lane / 16 * 8 + lane % 8, first + lane / 8 % 2));
#pragma unroll
            for (uint32_t& word : b) word = operand<Type>(word);
#pragma unroll
            for (int i = 0; i < 4; ++i) multiply(Type{}, sums[i][2 * pair], a[i], b[0], b[1]);
            if (pair * 16 + 8 >= columns) break;
#pragma unroll
            for (int i = 0; i < 4; ++i) multiply(Type{}, sums[i][2 * pair + 1], a[i], b[2], b[3]);
        }
    }
};

struct PlainTile {
    static constexpr int kRows = 16, kColumns = 8, kLanes = 8;
    float sums[kRows][kColumns];

    FNAC_DEVICE static int row(int lane, int i) { return i * 4 + lane / 8; }
    FNAC_DEVICE static int column(int lane, int j) { return j * 8 + lane % 8; }
    FNAC_DEVICE float at(int i, int j) const { return sums[i][j]; }

    FNAC_DEVICE void clear() {
#pragma unroll
        for (auto& row : sums)
#pragma unroll
            for (float& sum : row) sum = 0.f;
    }

    FNAC_DEVICE void add(char* rows, char* cells, int half, int columns, int lane) {
#pragma unroll 1
        for (int chunk = 2 * half; chunk < 2 * half + 2; ++chunk) {
            Float4 b[kColumns];
#pragma unroll
            for (int j = 0; j < kColumns; ++j)
                if (j * 8 < columns)
                    b[j] = *reinterpret_cast<const Float4*>(chunk_of(cells, column(lane, j), chunk));
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                const Float4 a = *reinterpret_cast<const Float4*>(chunk_of(rows, row(lane, i), chunk));
#pragma unroll
                for (int j = 0; j < kColumns; ++j) {
                    if (j * 8 >= columns) break;
                    float& sum = sums[i][j];
                    sum = multiply_add(a.x, b[j].x, sum);
                    sum = multiply_add(a.y, b[j].y, sum);
                    sum = multiply_add(a.z, b[j].z, sum);
                    sum = multiply_add(a.w, b[j].w, sum);
                }
            }
        }
    }
};

}  // namespace fnac::cuda
