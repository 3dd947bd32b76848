// Sums over an image's cells: its mean and foreground feature in the forward pass, the gradient that reaches
// a sound through its map in the backward pass. See pool.cu.
#pragma once

#include "common/features.h"
#include "cuda/launch.cuh"

namespace fnac::cuda {

struct CellSums {
    FeatureMap img;
    const float* maps;  // (n, p): weights, or what the mask is made of
    bool as_mask;       // weight = minmax(maps) > threshold, otherwise weight = maps
    float threshold;    // of the mask
    float scale;        // of both sums
    uint8_t* mask;      // (n, p), or null
    float* all;         // (n, c): scale * sum_p img, or null
    float* weighted;    // (n, c): scale * sum_p weight * img
};

void sum_cells(const CellSums& job, const Launch& where);

}  // namespace fnac::cuda
