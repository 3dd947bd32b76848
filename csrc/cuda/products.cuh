// Matrix products for the adjacency terms, up to three of one size at a time: exact in float32, and of sounds
// of 16 bits on the tensor cores, which multiply those exactly.
#pragma once

#include "cuda/launch.cuh"

namespace fnac::cuda {

// A product is of tiles of 64 x 64 or, where those are enough to fill a machine, of 128 x 128.
constexpr int64_t kSmallTile = 64, kLargeTile = 128;
#ifdef FNAC_CUDA_EMULATION
constexpr int64_t kManyGramTiles = 6, kManyProductTiles = 6;  // so that small products test large tiles
#else
constexpr int64_t kManyGramTiles = 96, kManyProductTiles = 150;
#endif
// Channels are cut into parts at multiples of this.
constexpr int64_t kPartStep = 32;

// Rows row0.. of the symmetric x x' * scale. Panels begin at multiples of the large tile. An element and its
// mirror image are made at once where both are in the panel, and else by the same sums: symmetric to the last
// bit, whatever the panels. The depth may be cut into `parts`, whose sums lie `part_stride` apart and are for
// the reader to add: blocks for a machine that a small product would leave idle.
struct Gram {
    const void* features;  // (n, depth)
    float* out;            // (rows, n)
};
struct Grams {
    Gram each[3];
    int count;
    Dtype last;  // of the last one's features; the others' are float32
    int64_t row0, rows, n, depth;
    float scale;
    int64_t tile, parts, part_stride;
};

// out = left right * scale. The last right matrix may be there in bfloat16 too, `narrow`.
struct Product {
    const float* left;   // (rows, depth)
    const float* right;  // (depth, columns)
    float* out;          // (rows, columns)
};
struct Products {
    Product each[3];
    int count;
    int64_t rows, columns, depth;
    float scale;
    const BFloat16* narrow = nullptr;
};

void multiply(const Grams& job, const Launch& where);
void multiply(const Products& job, const Launch& where);

}  // namespace fnac::cuda
