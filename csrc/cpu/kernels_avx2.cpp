// AVX2 + FMA: 8 lanes, 16 registers. Compiled with -mavx2 -mfma; entered only where the processor has them.
#include <immintrin.h>

#include <cstdint>

namespace fnac {
namespace {

struct Avx2 {
    static constexpr const char* kName = "avx2";
    static constexpr int kLanes = 8;
    static constexpr int kMaxCells = 6;  // 2 x 6 accumulators, 2 panel vectors, 1 broadcast
    using F = __m256;

    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
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
};

}  // namespace
}  // namespace fnac

#include "cpu/kernels_impl.h"

namespace fnac {
const Kernels& avx2_kernels() { return kernels_of<Avx2>(); }
}  // namespace fnac
