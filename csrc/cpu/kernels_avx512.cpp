// AVX-512: 16 lanes, 32 registers. Compiled with -mavx512{f,bw,vl,dq}; entered only where the processor has
// them.
#include <immintrin.h>

#include <cstdint>

namespace fnac {
namespace {

struct Avx512 {
    static constexpr const char* kName = "avx512";
    static constexpr int kLanes = 16;
    static constexpr int kMaxCells = 14;  // 2 x 14 accumulators, 2 panel vectors, 1 broadcast
    using F = __m512;

    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
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
};

}  // namespace
}  // namespace fnac

#include "cpu/kernels_impl.h"

namespace fnac {
const Kernels& avx512_kernels() { return kernels_of<Avx512>(); }
}  // namespace fnac
