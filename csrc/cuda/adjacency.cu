// The contrastive and adjacency terms: rows_kernel, a warp for each row of a panel, makes the row's
// statistics and its shares of the terms; means_kernel adds the shares up.
#include "cuda/adjacency.cuh"
#include "cuda/sums.cuh"

namespace fnac::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;

struct RowsArguments {
    const float* logits;
    Panel panel;
    int64_t n;
    Needs needs;
    float scaled_threshold;
    float* row_stats;
    float* col_lse;
    float* row_terms;  // (n, 4)
};

struct LogSumExp {
    float high, log;
    FNAC_DEVICE void write(float* to) const { to[0] = high, to[1] = log; }
    FNAC_DEVICE float softmax(float x) const { return expf(x - high - log); }
};

// Of x(0), ..., x(n - 1), by a warp. NaN where there is one, because its exp is one whatever the maximum.
template <class Values>
FNAC_DEVICE LogSumExp log_sum_exp(int64_t n, const Values& x) {
    const int lane = thread_index() % kWarpSize;
    float high = kNegInf, sum = 0.f;
    for (int64_t m = lane; m < n; m += kWarpSize) {
        const float value = x(m);
        high = value > high ? value : high;
    }
    high = warp_max(high);
    for (int64_t m = lane; m < n; m += kWarpSize) sum += expf(x(m) - high);
    return {high, logf(warp_sum(sum))};
}

// The sums of a distance |x - y|, and of its sign times x and times y.
struct Distance {
    float total = 0.f, with_x = 0.f, with_y = 0.f;
    FNAC_DEVICE void add(float x, float y) {
        const float difference = x - y, s = sign(difference);
        total += fabsf(difference);
        with_x = multiply_add(s, x, with_x);
        with_y = multiply_add(s, y, with_y);
    }
    FNAC_DEVICE void reduce() {
        total = warp_sum(total);
        with_x = warp_sum(with_x);
        with_y = warp_sum(with_y);
    }
};

FNAC_KERNEL(kThreads, 4)
rows_kernel(const RowsArguments job) {
    const int lane = thread_index() % kWarpSize;
    const int64_t row = block_x() * kWarps + thread_index() / kWarpSize, n = job.panel.row0 + row,
                  size = job.n;
    if (row >= job.panel.rows) return;
    const Needs& needs = job.needs;
    // A lane comes back to its own elements only, so it may add up their parts beforehand.
    const auto row_of = [&](float* matrix) -> const float* {
        if (matrix == nullptr) return nullptr;
        float* elements = matrix + row * size;
        if (job.panel.parts > 1)
            for (int64_t m = lane; m < size; m += kWarpSize) elements[m] = job.panel.sum(elements + m);
        return elements;
    };
    const float *a = row_of(job.panel.a), *f = row_of(job.panel.f), *i = row_of(job.panel.i);
    const float* l = job.logits + n * size;
    const auto of = [](const float* x) { return [x](int64_t m) { return x[m]; }; };

    LogSumExp lse_a{}, lse_f{}, lse_i{}, lse_l{}, kept{}, column{};
    if (needs.s1 || needs.s2) lse_a = log_sum_exp(size, of(a));
    if (needs.s2) lse_f = log_sum_exp(size, of(f));
    if (needs.s3) lse_i = log_sum_exp(size, of(i));
    if (needs.s1 || needs.s3) lse_l = log_sum_exp(size, of(l));
    float entropy = 0.f;
    if (needs.nce) {
        // A is symmetric, so its row n also tells which pairs leave column n.
        const auto keep = [&](const float* x, int64_t stride) {
            return [&, x, stride](int64_t m) {
                return needs.masked && leaves(a[m], job.scaled_threshold, n, m) ? kNegInf : x[m * stride];
            };
        };
        kept = log_sum_exp(size, keep(l, 1));
        column = log_sum_exp(size, keep(job.logits + n, size));
        entropy = (kept.high - l[n]) + kept.log + (column.high - l[n]) + column.log;
    }
    Distance d1, d2, d3;
    if (needs.s1 || needs.s2 || needs.s3) {
        for (int64_t m = lane; m < size; m += kWarpSize) {
            const float pa = needs.s1 || needs.s2 ? lse_a.softmax(a[m]) : 0.f;
            const float pl = needs.s1 || needs.s3 ? lse_l.softmax(l[m]) : 0.f;
            if (needs.s1) d1.add(pa, pl);
            if (needs.s2) d2.add(pa, lse_f.softmax(f[m]));
            if (needs.s3) d3.add(lse_i.softmax(i[m]), pl);
        }
    }
    d1.reduce();
    d2.reduce();
    d3.reduce();
    if (lane != 0) return;
    float* stats = job.row_stats + n * kRowStats;
    lse_a.write(stats + kLseA);
    lse_f.write(stats + kLseF);
    lse_i.write(stats + kLseI);
    lse_l.write(stats + kLseL);
    kept.write(stats + kLseKept);
    stats[kS1A] = d1.with_x, stats[kS1L] = d1.with_y;
    stats[kS2A] = d2.with_x, stats[kS2F] = d2.with_y;
    stats[kS3I] = d3.with_x, stats[kS3L] = d3.with_y;
    job.col_lse[n] = column.high + column.log;
    float* terms = job.row_terms + n * 4;
    terms[0] = entropy, terms[1] = d1.total, terms[2] = d2.total, terms[3] = d3.total;
}

struct MeansArguments {
    const float* row_terms;
    int64_t n;
    double weights[4];
    float* loss;
    float* terms;
};

constexpr int kMeansThreads = 256;

FNAC_KERNEL(kMeansThreads, 1)
means_kernel(const MeansArguments job) {
    double* sums = reinterpret_cast<double*>(shared_memory());
    const int thread = thread_index();
    double own[4] = {};
    for (int64_t n = thread; n < job.n; n += kMeansThreads)
        for (int t = 0; t < 4; ++t) own[t] += job.row_terms[n * 4 + t];
    for (int t = 0; t < 4; ++t) sums[thread * 4 + t] = own[t];
    for (int half = kMeansThreads / 2; half > 0; half /= 2) {
        block_barrier();
        if (thread < half)
            for (int t = 0; t < 4; ++t) sums[thread * 4 + t] += sums[(thread + half) * 4 + t];
    }
    if (thread != 0) return;
    const double n = static_cast<double>(job.n);
    double loss = 0;
    for (int t = 0; t < 4; ++t) {
        // Not a product where the weight is 0: 0 times infinity is not 0.
        const double mean = job.weights[t] == 0 ? 0 : sums[t] / (t == 0 ? n : n * n);
        job.terms[t] = static_cast<float>(mean);
        if (job.weights[t] != 0) loss += job.weights[t] * mean;
    }
    *job.loss = static_cast<float>(loss);
}

}  // namespace

int64_t workspace_bytes(const Adjacency& job, int) {
    return PanelPlan(job.inputs).bytes() + job.inputs.n * 4 * static_cast<int64_t>(sizeof(float));
}

void run(const Adjacency& job, const Launch& where) {
    const DeviceGuard guard(where);
    const AdjacencyInputs& inputs = job.inputs;
    const int64_t n = inputs.n;
    float* row_terms = static_cast<float*>(where.workspace);
    for_panels(inputs, row_terms + n * 4, where, [&](const Panel& panel) {
        launch(rows_kernel, {"rows_kernel", panel.rows, n, inputs.c, 1}, {ceil_div(panel.rows, kWarps)},
               kThreads, 0, where,
               RowsArguments{inputs.logits, panel, n, Needs(inputs), inputs.threshold * inputs.scale,
                             job.row_stats, job.col_lse, row_terms});
    });
    const double* w = inputs.weights;
    launch(means_kernel, {"means_kernel", n, n, inputs.c, 1}, {1}, kMeansThreads,
           4 * kMeansThreads * sizeof(double), where,
           MeansArguments{row_terms, n, {w[0], w[1], w[2], w[3]}, job.loss, job.terms});
}

}  // namespace fnac::cuda
