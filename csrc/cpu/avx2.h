// The AVX2 + FMA + F16C traits: 8 lanes, 16 registers. For translation units compiled with -mavx2 -mfma
// -mf16c.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/dtypes.h"

namespace fnac {
namespace {

struct Avx2 {
    static constexpr const char* kName = "avx2";
    static constexpr int kLanes = 8;
    static constexpr int kMaxCells = 6;                // 2 x 6 accumulators, 2 panel vectors, 1 broadcast
    static constexpr int64_t kCellBytes = 320 * 1024;  // float32 cells that stay in L2 while panels pass by
    using F = __m256;

    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    // Past the caches, to half a line of memory; what follows `streamed` sees it.
    static void stream(float* p, F x) { _mm256_stream_ps(p, x); }
    static void streamed() { _mm_sfence(); }
    static F load(const BFloat16* p) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static F load(const Float16* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static void store(BFloat16* p, F x) {  // to nearest, ties to even
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        const __m256i words =
            _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
    }
    static void store(Float16* p, F x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
    // The first n elements (all where n >= kLanes), 0 beyond.
    static F load_n(const float* p, int64_t n) {
        return n >= kLanes ? load(p) : _mm256_maskload_ps(p, first(n));
    }
    template <class T>
    static F load_n(const T* p, int64_t n) {
        if (n >= kLanes) return load(p);
        T part[kLanes] = {};
        std::memcpy(part, p, sizeof(T) * n);
        return load(part);
    }
    static void store_n(float* p, F x, int64_t n) {
        if (n >= kLanes) return store(p, x);
        _mm256_maskstore_ps(p, first(n), x);
    }
    template <class T>
    static void store_n(T* p, F x, int64_t n) {
        if (n >= kLanes) return store(p, x);
        T part[kLanes];
        store(part, x);
        std::memcpy(p, part, sizeof(T) * n);
    }
    // Four rows by four columns in each half of the vectors.
    static void transpose_parts(const F* rows, F* columns) {
        const F a = _mm256_unpacklo_ps(rows[0], rows[1]), b = _mm256_unpackhi_ps(rows[0], rows[1]),
                c = _mm256_unpacklo_ps(rows[2], rows[3]), d = _mm256_unpackhi_ps(rows[2], rows[3]);
        columns[0] = _mm256_shuffle_ps(a, c, 0x44);
        columns[1] = _mm256_shuffle_ps(a, c, 0xee);
        columns[2] = _mm256_shuffle_ps(b, d, 0x44);
        columns[3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    static void transpose(F (&x)[8]) {
        F t[8];
        for (int i = 0; i < 8; i += 4) transpose_parts(x + i, t + i);
        for (int j = 0; j < 4; ++j) {
            x[j] = _mm256_permute2f128_ps(t[j], t[4 + j], 0x20);
            x[4 + j] = _mm256_permute2f128_ps(t[j], t[4 + j], 0x31);
        }
    }
    // Rows four apart are loaded side by side, half a vector each, instead of being exchanged afterwards.
    static void load_transposed(const float* from, int64_t stride, F (&x)[8]) {
        for (int j = 0; j < 8; j += 4) {
            F rows[4];
            for (int i = 0; i < 4; ++i)
                rows[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + i * stride + j)),
                                               _mm_loadu_ps(from + (4 + i) * stride + j), 1);
            transpose_parts(rows, x + j);
        }
    }
    static F set(float x) { return _mm256_set1_ps(x); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F sign(F x) {
        const F zero = _mm256_setzero_ps();
        const F up = _mm256_and_ps(_mm256_cmp_ps(x, zero, _CMP_GT_OQ), set(1.f));
        const F down = _mm256_and_ps(_mm256_cmp_ps(x, zero, _CMP_LT_OQ), set(-1.f));
        return _mm256_blendv_ps(_mm256_or_ps(up, down), x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    }
    static F abs(F x) { return _mm256_andnot_ps(set(-0.f), x); }
    static float sum(F x) {
        const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)));
    }
    static void update_max(F value, int32_t cell, float* best, int32_t* index) {
        const F old = load(best);
        const F win =
            _mm256_and_ps(_mm256_cmp_ps(value, old, _CMP_NLE_UQ), _mm256_cmp_ps(old, old, _CMP_ORD_Q));
        store(best, _mm256_blendv_ps(old, value, win));
        float* at = reinterpret_cast<float*>(index);
        store(at, _mm256_blendv_ps(load(at), _mm256_castsi256_ps(_mm256_set1_epi32(cell)), win));
    }
    static F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F exp2_scale(F x, F n) {
        const __m256i bits =
            _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
        return mul(x, _mm256_castsi256_ps(bits));
    }
    static F zero_below(F x, F limit, F value) {
        return _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), value);
    }

    // For screening: bits, a mask for each lane, and 16-bit integers.
    using Bits = __m256i;
    static Bits all_bits(int32_t x) { return _mm256_set1_epi32(x); }
    static Bits twice(Bits x) { return _mm256_add_epi32(x, x); }
    static Bits set_where_at_least(F value, F floor, Bits bit, Bits bits) {
        const __m256i wins = _mm256_castps_si256(_mm256_cmp_ps(value, floor, _CMP_GE_OQ));
        return _mm256_or_si256(bits, _mm256_and_si256(wins, bit));
    }
    static void store(uint32_t* p, Bits bits) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits); }
    static F bits_or(F a, F b) { return _mm256_or_ps(a, b); }
    static bool all_zero(F bits) {  // of either sign
        return _mm256_testz_si256(_mm256_castps_si256(bits), all_bits(0x7fffffff));
    }
    // The sums of four, each added up in the same order.
    static void sums(const F (&x)[4], float* out) {
        const F front = add(_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1]));
        const F back = add(_mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3]));
        const __m256d low = _mm256_castps_pd(front), high = _mm256_castps_pd(back);
        const F all = add(_mm256_castpd_ps(_mm256_unpacklo_pd(low, high)),
                          _mm256_castpd_ps(_mm256_unpackhi_pd(low, high)));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
    }
    // Whole numbers as 16 integers of 16 bits.
    static F to_int16(F low, F high) {
        const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(low), _mm256_cvtps_epi32(high));
        return _mm256_castsi256_ps(_mm256_permute4x64_epi64(packed, 0xd8));
    }

  private:
    // A mask of the first n < kLanes lanes.
    static __m256i first(int64_t n) {
        static constexpr int32_t kMasks[2 * kLanes] = {-1, -1, -1, -1, -1, -1, -1, -1};
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMasks + kLanes - n));
    }
};

}  // namespace
}  // namespace fnac
