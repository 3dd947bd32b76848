// AVX512_VNNI: the AVX-512 kernels with max-pooled logits through int16 products, which it adds up at twice
// the rate of float32 multiply-adds. Entered only where the processor has it.
#include "cpu/avx512.h"
#include "cpu/int16_impl.h"

namespace fnac {
namespace {

struct Int16Avx512 {
    static constexpr int kLanes = 16, kRows = 8;
    // Of __m512i, which is 8 x 64 bits, GCC keeps two copies in the loop.
    using Sum [[gnu::vector_size(64)]] = int32_t;
    using Pairs = __m512i;

    static Sum zero() { return Sum{}; }
    static Pairs load(const uint16_t* from) { return _mm512_loadu_si512(from); }
    static Pairs broadcast(int32_t two) { return _mm512_set1_epi32(two); }
    static void add_products(Sum& a, Sum& b, Pairs cell, Pairs for_a, Pairs for_b) {
        a = reinterpret_cast<Sum>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(a), cell, for_a));
        b = reinterpret_cast<Sum>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(b), cell, for_b));
    }
    static void store(float* to, Sum sum) {
        _mm512_storeu_ps(to, _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(sum)));
    }
};

}  // namespace

const Kernels& avx512vnni_kernels() {
    using Products = Int16Products<Avx512, Int16Avx512>;
    static const Kernels table = screened<Avx512, Products, avx512_kernels>("avx512vnni");
    return table;
}

}  // namespace fnac
