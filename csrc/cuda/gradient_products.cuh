// What the two gradients on Hopper share: one-hot weights times features. A block owns 128 rows by 256
// channels; the depth passes in stages of 64. A warpgroup fills the stages: the copy engine brings the
// features, its threads leave the pairs (where the weight is and how much) from which two warpgroups make
// their weights in registers.
#pragma once

#include "cuda/hopper.cuh"

namespace fnac::cuda {

struct GradientTile {
    static constexpr int kRows = 2 * kGroupRows;
    static constexpr int kChannels = 256;
    static constexpr int kDepth = 64;  // of a stage
    static constexpr int kStages = 4;
    static constexpr int kThreads = 3 * kGroupSize;
    static constexpr int kWarps = 2 * kGroupSize / kWarpSize;  // that multiply
    static constexpr int kBoxBytes = kDepth * kBoxRowBytes;
    static constexpr int kStageBytes = kChannels / kBoxColumns * kBoxBytes;
    static constexpr int kProducts = kChannels / 2;
};

struct GradientBarriers {
    Barrier full[GradientTile::kStages], empty[GradientTile::kStages];

    FNAC_DEVICE void start() {
        if (thread_index() == 0) {
            for (int i = 0; i < GradientTile::kStages; ++i) {
                barrier_init(full[i], kGroupSize);
                barrier_init(empty[i], GradientTile::kWarps);
            }
            barriers_are_ready();
        }
        block_barrier();
    }
};

// Shared memory: the features' stages, the pairs' stages, the barriers.
template <int kPairBytes>
struct GradientMemory {
    static constexpr int kBytes = GradientTile::kStages * (GradientTile::kStageBytes + kPairBytes) +
                                  static_cast<int>(sizeof(GradientBarriers));
    static_assert(kPairBytes % 16 == 0);
    FNAC_DEVICE static char* features(int stage) {
        return shared_memory() + stage * GradientTile::kStageBytes;
    }
    FNAC_DEVICE static char* pairs(int stage) { return features(GradientTile::kStages) + stage * kPairBytes; }
    FNAC_DEVICE static GradientBarriers& barriers() {
        return *reinterpret_cast<GradientBarriers*>(pairs(GradientTile::kStages));
    }
};

// Fills a stage with features: rows row.. of the matrix, channels c0...
FNAC_DEVICE void copy_stage(char* to, const Matrix& features, int c0, int64_t row, Barrier& barrier) {
    for (int box = 0; box < GradientTile::kChannels / kBoxColumns; ++box)
        copy_box(to + box * GradientTile::kBoxBytes, features, c0 + box * kBoxColumns, row, barrier);
}

// sums (+)= weights times a stage of features; `weights[step]` are those of 16 of its rows.
FNAC_DEVICE void multiply_stage(float (&sums)[GradientTile::kProducts], const uint32_t (&weights)[4][4],
                                const char* features, bool keep) {
    products_begin();
#pragma unroll
    for (int step = 0; step < 4; ++step)
        product(sums, weights[step],
                across_rows(features + step * 16 * kBoxRowBytes, GradientTile::kBoxBytes), keep || step > 0);
    products_end();
}

// Of a product's rows the lane has two: row(0) and row(1) of the block's.
FNAC_DEVICE int gradient_row(int half) {
    return thread_index() / kWarpSize * 16 + thread_index() % kWarpSize / 4 + half * 8;
}

}  // namespace fnac::cuda
