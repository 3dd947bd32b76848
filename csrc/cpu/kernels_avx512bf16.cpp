// AVX512_BF16: the AVX-512 kernels with max-pooled logits through its bfloat16 products, two of which it adds
// to a float32 lane in one instruction. Preferred to AVX-512 alone where that is faster: see dispatch.cpp.
#include "cpu/screen_impl.h"

namespace fnac {
namespace {

struct Bf16Products {
    static void multiply(const uint16_t* cells, const uint16_t* panel, int64_t depth, bool pair, float* out) {
        const int64_t rows = pair ? 2 * kTileRows : kTileRows;
        for (int64_t r = 0; r < rows; r += kRows) {
            const uint16_t* from = cells + (r / kTileRows * depth * kTileRows + r % kTileRows) * kTileDepth;
            multiply_rows(from, panel, depth, out + r * kWidth);
        }
    }

  private:
    static constexpr int kRows = 8;  // times two vectors of sounds: 16 sums hide the latency

    static void multiply_rows(const uint16_t* cells, const uint16_t* panel, int64_t depth, float* out) {
        __m512 sums[kRows][2];
        for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
        for (int64_t k = 0; k < depth; ++k) {
            const uint16_t* tile = cells + k * kTileSize;
            const uint16_t* sounds = panel + k * 2 * kTileSize;
            for (int64_t i = 0; i < kTileDepth / 2; ++i) {
                const __m512bh low = load(sounds + i * kTileDepth),
                               high = load(sounds + kTileSize + i * kTileDepth);
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r) {
                    int32_t two;
                    std::memcpy(&two, tile + r * kTileDepth + 2 * i, sizeof(two));
                    const __m512i both = _mm512_set1_epi32(two);
                    const __m512bh cell = reinterpret_cast<const __m512bh&>(both);
                    sums[r][0] = _mm512_dpbf16_ps(sums[r][0], cell, low);
                    sums[r][1] = _mm512_dpbf16_ps(sums[r][1], cell, high);
                }
            }
        }
        for (int r = 0; r < kRows; ++r) {
            V::store(out + r * kWidth, sums[r][0]);
            V::store(out + r * kWidth + V::kLanes, sums[r][1]);
        }
    }
    static __m512bh load(const uint16_t* from) {
        const __m512i bits = _mm512_loadu_si512(from);
        return reinterpret_cast<const __m512bh&>(bits);
    }
};

}  // namespace

const Kernels& avx512bf16_kernels() {
    static const Kernels table = [] {
        Kernels kernels = avx512_kernels();
        kernels.name = "avx512bf16";
        kernels.max_logits = max_logits_screened<Bf16Products>;
        return kernels;
    }();
    return table;
}

}  // namespace fnac
