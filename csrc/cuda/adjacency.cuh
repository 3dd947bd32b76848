// What the forward and the backward pass of the adjacency terms share. A = a a'/tau, F and I are made a panel
// of rows at a time, in workspace of bounded size: all of them at B <= 4096, of which half the products are
// enough because they are symmetric, a share of the rows beyond. Each of the three is computed once in each
// direction.
#pragma once

#include "cuda/products.cuh"

namespace fnac::cuda {

// Columns of row_stats: what makes softmaxes of the rows of A, F, I, L, and of L without the masked pairs,
// each a pair (maximum, inverse of the sum of exponentials), which costs no digit, as a log-sum-exp does;
// then the row sums of s1 P_A, s2 P_A, s2 P_F, s3 P_I, s1 P_L, s3 P_L with s1 = sign(P_A - P_L), s2 =
// sign(P_A - P_F), s3 = sign(P_I - P_L). col_lse is the same of the columns of L without the masked pairs: n
// maxima, n inverses.
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

// Rows row0.. of A, F and I; null where not needed. Each may be in parts, to be added up.
struct Panel {
    float *a, *f, *i;
    int64_t row0, rows;
    int parts;
    int64_t part_stride;

    FNAC_DEVICE float sum(const float* element) const {
        float total = *element;
        for (int part = 1; part < parts; ++part) total += element[part * part_stride];
        return total;
    }
};

// How the rows are cut into panels, and the channels of a panel's products into parts.
struct PanelPlan {
#ifdef FNAC_CUDA_EMULATION
    static constexpr int64_t kBytes = 16 << 20;  // so that there are panels to test
#else
    static constexpr int64_t kBytes = 192 << 20;
#endif
    static constexpr int64_t kBlocks = 160,
                             kLargeBlocks = 264;  // of small and large tiles, aimed at by parts
    static constexpr int64_t kMostParts = 8;

    int64_t rows, tile;
    int64_t parts = 1;
    int64_t matrix_floats, floats;

    explicit PanelPlan(const AdjacencyInputs& job) {
        const int64_t matrices = Needs(job).matrices();
        const int64_t row_bytes = larger(matrices, 1) * job.n * static_cast<int64_t>(sizeof(float));
        const int64_t most = larger(kBytes / row_bytes / kLargeTile, 1) * kLargeTile;
        const int64_t panels = ceil_div(job.n, most);
        rows = panels == 1 ? job.n : ceil_div(ceil_div(job.n, panels), kLargeTile) * kLargeTile;
        tile = blocks(job.n, kLargeTile) * matrices >= kManyGramTiles ? kLargeTile : kSmallTile;
        if (panels == 1) {
            const int64_t steps = ceil_div(job.c, kPartStep);
            const int64_t aim = tile == kLargeTile ? kLargeBlocks : kBlocks;
            const int64_t wanted = aim / larger(blocks(job.n, tile) * matrices, 1);
            parts = larger(smaller(smaller(wanted, kMostParts), ceil_div(steps, 2)), 1);
            parts = ceil_div(steps, ceil_div(steps, parts));  // none of them empty
        }
        matrix_floats = rows * job.n;
        floats = matrices * parts * matrix_floats;
    }
    int64_t bytes() const { return floats * static_cast<int64_t>(sizeof(float)); }

  private:
    // Of a panel of all rows.
    static int64_t blocks(int64_t n, int64_t tile) {
        const int64_t side = ceil_div(n, tile);
        return side * (side + 1) / 2;
    }
};

// Calls body(panel) for the panels of all rows, filled.
template <class Body>
void for_panels(const AdjacencyInputs& job, float* memory, const Launch& where, const Body& body) {
    const Needs needs(job);
    const PanelPlan plan(job);
    const int64_t part_stride = needs.matrices() * plan.matrix_floats;
    for (int64_t row0 = 0; row0 < job.n; row0 += plan.rows) {
        const int64_t rows = smaller(plan.rows, job.n - row0);
        Grams grams{{},         0,          needs.a ? job.dtype : Dtype::kFloat32,
                    row0,       rows,       job.n,
                    job.c,      job.scale,  plan.tile,
                    plan.parts, part_stride};
        const auto add = [&](bool needed, const void* features) -> float* {
            if (!needed) return nullptr;
            float* out = memory + grams.count * plan.matrix_floats;
            grams.each[grams.count++] = {features, out};
            return out;
        };
        float *f = add(needs.f, job.foreground), *i = add(needs.i, job.avg), *a = add(needs.a, job.aud);
        if (grams.count > 0) multiply(grams, where);
        body(Panel{a, f, i, row0, rows, static_cast<int>(plan.parts), part_stride});
    }
}

// Whether pair (n, m) leaves the InfoNCE denominators; a carries the scale, as the threshold must.
FNAC_DEVICE bool leaves(float a, float scaled_threshold, int64_t n, int64_t m) {
    return n != m && a >= scaled_threshold;
}

// -1, 0 or 1; NaN stays NaN.
FNAC_DEVICE float sign(float x) { return x > 0.f ? 1.f : x < 0.f ? -1.f : x; }

}  // namespace fnac::cuda
