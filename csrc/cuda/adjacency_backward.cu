// The gradients of the adjacency terms: gradient_kernel writes dL and turns a panel of A, F and I into dA +
// dA', dF + dF' and dI + dI', which are symmetric as they are, so a row of the transposed softmax needs only
// the other rows' statistics; their products with the features are the features' gradients.
#include "cuda/adjacency.cuh"

namespace fnac::cuda {
namespace {

constexpr int kTile = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kPitch = kTile + 1;

struct GradientArguments {
    const float* logits;
    Panel panel;
    int64_t n;
    Needs needs;
    float scaled_threshold;
    double weights[4];
    const float* row_stats;
    const float* col_lse;
    const float* grad_loss;
    const float* grad_terms;
    float* dlogits;
    int column_blocks;
};

// The softmaxes of a pair's rows n and m, and the row's part of its gradients.
struct Side {
    const float* stats;
    FNAC_DEVICE float softmax(float x, Stat lse) const { return expf(x - stats[lse] - stats[lse + 1]); }
};

// The gradient that reaches a wanted term, from the loss and directly.
FNAC_DEVICE float term_gradient(const GradientArguments& job, int term) {
    if (job.weights[term] == 0) return 0.f;
    double gradient = 0;
    if (job.grad_loss != nullptr) gradient += job.weights[term] * *job.grad_loss;
    if (job.grad_terms != nullptr) gradient += job.grad_terms[term];
    return static_cast<float>(gradient);
}

FNAC_KERNEL(kThreads, 2)
gradient_kernel(const GradientArguments job) {
    const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
    const int64_t row0 = block_x() / job.column_blocks * kTile, size = job.n;
    const int64_t column0 = block_x() % job.column_blocks * kTile;
    // The logits of the transposed tile, turned: its rows are columns here.
    float* transposed = reinterpret_cast<float*>(shared_memory());
    for (int j = warp; j < kTile; j += kWarps) {
        const int64_t m = column0 + j, n = job.panel.row0 + row0 + lane;
        transposed[j * kPitch + lane] = m < size && n < size ? job.logits[m * size + n] : 0.f;
    }
    block_barrier();
    const int64_t m = column0 + lane;
    if (m >= size) return;
    const Needs& needs = job.needs;
    const float g0 = term_gradient(job, 0) / static_cast<float>(size);
    const float g1 = term_gradient(job, 1), g2 = term_gradient(job, 2), g3 = term_gradient(job, 3);
    const float share = 1.f / static_cast<float>(size) / static_cast<float>(size);
    const Side column{job.row_stats + m * kRowStats};

    for (int r = warp; r < kTile; r += kWarps) {
        if (row0 + r >= job.panel.rows) break;
        const int64_t n = job.panel.row0 + row0 + r, at = (row0 + r) * size + m;
        const Side row{job.row_stats + n * kRowStats};
        const float logit = job.logits[n * size + m], logit_t = transposed[lane * kPitch + r];
        const float a = needs.a ? job.panel.sum(job.panel.a + at) : 0.f;
        float pa = 0.f, pat = 0.f, pl = 0.f, plt = 0.f, da = 0.f, dl = 0.f;
        if (needs.s1 || needs.s2) pa = row.softmax(a, kLseA), pat = column.softmax(a, kLseA);
        if (needs.s1 || needs.s3) pl = row.softmax(logit, kLseL), plt = column.softmax(logit_t, kLseL);
        if (needs.s1) {
            const float s = sign(pa - pl), st = sign(pat - plt);
            da = g1 * (pa * (s - row.stats[kS1A]) + pat * (st - column.stats[kS1A]));
            dl = g1 * (row.stats[kS1L] - s);
        }
        if (needs.s2) {
            const float f = job.panel.sum(job.panel.f + at), pf = row.softmax(f, kLseF),
                        pft = column.softmax(f, kLseF);
            const float s = sign(pa - pf), st = sign(pat - pft);
            da += g2 * (pa * (s - row.stats[kS2A]) + pat * (st - column.stats[kS2A]));
            job.panel.f[at] = -g2 * share * (pf * (s - row.stats[kS2F]) + pft * (st - column.stats[kS2F]));
        }
        if (needs.s3) {
            const float i = job.panel.sum(job.panel.i + at), pi = row.softmax(i, kLseI),
                        pit = column.softmax(i, kLseI);
            const float s = sign(pi - pl), st = sign(pit - plt);
            dl += g3 * (row.stats[kS3L] - s);
            job.panel.i[at] = g3 * share * (pi * (s - row.stats[kS3I]) + pit * (st - column.stats[kS3I]));
        }
        if (needs.s1 || needs.s2) job.panel.a[at] = da * share;
        dl *= pl * share;
        if (needs.nce) {
            float both = row.softmax(logit, kLseKept) + expf(logit - job.col_lse[m]);
            if (needs.masked && leaves(a, job.scaled_threshold, n, m)) both = 0.f;
            dl += g0 * (n == m ? both - 2.f : both);
        }
        job.dlogits[n * size + m] = dl;
    }
}

}  // namespace

int64_t workspace_bytes(const AdjacencyBackward& job) { return PanelPlan(job.inputs).bytes(); }

void run(const AdjacencyBackward& job, const Launch& where) {
    const DeviceGuard guard(where);
    const AdjacencyInputs& inputs = job.inputs;
    const Needs needs(inputs);
    const int64_t n = inputs.n, column_blocks = ceil_div(n, kTile);
    const double* w = inputs.weights;
    for_panels(inputs, static_cast<float*>(where.workspace), where, [&](const Panel& panel) {
        const GradientArguments arguments{inputs.logits,
                                          panel,
                                          n,
                                          needs,
                                          inputs.threshold * inputs.scale,
                                          {w[0], w[1], w[2], w[3]},
                                          job.row_stats,
                                          job.col_lse,
                                          job.grad_loss,
                                          job.grad_terms,
                                          job.dlogits,
                                          static_cast<int>(column_blocks)};
        launch(gradient_kernel, {"gradient_kernel", panel.rows, n, inputs.c, 1},
               {ceil_div(panel.rows, kTile) * column_blocks}, kThreads, kTile * kPitch * sizeof(float), where,
               arguments);
        Products products{{}, 0, panel.rows, inputs.c, n, inputs.scale};
        const auto add = [&](bool wanted, const float* gradient, const float* features, float* out) {
            if (wanted) products.each[products.count++] = {gradient, features, out + panel.row0 * inputs.c};
        };
        add(needs.s1 || needs.s2, panel.a, job.sounds, job.daud);
        add(needs.s2, panel.f, inputs.foreground, job.dforeground);
        add(needs.s3, panel.i, inputs.avg, job.davg);
        if (products.count > 0) multiply(products, where);
    });
}

}  // namespace fnac::cuda
