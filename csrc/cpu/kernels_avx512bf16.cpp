// AVX512_BF16: the AVX-512 kernels with max-pooled logits through its bfloat16 products, two of which it adds
// to a float32 lane in one instruction. Preferred to AVX-512 alone where that is faster: see dispatch.cpp.
#include "cpu/bfloat16_impl.h"
#include "cpu/pairs_impl.h"

namespace fnac {
namespace {

struct Bf16Lanes {
    static constexpr int kLanes = 16, kRows = 8;
    using Sum = __m512;
    using Pairs = __m512bh;

    static Sum zero() { return _mm512_setzero_ps(); }
    static Pairs load(const uint16_t* from) { return as_pairs(_mm512_loadu_si512(from)); }
    static Pairs broadcast(int32_t two) { return as_pairs(_mm512_set1_epi32(two)); }
    static void add_products(Sum& a, Sum& b, Pairs cell, Pairs for_a, Pairs for_b) {
        a = _mm512_dpbf16_ps(a, cell, for_a);
        b = _mm512_dpbf16_ps(b, cell, for_b);
    }
    static void store(float* to, Sum sum) { _mm512_storeu_ps(to, sum); }

  private:
    static Pairs as_pairs(__m512i bits) { return reinterpret_cast<const __m512bh&>(bits); }
};

struct Bf16Products : BFloat16Values {
    static constexpr int64_t kTileRows = Bf16Lanes::kRows;

    static void multiply(const uint16_t* cells, const uint16_t* panel, int64_t depth, int64_t rows,
                         float* out) {
        multiply_pairs<Bf16Lanes>(cells, panel, depth, rows, out);
    }
};

}  // namespace

const Kernels& avx512bf16_kernels() {
    static const Kernels table = screened<Avx512, Bf16Products, avx512_kernels>("avx512bf16");
    return table;
}

}  // namespace fnac
