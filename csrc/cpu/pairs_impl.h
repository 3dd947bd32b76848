// Products of 16-bit values in pairs of channels: a cell's pair, broadcast, times a vector of sounds' pairs,
// added to 32 bits a sound. Over a type Lanes with kLanes, kRows, the types Sum and Pairs, and zero, load,
// broadcast, add_products (of one cell and two vectors of sounds) and store.
#pragma once

#include "cpu/screen_impl.h"

namespace fnac {
namespace {

// What Products::multiply of screen_impl.h is to give, of tiles of kRows cells: what is read at a time then
// lies together.
template <class Lanes>
void multiply_pairs(const uint16_t* cells, const uint16_t* panel, int64_t depth, int64_t rows, float* out) {
    constexpr int64_t kLanes = Lanes::kLanes, kHalf = kTileDepth * kLanes;
    constexpr int kRows = Lanes::kRows;  // times two vectors of sounds: enough sums to hide the latency
    for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
        const uint16_t* from = cells + r0 * depth * kTileDepth;
        typename Lanes::Sum sums[kRows][2];
        for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = Lanes::zero();
        for (int64_t k = 0; k < depth; ++k) {
            const uint16_t* tile = from + k * kRows * kTileDepth;
            const uint16_t* sounds = panel + k * 2 * kHalf;
            for (int64_t i = 0; i < kTileDepth / 2; ++i) {
                const typename Lanes::Pairs low = Lanes::load(sounds + i * 2 * kLanes),
                                            high = Lanes::load(sounds + kHalf + i * 2 * kLanes);
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r) {
                    int32_t two;
                    std::memcpy(&two, tile + r * kTileDepth + 2 * i, sizeof(two));
                    Lanes::add_products(sums[r][0], sums[r][1], Lanes::broadcast(two), low, high);
                }
            }
        }
        for (int r = 0; r < kRows; ++r) {
            Lanes::store(out + (r0 + r) * 2 * kLanes, sums[r][0]);
            Lanes::store(out + (r0 + r) * 2 * kLanes + kLanes, sums[r][1]);
        }
    }
}

}  // namespace
}  // namespace fnac
