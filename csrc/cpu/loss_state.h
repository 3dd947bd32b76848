// What the forward pass of the whole loss leaves to its backward pass, in one block: a tensor for each piece
// of it would take longer than the kernels of a small batch.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace fnac {

// Addresses, as the binding passes them on.
struct LossState {
    uintptr_t logits;       // float (n, n)
    uintptr_t argmax;       // uint16_t (n, n)
    uintptr_t mask;         // uint8_t (n, p); 0 without `pooled`, as are the two that follow
    uintptr_t avg;          // float (n, c)
    uintptr_t foreground;   // float (n, c)
    uintptr_t col_lse;      // float (2, n)
    uintptr_t row_stats;    // float (n, stats_columns): the rest of the block
    int64_t stats_columns;  // kRowStats, and what is kept

    // Pieces of a block of `size` floats, which backends/cpu.py computes. Each begins at a line of the cache.
    LossState(uintptr_t block, int64_t size, const FeatureMap& img, bool pooled) {
        const int64_t pairs = img.n * img.n, features = pooled ? img.n * img.c : 0;
        const int64_t cells = pooled ? img.n * img.p : 0;
        int64_t used = 0;
        const auto take = [&](int64_t floats) {
            const uintptr_t piece = floats == 0 ? 0 : block + sizeof(float) * used;
            used += (floats + 15) / 16 * 16;
            return piece;
        };
        logits = take(pairs);
        argmax = take((pairs + 1) / 2);
        mask = take((cells + 3) / 4);
        avg = take(features);
        foreground = take(features);
        col_lse = take(2 * img.n);
        row_stats = block + sizeof(float) * used;
        stats_columns = (size - used) / img.n;
        if (size < used + img.n * kRowStats)
            throw std::invalid_argument("the state has " + std::to_string(size) + " floats, " +
                                        std::to_string(used + img.n * kRowStats - size) + " too few");
    }
};

}  // namespace fnac
