// Features as 16-bit integers in units of a scale, whose products are summed up exactly in int32: for
// processors that make these at a higher rate than float32 multiply-adds. Over the traits V, and Lanes for
// multiply_pairs.
//
// The scale of an image's cells, or of a sound, is its largest norm / kLargestNorm: values are then at most
// that, in absolute value, and so is a vector's norm, but for the rounding to integers, which adds
// sqrt(C) / 2. By Cauchy-Schwarz no sum of any of two vectors' products exceeds
// (kLargestNorm + sqrt(C) / 2)^2 < 2^31.
#pragma once

#include "cpu/pairs_impl.h"

namespace fnac {
namespace {

template <class V, class Lanes>
struct Int16Products {
    static constexpr int64_t kTileRows = Lanes::kRows;
    static constexpr bool kScaled = true;
    static constexpr bool kRounds = false;       // products that must be screened and refined like any
    static constexpr int64_t kFewestCells = 20;  // of fewer, refining and packing cost what the products gain
    static constexpr float kLargestNorm = 32000;

    static float scale(const float* rows, int64_t c, int64_t count, int64_t stride) {
        float largest = 0;
        for (int64_t p = 0; p < count; ++p) {
            typename V::F even = V::set(0.f), odd = even, low, high;
            for (int64_t k = 0; k < c; k += 2 * V::kLanes) {
                load_two<V>(rows + p * stride + k, c - k, low, high);
                even = V::fma(low, low, even);
                odd = V::fma(high, high, odd);
            }
            const float sum = V::sum(V::add(even, odd));
            largest = sum > largest ? sum : largest;
        }
        return largest > 0 ? std::sqrt(largest) / kLargestNorm : 1;
    }

    static typename V::F narrow(const float* from, int64_t count, float scale, Sums<V>& sums) {
        typename V::F low, high;
        load_two<V>(from, count, low, high);
        const typename V::F units = V::set(1 / scale), back = V::set(-scale);
        const typename V::F low_units = V::round(V::mul(low, units)),
                            high_units = V::round(V::mul(high, units));
        sums.add(low, high, V::fma(low_units, back, low), V::fma(high_units, back, high));
        return V::to_int16(low_units, high_units);
    }

    static void multiply(const uint16_t* cells, const uint16_t* panel, int64_t depth, int64_t rows,
                         float* out) {
        multiply_pairs<Lanes>(cells, panel, depth, rows, out);
    }
};

}  // namespace
}  // namespace fnac
