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
    static void add_products(Sum& a, Sum& b, Pairs cell, Pairs for_a, Pairs for_b) {
#if defined(__AVXVNNI__)
        a = reinterpret_cast<Sum>(_mm256_dpwssd_avx_epi32(reinterpret_cast<__m256i>(a), cell, for_a));
        b = reinterpret_cast<Sum>(_mm256_dpwssd_avx_epi32(reinterpret_cast<__m256i>(b), cell, for_b));
#else
        // As intrinsics GCC makes all products of a step before it adds any, and spills them; with a block of
        // assembly for each sum it copies sums, and operands that are no locals it leaves in memory.
        Sum x = a, y = b, product_x, product_y;
        asm("vpmaddwd %5, %4, %2\n\tvpmaddwd %6, %4, %3\n\tvpaddd %2, %0, %0\n\tvpaddd %3, %1, %1"
            : "+x"(x), "+x"(y), "=&x"(product_x), "=&x"(product_y)
            : "x"(cell), "x"(for_a), "x"(for_b));
        a = x;
        b = y;
#endif
    }
    static void store(float* to, Sum sum) {
        _mm256_storeu_ps(to, _mm256_cvtepi32_ps(reinterpret_cast<__m256i>(sum)));
    }
};

}  // namespace
}  // namespace fnac
