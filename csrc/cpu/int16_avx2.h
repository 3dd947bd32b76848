// Sums of int16 products, 8 lanes: with AVX-VNNI one instruction, else two.
#pragma once

#include "cpu/avx2.h"
#include "cpu/int16_impl.h"

namespace fnac {
namespace {

struct Int16Avx2 {
    static constexpr int kLanes = 8, kRows = 4;
    // Of __m256i, which is 4 x 64 bits, GCC keeps two copies in the loop.
    using Sum [[gnu::vector_size(32)]] = int32_t;
    using Pairs = __m256i;

    static Sum zero() { return Sum{}; }
    static Pairs load(const uint16_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
    static Pairs broadcast(int32_t two) { return _mm256_set1_epi32(two); }
    static Sum add_product(Sum sum, Pairs a, Pairs b) {
#if defined(__AVXVNNI__)
        return reinterpret_cast<Sum>(_mm256_dpwssd_avx_epi32(reinterpret_cast<__m256i>(sum), a, b));
#else
        // As intrinsics GCC makes all products of a step before it adds any, and spills them.
        Sum product;
        asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "x"(b));
        return sum;
#endif
    }
    static void store(float* to, Sum sum) {
        _mm256_storeu_ps(to, _mm256_cvtepi32_ps(reinterpret_cast<__m256i>(sum)));
    }
};

}  // namespace
}  // namespace fnac
