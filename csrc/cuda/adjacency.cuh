// What the forward and the backward pass of the adjacency terms share. A = a a'/tau, F and I are made a panel of
// rows at a time, in workspace of bounded size that stays in L2: all of them at B <= 1024 or so, a share of the
// rows beyond, so nothing of N x N is alive but the logits and their gradient. Each of the three is
// computed once in each direction.
#pragma once

#include "cuda/products.cuh"

namespace fnac::cuda {

// Columns of row_stats: the log-sum-exps of A, F, I, L, and of L without the masked pairs, each as (maximum, log of the
// sum) because their sum in float32 would cost the softmax two digits; then the row sums of s1 P_A, s2 P_A,
// s2 P_F, s3 P_I, s1 P_L, s3 P_L with s1 = sign(P_A - P_L), s2 = sign(P_A - P_F), s3 = sign(P_I - P_L).
enum Stat : int {
    kLseA = 0,
    kLseF = 2,
    kLseI = 4,
    kLseL = 6,
    kLseKept = 8,
    kS1A = 10,
    kS2A,
    kS2F,
    kS3I,
    kS1L,
    kS3L,
};

// Which terms are wanted, and which matrices they read.
struct Needs {
    bool nce, s1, s2, s3, masked, a, f, i;
    explicit Needs(const AdjacencyInputs& job)
        : nce(job.weights[0] != 0),
          s1(job.weights[1] != 0),
          s2(job.weights[2] != 0),
          s3(job.weights[3] != 0),
          masked(nce && job.masked),
          a(s1 || s2 || masked),
          f(s2),
          i(s3) {}
    int matrices() const { return a + f + i; }
};

// Rows row0.. of A, F and I; null where not needed.
struct Panel {
    float *a, *f, *i;
    int64_t row0, rows;
};

constexpr int64_t kPanelBytes = 16 << 20;
constexpr int64_t kPanelStep = 64;  // rows, of a product's tile

inline int64_t panel_rows(const AdjacencyInputs& job) {
    const int64_t row_bytes = larger(Needs(job).matrices(), 1) * job.n * static_cast<int64_t>(sizeof(float));
    return smaller(job.n, larger(kPanelBytes / row_bytes / kPanelStep, 1) * kPanelStep);
}
inline int64_t panel_bytes(const AdjacencyInputs& job) {
    return Needs(job).matrices() * panel_rows(job) * job.n * static_cast<int64_t>(sizeof(float));
}

// Calls body(panel) for the panels of all rows, filled.
template <class Body>
void for_panels(const AdjacencyInputs& job, float* memory, const Launch& where, const Body& body) {
    const Needs needs(job);
    const int64_t most = panel_rows(job);
    for (int64_t row0 = 0; row0 < job.n; row0 += most) {
        const int64_t rows = smaller(most, job.n - row0);
        Products products{{}, 0, rows, job.n, job.c, true, job.scale};
        const auto add = [&](bool needed, const float* features) -> float* {
            if (!needed) return nullptr;
            float* out = memory + products.count * most * job.n;
            products.each[products.count++] = {features + row0 * job.c, features, out};
            return out;
        };
        const Panel panel{add(needs.a, job.aud), add(needs.f, job.foreground), add(needs.i, job.avg), row0, rows};
        if (products.count > 0) multiply(products, where);
        body(panel);
    }
}

// Whether pair (n, m) leaves the InfoNCE denominators; a carries the scale, as the threshold must.
FNAC_DEVICE bool leaves(float a, float scaled_threshold, int64_t n, int64_t m) {
    return n != m && a >= scaled_threshold;
}

// -1, 0 or 1; NaN stays NaN.
FNAC_DEVICE float sign(float x) { return x > 0.f ? 1.f : x < 0.f ? -1.f : x; }

}  // namespace fnac::cuda
