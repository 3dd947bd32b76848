// The AVX-512 traits: 16 lanes, 32 registers. For translation units compiled with -mavx512{f,bw,vl,dq}.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/dtypes.h"

namespace fnac {
namespace {

struct Avx512 {
    static constexpr const char* kName = "avx512";
    static constexpr int kLanes = 16;
    static constexpr int kMaxCells = 14;               // 2 x 14 accumulators, 2 panel vectors, 1 broadcast
    static constexpr int64_t kCellBytes = 832 * 1024;  // float32 cells that stay in L2 while panels pass by
    using F = __m512;

    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    // Past the caches, to a whole line of memory; what follows `streamed` sees it.
    static void stream(float* p, F x) { _mm512_stream_ps(p, x); }
    static void streamed() { _mm_sfence(); }
    // The first n elements (all where n >= kLanes), 0 beyond.
    static F load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
    static F load_n(const BFloat16* p, int64_t n) {
        const __m256i bits = _mm256_maskz_loadu_epi16(first(n), p);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static F load_n(const Float16* p, int64_t n) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
    }
    static void store_n(float* p, F x, int64_t n) { _mm512_mask_storeu_ps(p, first(n), x); }
    static void store_n(BFloat16* p, F x, int64_t n) {  // to nearest, ties to even
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                                        _mm512_set1_epi32(0x7fc00000));
        _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    }
    static void store_n(Float16* p, F x, int64_t n) {
        _mm256_mask_storeu_epi16(p, first(n),
                                 _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }
    // Four rows by four columns in each quarter of the vectors, in place if need be.
    static void transpose_parts(const F* rows, F* columns) {
        const F a = _mm512_unpacklo_ps(rows[0], rows[1]), b = _mm512_unpackhi_ps(rows[0], rows[1]),
                c = _mm512_unpacklo_ps(rows[2], rows[3]), d = _mm512_unpackhi_ps(rows[2], rows[3]);
        columns[0] = unpack_low(a, c);
        columns[1] = unpack_high(a, c);
        columns[2] = unpack_low(b, d);
        columns[3] = unpack_high(b, d);
    }
    static void transpose(F (&x)[16]) {
        F t[16];
        // Then x[4g + j] holds column 4L + j of rows 4g .. 4g + 3 in its quarter L.
#pragma GCC unroll 4
        for (int i = 0; i < 16; i += 4) transpose_parts(x + i, x + i);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const F even = _mm512_shuffle_f32x4(x[j], x[4 + j], 0x88),
                    odd = _mm512_shuffle_f32x4(x[j], x[4 + j], 0xdd);
            const F more_even = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0x88),
                    more_odd = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0xdd);
            t[j] = _mm512_shuffle_f32x4(even, more_even, 0x88);
            t[8 + j] = _mm512_shuffle_f32x4(even, more_even, 0xdd);
            t[4 + j] = _mm512_shuffle_f32x4(odd, more_odd, 0x88);
            t[12 + j] = _mm512_shuffle_f32x4(odd, more_odd, 0xdd);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) x[i] = t[i];
    }
    // Rows four apart are loaded side by side, a quarter of a vector each, which takes loads instead of half
    // of the shuffles; each quarter is then transposed in itself.
    static void load_transposed(const float* from, int64_t stride, F (&x)[16]) {
#pragma GCC unroll 4
        for (int j = 0; j < 16; j += 4) {
            F rows[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const auto quarter = [&](int64_t row) { return _mm_loadu_ps(from + row * stride + j); };
                rows[i] = _mm512_castps128_ps512(quarter(i));
                rows[i] = _mm512_insertf32x4(rows[i], quarter(4 + i), 1);
                rows[i] = _mm512_insertf32x4(rows[i], quarter(8 + i), 2);
                rows[i] = _mm512_insertf32x4(rows[i], quarter(12 + i), 3);
            }
            transpose_parts(rows, x + j);
        }
    }
    static F unpack_low(F a, F b) {
        return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    }
    static F unpack_high(F a, F b) {
        return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    }
    static F set(float x) { return _mm512_set1_ps(x); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F sign(F x) {
        const F zero = _mm512_setzero_ps();
        F s = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, zero, _CMP_GT_OQ), zero, set(1.f));
        s = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, zero, _CMP_LT_OQ), s, set(-1.f));
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), s, x);
    }
    static F abs(F x) { return _mm512_abs_ps(x); }
    static float sum(F x) { return _mm512_reduce_add_ps(x); }

    // best and index take the new value where it is larger, or where it is the first NaN.
    static void update_max(F value, int32_t cell, float* best, int32_t* index) {
        const F old = load(best);
        const __mmask16 win =
            _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(old, old, _CMP_ORD_Q), value, old, _CMP_NLE_UQ);
        _mm512_mask_storeu_ps(best, win, value);
        _mm512_mask_storeu_epi32(index, win, _mm512_set1_epi32(cell));
    }
    static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F exp2_scale(F x, F n) { return _mm512_scalef_ps(x, n); }
    static F zero_below(F x, F limit, F value) {
        return _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ), _mm512_setzero_ps());
    }

    // For screening: bits, a mask for each lane, and 16-bit integers.
    using Bits = __m512i;
    static Bits all_bits(int32_t x) { return _mm512_set1_epi32(x); }
    static Bits twice(Bits x) { return _mm512_add_epi32(x, x); }
    static Bits set_where_at_least(F value, F floor, Bits bit, Bits bits) {
        return _mm512_mask_or_epi32(bits, _mm512_cmp_ps_mask(value, floor, _CMP_GE_OQ), bits, bit);
    }
    static void store(uint32_t* p, Bits bits) { _mm512_storeu_si512(p, bits); }
    static F bits_or(F a, F b) { return _mm512_or_ps(a, b); }
    static bool all_zero(F bits) {  // of either sign
        return _mm512_test_epi32_mask(_mm512_castps_si512(bits), all_bits(0x7fffffff)) == 0;
    }
    // The sums of four, each added up in the same order.
    static void sums(const F (&x)[4], float* out) {
        const F front = add(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
        const F back = add(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
        const F all = add(unpack_low(front, back), unpack_high(front, back));
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    }
    // Whole numbers as 32 integers of 16 bits.
    static F to_int16(F low, F high) {
        const __m256i first = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(low)),
                      second = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(high));
        return _mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
    }
};

}  // namespace
}  // namespace fnac
