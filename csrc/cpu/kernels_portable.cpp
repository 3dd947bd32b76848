// Portable: four lanes in plain loops that any compiler turns into the vectors of its baseline (SSE2, NEON).
#include <bit>
#include <cmath>
#include <cstdint>

namespace fnac {
namespace {

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
    static F set(float x) {
        return map([&](int) { return x; });
    }
    static F fma(F a, F b, F c) {
        return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
    }
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
            const int32_t exponent = n.v[i] == n.v[i] ? static_cast<int32_t>(n.v[i]) : 0;
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
