// Features rounded to bfloat16, for translation units with AVX-512 and AVX512_BF16: a base of Products types.
#pragma once

#include "cpu/avx512.h"
#include "cpu/screen_impl.h"

namespace fnac {
namespace {

struct BFloat16Values {
    using V = Avx512;
    static constexpr bool kScaled = false;
    static constexpr bool kRounds = true;       // the products alone suffice where bfloat16 products do
    static constexpr int64_t kFewestCells = 2;  // of one there is nothing to screen

    static float scale(const float*, int64_t, int64_t, int64_t) { return 1; }

    // The 32 (or fewer: 0 beyond) values at `from`.
    static __m512 narrow(const float* from, int64_t count, float, Sums<V>& sums) {
        __m512 low, high;
        load_two<V>(from, count, low, high);
        const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
        const auto widen = [](__m256i half) {
            return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        };
        const __m512i halves = reinterpret_cast<const __m512i&>(rounded);
        sums.add(low, high, low - widen(_mm512_castsi512_si256(halves)),
                 high - widen(_mm512_extracti64x4_epi64(halves, 1)));
        return reinterpret_cast<const __m512&>(rounded);
    }

    // Largest product and its first cell, of an image's `count` cells from cell `begin` on.
    static void keep_largest(const float* products, int64_t stride, int64_t begin, int64_t count,
                             int64_t columns, float* largest, uint16_t* argmax) {
        const __mmask16 lanes = V::first(columns);
        __m512 best = begin ? V::load_n(largest, columns) : V::load(products);
        __m512i index =
            begin ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, argmax)) : _mm512_setzero_si512();
        for (int64_t p = 0; p < count; ++p) {
            const __m512 value = V::load(products + p * stride);
            const __mmask16 win = _mm512_cmp_ps_mask(value, best, _CMP_GT_OQ);
            best = _mm512_mask_mov_ps(best, win, value);
            index = _mm512_mask_mov_epi32(index, win, _mm512_set1_epi32(static_cast<int>(begin + p)));
        }
        V::store_n(largest, best, columns);
        _mm256_mask_storeu_epi16(argmax, lanes, _mm512_cvtepi32_epi16(index));
    }
};

}  // namespace
}  // namespace fnac
