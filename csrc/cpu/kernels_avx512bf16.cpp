// AVX512_BF16, on processors that have AVX512_VNNI too: its kernels, but where bfloat16 products suffice, two
// of which it adds to a float32 lane in one instruction. Preferred where that is faster: see dispatch.cpp.
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

// Float32-exact logits go through integers: at the same rate, and of these cells fewer are multiplied again.
void max_logits(const MaxLogits& job) {
    if (!job.bf16_products) return avx512vnni_kernels().max_logits(job);
    max_logits_screened<Avx512, Bf16Products>(job, avx512_kernels().max_logits);
}

}  // namespace

const Kernels& avx512bf16_kernels() {
    static const Kernels table = [] {
        Kernels kernels = avx512vnni_kernels();
        kernels.name = "avx512bf16";
        kernels.max_logits = max_logits;
        return kernels;
    }();
    return table;
}

}  // namespace fnac
