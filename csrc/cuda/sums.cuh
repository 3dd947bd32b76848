// Sums in a fixed order.
#pragma once

#include "cuda/primitives.cuh"

namespace fnac::cuda {

FNAC_DEVICE float warp_sum(float x) {
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

// The larger; a NaN wins.
FNAC_DEVICE float larger_or_nan(float x, float y) { return x > y || x != x ? x : y; }
FNAC_DEVICE float smaller_or_nan(float x, float y) { return x < y || x != x ? x : y; }

FNAC_DEVICE float warp_max(float x) {
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x = larger_or_nan(shuffle_xor(x, mask), x);
    return x;
}
FNAC_DEVICE float warp_min(float x) {
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x = smaller_or_nan(shuffle_xor(x, mask), x);
    return x;
}

}  // namespace fnac::cuda
