// Exact float32 matrix products, up to three of one size at a time.
#pragma once

#include "cuda/launch.cuh"

namespace fnac::cuda {

struct Product {
    const float* left;   // (rows, depth)
    const float* right;  // see Products
    float* out;          // (rows, columns)
};

// out = left right' * scale with right (columns, depth), or left right * scale with right (depth, columns).
// The depth may be cut into parts, whose sums lie `part_stride` apart and are for the reader to add: blocks
// for a machine that a small product would leave idle. Every element is summed in the order of the depth, so
// that x x' is symmetric to the last bit.
struct Products {
    Product each[3];
    int count;
    int64_t rows, columns, depth;
    bool transposed;  // right is (columns, depth)
    float scale;
    int parts = 1;
    int64_t part_stride = 0;
};

void multiply(const Products& job, const Launch& where);

}  // namespace fnac::cuda
