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
// Every element is summed in the order of the depth, so that x x' is symmetric to the last bit.
struct Products {
    Product each[3];
    int count;
    int64_t rows, columns, depth;
    bool transposed;  // right is (columns, depth)
    float scale;
};

void multiply(const Products& job, const Launch& where);

}  // namespace fnac::cuda
