// What the forward pass of the whole loss leaves to its backward pass, in one block: a tensor for each piece
// of it would take longer than the kernels of a small batch.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace fnac {

struct LossState {
    float* logits;      // (n, n)
    uint16_t* argmax;   // (n, n)
    uint8_t* mask;      // (n, p); null without `pooled`, as are the two that follow
    float* avg;         // (n, c)
    float* foreground;  // (n, c)
    float* col_lse;     // (n)
    float* row_stats;   // (n, kRowStats)
    float* kept;        // the rest of the block
    int64_t kept_size;

    // Pieces of a block of `size` floats, which backends/cpu.py computes. Each begins at a line of the cache.
    LossState(float* block, int64_t size, const FeatureMap& img, bool pooled) {
        const int64_t pairs = img.n * img.n, features = pooled ? img.n * img.c : 0;
        const int64_t cells = pooled ? img.n * img.p : 0;
        float* next = block;
        const auto take = [&next](int64_t floats) {
            float* const piece = floats == 0 ? nullptr : next;
            next += (floats + 15) / 16 * 16;
            return piece;
        };
        logits = take(pairs);
        argmax = reinterpret_cast<uint16_t*>(take((pairs + 1) / 2));
        mask = reinterpret_cast<uint8_t*>(take((cells + 3) / 4));
        avg = take(features);
        foreground = take(features);
        col_lse = take(img.n);
        row_stats = take(img.n * kRowStats);
        kept = next;
        kept_size = size - (next - block);
        if (kept_size < 0)
            throw std::invalid_argument("the state has " + std::to_string(size) + " floats, " +
                                        std::to_string(-kept_size) + " too few");
    }
};

}  // namespace fnac
