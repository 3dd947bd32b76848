// Portable: four lanes in plain loops that any compiler turns into the vectors of its baseline (SSE2, NEON).
#include <bit>
#include <cmath>
#include <cstdint>
#include <utility>

#include "cpu/dtypes.h"

namespace fnac {
namespace {

float widen(float x) { return x; }
float widen(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
float widen(Float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
    const uint32_t rest = x.bits & 0x7fff;
    if (rest >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // A denormal's bits at the bottom of 0.5 add its value: no float32 denormal, which might be flushed.
    const float magnitude = rest < 0x400 ? std::bit_cast<float>(0x3f000000 | rest) - 0.5f
                                         : std::bit_cast<float>(0x38000000 + (rest << 13));
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
}
void narrow(float x, float& out) { out = x; }
void narrow(float x, BFloat16& out) {  // to nearest, ties to even
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if (x != x) {
        out.bits = 0x7fc0;
    } else {
        out.bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}
void narrow(float x, Float16& out) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) {
        out.bits = sign | 0x7e00;
    } else if (magnitude >= 0x477ff000) {  // 65520 rounds to infinity
        out.bits = sign | 0x7c00;
    } else if (magnitude < 0x38800000) {  // denormal: adding 0.5 leaves the rounded bits at the bottom
        const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
        out.bits = sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(shifted) - 0x3f000000);
    } else {
        magnitude += 0xc8000fff + ((magnitude >> 13) & 1);
        out.bits = sign | static_cast<uint16_t>(magnitude >> 13);
    }
}

struct Portable {
    static constexpr const char* kName = "portable";
    static constexpr int kLanes = 4;
    static constexpr int kMaxCells = 4;
    struct F {
        float v[4];
    };

    template <class Op>
    static F map(Op op) {
        F r;
        for (int i = 0; i < 4; ++i) r.v[i] = op(i);
        return r;
    }
    static F load(const float* p) {
        return map([&](int i) { return p[i]; });
    }
    static void store(float* p, F x) {
        for (int i = 0; i < 4; ++i) p[i] = x.v[i];
    }
    // The first n elements (all where n >= kLanes), 0 beyond.
    template <class T>
    static F load_n(const T* p, int64_t n) {
        return map([&](int i) { return i < n ? widen(p[i]) : 0.f; });
    }
    template <class T>
    static void store_n(T* p, F x, int64_t n) {
        for (int i = 0; i < kLanes && i < n; ++i) narrow(x.v[i], p[i]);
    }
    static void transpose(F (&x)[4]) {
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < i; ++j) std::swap(x[i].v[j], x[j].v[i]);
    }
    static F set(float x) {
        return map([&](int) { return x; });
    }
    static F fma(F a, F b, F c) {
        return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
    }
    static void stream(float* p, F x) { store(p, x); }
    static void streamed() {}
    static F add(F a, F b) {
        return map([&](int i) { return a.v[i] + b.v[i]; });
    }
    static F sub(F a, F b) {
        return map([&](int i) { return a.v[i] - b.v[i]; });
    }
    static F mul(F a, F b) {
        return map([&](int i) { return a.v[i] * b.v[i]; });
    }
    static F max(F a, F b) {
        return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
    }
    static F sign(F x) {
        return map([&](int i) { return x.v[i] > 0 ? 1.f : x.v[i] < 0 ? -1.f : x.v[i]; });
    }
    static F abs(F x) {
        return map([&](int i) { return std::fabs(x.v[i]); });
    }
    static float sum(F x) { return (x.v[0] + x.v[1]) + (x.v[2] + x.v[3]); }
    static void sums(const F (&x)[4], float* out) {
        for (int i = 0; i < 4; ++i) out[i] = sum(x[i]);
    }
    static void update_max(F value, int32_t cell, float* best, int32_t* index) {
        for (int i = 0; i < 4; ++i) {
            if (!(value.v[i] <= best[i]) && best[i] == best[i]) {
                best[i] = value.v[i];
                index[i] = cell;
            }
        }
    }
    static F round(F x) {
        return map([&](int i) { return std::nearbyint(x.v[i]); });
    }
    static F exp2_scale(F x, F n) {
        return map([&](int i) {
            const int32_t exponent = n.v[i] > -127 ? static_cast<int32_t>(n.v[i]) : -127;
            return x.v[i] * std::bit_cast<float>((exponent + 127) << 23);
        });
    }
    static F zero_below(F x, F limit, F value) {
        return map([&](int i) { return x.v[i] < limit.v[i] ? 0.f : value.v[i]; });
    }
};

}  // namespace
}  // namespace fnac

#include "cpu/kernels_impl.h"

namespace fnac {
const Kernels& portable_kernels() { return kernels_of<Portable>(); }
}  // namespace fnac
