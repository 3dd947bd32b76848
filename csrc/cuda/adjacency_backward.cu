// The gradients of the adjacency terms: gradient_kernel writes dL and turns a panel of A, F and I into dA +
// dA', dF + dF' and dI + dI', which are symmetric as they are, so a row of the transposed softmax needs only
// the other rows' statistics; their products with the features are the features' gradients.
#include "cuda/adjacency.cuh"

namespace fnac::cuda {
namespace {

constexpr int kTile = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRows = kTile / kWarps;  // of a thread
constexpr int kPitch = kTile + 1;
constexpr int kStatsPitch = kRowStats + 4;  // eight rows' fours are in different banks
constexpr int kSharedFloats = kTile * kPitch + 2 * kTile * kStatsPitch;

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
    // Sounds of 16 bits that are wanted in float32; null where not.
    const void* narrow;
    bool is_bfloat16;
    float* sounds;
    int64_t sound_elements, blocks;
};

// The statistics of a row, of the panel or transposed.
struct Side {
    float stats[kRowStats];

    FNAC_DEVICE explicit Side(const float* from) {
#pragma unroll
        for (int i = 0; i < kRowStats; i += 4) {
            const Float4 four = *reinterpret_cast<const Float4*>(from + i);
            stats[i] = four.x, stats[i + 1] = four.y, stats[i + 2] = four.z, stats[i + 3] = four.w;
        }
    }
    FNAC_DEVICE float softmax(float x, Stat lse) const { return expf(x - stats[lse]) * stats[lse + 1]; }
};

// The gradient that reaches a wanted term, from the loss and directly.
FNAC_DEVICE float term_gradient(const GradientArguments& job, int term) {
    if (job.weights[term] == 0) return 0.f;
    double gradient = 0;
    if (job.grad_loss != nullptr) gradient += job.weights[term] * *job.grad_loss;
    if (job.grad_terms != nullptr) gradient += job.grad_terms[term];
    return static_cast<float>(gradient);
}

// A share of the work for each block, which a kernel of its own would be a launch for.
FNAC_DEVICE void widen_sounds(const GradientArguments& job) {
    for (int64_t i = block_x() * kThreads + thread_index(); i < job.sound_elements;
         i += job.blocks * kThreads)
        job.sounds[i] = job.is_bfloat16 ? widen(static_cast<const BFloat16*>(job.narrow)[i])
                                        : widen(static_cast<const Float16*>(job.narrow)[i]);
}

FNAC_KERNEL(kThreads, 2)
gradient_kernel(const GradientArguments job) {
    if (job.narrow != nullptr) widen_sounds(job);
    const int thread = thread_index(), warp = thread / kWarpSize, lane = thread % kWarpSize;
    const int64_t row0 = block_x() / job.column_blocks * kTile, size = job.n;
    const int64_t column0 = block_x() % job.column_blocks * kTile;
    const Panel& panel = job.panel;
    const Needs& needs = job.needs;
    // The logits of the transposed tile, turned: its rows are columns here. Then the statistics of the rows
    // and of the columns.
    float* transposed = reinterpret_cast<float*>(shared_memory());
    float* stats = transposed + kTile * kPitch;
#pragma unroll
    for (int j = 0; j < kTile; j += kWarps) {
        const int64_t m = column0 + warp + j, n = panel.row0 + row0 + lane;
        transposed[(warp + j) * kPitch + lane] = m < size && n < size ? job.logits[m * size + n] : 0.f;
    }
    {
        const int side = thread / 4, four = thread % 4 * 4;
        const int64_t n = side < kTile ? panel.row0 + row0 + side : column0 + side - kTile;
        *reinterpret_cast<Float4*>(stats + side * kStatsPitch + four) =
            n < size ? *reinterpret_cast<const Float4*>(job.row_stats + n * kRowStats + four) : Float4{};
    }
    const int64_t m = column0 + lane;
    const int64_t rows = panel.rows - row0 < kTile ? panel.rows - row0 : kTile;
    const int rest = m < size ? static_cast<int>(rows) - warp : 0;
    const int64_t first = (row0 + warp) * size + m;  // of the thread's elements, kWarps rows apart
    float l[kRows], a[kRows], f[kRows], i[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
        l[k] = k * kWarps < rest ? job.logits[panel.row0 * size + first + k * kWarps * size] : 0.f;
        a[k] = f[k] = i[k] = 0.f;
    }
    for (int part = 0; part < panel.parts; ++part) {
        const int64_t at = first + part * panel.part_stride;
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
            if (k * kWarps >= rest) continue;
            if (needs.a) a[k] += panel.a[at + k * kWarps * size];
            if (needs.f) f[k] += panel.f[at + k * kWarps * size];
            if (needs.i) i[k] += panel.i[at + k * kWarps * size];
        }
    }
    const bool nce = needs.nce && m < size;
    const float col_high = nce ? job.col_lse[m] : 0.f, col_inverse = nce ? job.col_lse[size + m] : 0.f;
    const float g0 = term_gradient(job, 0) / static_cast<float>(size);
    const float g1 = term_gradient(job, 1), g2 = term_gradient(job, 2), g3 = term_gradient(job, 3);
    const float share = 1.f / static_cast<float>(size) / static_cast<float>(size);
    block_barrier();
    if (rest <= 0) return;
    const Side column(stats + (kTile + lane) * kStatsPitch);

#pragma unroll
    for (int k = 0; k < kRows; ++k) {
        if (k * kWarps >= rest) break;
        const int r = warp + k * kWarps;
        const int64_t n = panel.row0 + row0 + r, at = first + k * kWarps * size;
        const Side row(stats + r * kStatsPitch);
        const float logit_t = transposed[lane * kPitch + r];
        float pa = 0.f, pat = 0.f, pl = 0.f, plt = 0.f, da = 0.f, dl = 0.f;
        if (needs.s1 || needs.s2) pa = row.softmax(a[k], kLseA), pat = column.softmax(a[k], kLseA);
        if (needs.s1 || needs.s3) pl = row.softmax(l[k], kLseL), plt = column.softmax(logit_t, kLseL);
        if (needs.s1) {
            const float s = sign(pa - pl), st = sign(pat - plt);
            da = g1 * (pa * (s - row.stats[kS1A]) + pat * (st - column.stats[kS1A]));
            dl = g1 * (row.stats[kS1L] - s);
        }
        if (needs.s2) {
            const float pf = row.softmax(f[k], kLseF), pft = column.softmax(f[k], kLseF);
            const float s = sign(pa - pf), st = sign(pat - pft);
            da += g2 * (pa * (s - row.stats[kS2A]) + pat * (st - column.stats[kS2A]));
            panel.f[at] = -g2 * share * (pf * (s - row.stats[kS2F]) + pft * (st - column.stats[kS2F]));
        }
        if (needs.s3) {
            const float pi = row.softmax(i[k], kLseI), pit = column.softmax(i[k], kLseI);
            const float s = sign(pi - pl), st = sign(pit - plt);
            dl += g3 * (row.stats[kS3L] - s);
            panel.i[at] = g3 * share * (pi * (s - row.stats[kS3I]) + pit * (st - column.stats[kS3I]));
        }
        if (needs.s1 || needs.s2) panel.a[at] = da * share;
        dl *= pl * share;
        if (needs.nce) {
            // Where no pair leaves, the row's softmax is there already.
            const bool there = !needs.masked && (needs.s1 || needs.s3);
            float both = (there ? pl : row.softmax(l[k], kLseKept)) + expf(l[k] - col_high) * col_inverse;
            if (needs.masked && leaves(a[k], job.scaled_threshold, n, m)) both = 0.f;
            dl += g0 * (n == m ? both - 2.f : both);
        }
        job.dlogits[n * size + m] = dl;
    }
}

// Of the sounds in float32, to a multiple of 64 bytes.
int64_t widened_floats(const AdjacencyInputs& job) {
    return job.dtype == Dtype::kFloat32 ? 0 : ceil_div(job.n * job.c, 16) * 16;
}

}  // namespace

int64_t workspace_bytes(const AdjacencyBackward& job, int) {
    return widened_floats(job.inputs) * static_cast<int64_t>(sizeof(float)) + PanelPlan(job.inputs).bytes();
}

void run(const AdjacencyBackward& job, const Launch& where) {
    const AdjacencyInputs& inputs = job.inputs;
    const Needs needs(inputs);
    const int64_t n = inputs.n, column_blocks = ceil_div(n, kTile);
    const double* w = inputs.weights;
    // The sounds in float32 come before the panels.
    float* widened = static_cast<float*>(where.workspace);
    const bool is_narrow = inputs.dtype != Dtype::kFloat32;
    const float* sounds = is_narrow ? widened : static_cast<const float*>(inputs.aud);
    for_panels(inputs, widened + widened_floats(inputs), where, [&](const Panel& panel) {
        const int64_t blocks = ceil_div(panel.rows, kTile) * column_blocks;
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
                                          static_cast<int>(column_blocks),
                                          is_narrow && panel.row0 == 0 ? inputs.aud : nullptr,
                                          inputs.dtype == Dtype::kBFloat16,
                                          widened,
                                          n * inputs.c,
                                          blocks};
        launch(gradient_kernel, {"gradient_kernel", panel.rows, n, inputs.c, 1}, {blocks}, kThreads,
               kSharedFloats * sizeof(float), where, arguments);
        Products products{{}, 0, panel.rows, inputs.c, n, inputs.scale};
        const auto add = [&](bool wanted, const float* gradient, const float* features, float* out) {
            if (wanted) products.each[products.count++] = {gradient, features, out + panel.row0 * inputs.c};
        };
        const bool of_sounds = needs.s1 || needs.s2;
        add(needs.s2, panel.f, inputs.foreground, job.dforeground);
        add(needs.s3, panel.i, inputs.avg, job.davg);
        add(of_sounds, panel.a, sounds, job.daud);
        if (of_sounds && inputs.dtype == Dtype::kBFloat16)
            products.narrow = static_cast<const BFloat16*>(inputs.aud);
        if (products.count > 0) multiply(products, where);
    });
}

}  // namespace fnac::cuda
