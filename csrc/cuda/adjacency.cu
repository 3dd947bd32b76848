// The contrastive and adjacency terms. rows_kernel makes the statistics of a panel's rows and of the logits'
// columns of the same numbers, each with its shares of the terms: half a block for a row, which passes twice,
// for the log-sum-exps and for the distances; blocks of their own for eight columns at a time. means_kernel
// adds the shares up.
#include "cuda/adjacency.cuh"
#include "cuda/sums.cuh"

namespace fnac::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 2, kRowThreads = kThreads / kRows, kRowWarps = kRowThreads / kWarpSize;
constexpr int kColumns = 8, kColumnThreads = kThreads / kColumns, kWarps = kThreads / kWarpSize;
constexpr int kGroup = 4;  // elements that a thread has at a time
constexpr int kTerms = 8;  // floats of a row in row_terms

struct RowsArguments {
    const float* logits;
    Panel panel;
    int64_t n;
    Needs needs;
    float scaled_threshold;
    float* row_stats;
    float* col_lse;
    float* row_terms;  // (n, kTerms): the row's shares of the four terms, and column n's of the first
    int column_blocks;
};

// The largest of a row, and the inverse of the sum of exponentials beside it.
struct Softmax {
    float high = 0.f, inverse = 0.f;
    FNAC_DEVICE void write(float* to) const { to[0] = high, to[1] = inverse; }
    FNAC_DEVICE float operator()(float x) const { return expf(x - high) * inverse; }
    FNAC_DEVICE float entropy(float x) const { return (high - x) - logf(inverse); }
};

// The maximum of what it has seen, and the sum of exponentials beside it. The maximum knows of no NaN, the
// sum does, because a NaN's exp is one whatever the maximum.
struct Running {
    float high = kNegInf, sum = 0.f;

    template <int kCount>
    FNAC_DEVICE void add(const float (&x)[kCount]) {
        float next = high;
#pragma unroll
        for (int k = 0; k < kCount; ++k) next = x[k] > next ? x[k] : next;
        if (next > high) sum *= expf(high - next);
        high = next;
        const float base = high == kNegInf ? 0.f : high;
        float few = 0.f;
#pragma unroll
        for (int k = 0; k < kCount; ++k) few += expf(x[k] - base);
        sum += few;
    }
    FNAC_DEVICE float sum_beside(float maximum) const {
        return high == maximum ? sum : sum * expf(high - maximum);
    }
    // Of the lanes that differ in these bits.
    FNAC_DEVICE void reduce(int lowest_bit) {
        float all = high;
#pragma unroll
        for (int mask = kWarpSize / 2; mask > 0; mask /= 2)
            if (mask >= lowest_bit) all = larger_or_nan(shuffle_xor(all, mask), all);
        sum = sum_beside(all);
        high = all;
#pragma unroll
        for (int mask = kWarpSize / 2; mask > 0; mask /= 2)
            if (mask >= lowest_bit) sum += shuffle_xor(sum, mask);
    }
    // Of `count` of them, `stride` apart.
    FNAC_DEVICE static Softmax merge(const float* parts, int count, int stride) {
        Running all;
        for (int k = 0; k < count; ++k)
            all.high = parts[k * stride] > all.high ? parts[k * stride] : all.high;
        for (int k = 0; k < count; ++k)
            all.sum += Running{parts[k * stride], parts[k * stride + 1]}.sum_beside(all.high);
        // Minus infinity throughout has no softmax.
        if (all.high == kNegInf) all.sum = all.high - all.high;
        return {all.high, 1.f / all.sum};
    }
};

// The sums of a distance |x - y|, and of its sign times x and times y.
struct Distance {
    float total = 0.f, with_x = 0.f, with_y = 0.f;
    FNAC_DEVICE void add(float x, float y) {
        const float difference = x - y, s = sign(difference);
        total += fabsf(difference);
        with_x = multiply_add(s, x, with_x);
        with_y = multiply_add(s, y, with_y);
    }
    // Of the warp, as the k-th of three.
    FNAC_DEVICE void write(float* to, int k) {
        total = warp_sum(total);
        with_x = warp_sum(with_x);
        with_y = warp_sum(with_y);
        if (thread_index() % kWarpSize != 0) return;
        to[3 * k] = total, to[3 * k + 1] = with_x, to[3 * k + 2] = with_y;
    }
    FNAC_DEVICE void read(const float* from, int k, int stride) {
        for (int warp = 0; warp < kRowWarps; ++warp, from += stride) {
            total += from[3 * k];
            with_x += from[3 * k + 1];
            with_y += from[3 * k + 2];
        }
    }
};

// Elements m, m + kRowThreads, ... of a row, minus infinity beyond its end.
struct Group {
    float a[kGroup], f[kGroup], i[kGroup], l[kGroup];

    // `row` of the panel, which has so many parts.
    FNAC_DEVICE void load(const RowsArguments& job, int64_t row, int m, int parts) {
        const Panel& panel = job.panel;
        const Needs& needs = job.needs;
        const int size = static_cast<int>(job.n);
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
            const bool there = m + k * kRowThreads < size;
            a[k] = f[k] = i[k] = there ? 0.f : kNegInf;
            l[k] = there ? job.logits[(panel.row0 + row) * job.n + m + k * kRowThreads] : kNegInf;
        }
        for (int part = 0; part < parts; ++part) {
            const int64_t at = row * job.n + m + part * panel.part_stride;
#pragma unroll
            for (int k = 0; k < kGroup; ++k) {
                if (m + k * kRowThreads >= size) continue;
                if (needs.a) a[k] += panel.a[at + k * kRowThreads];
                if (needs.f) f[k] += panel.f[at + k * kRowThreads];
                if (needs.i) i[k] += panel.i[at + k * kRowThreads];
            }
        }
    }
    FNAC_DEVICE void store(const RowsArguments& job, int64_t row, int m) const {
        const int size = static_cast<int>(job.n);
        const int64_t at = row * job.n + m;
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
            if (m + k * kRowThreads >= size) continue;
            if (job.needs.a) job.panel.a[at + k * kRowThreads] = a[k];
            if (job.needs.f) job.panel.f[at + k * kRowThreads] = f[k];
            if (job.needs.i) job.panel.i[at + k * kRowThreads] = i[k];
        }
    }
};

// Of the logits' columns, without the masked pairs: A is symmetric, so the panel's rows tell which.
FNAC_DEVICE void columns_of_panel(const RowsArguments& job) {
    const int thread = thread_index(), warp = thread / kWarpSize, lane = thread % kWarpSize;
    const int64_t column = block_x() * kColumns + thread % kColumns, n = job.panel.row0 + column;
    const int64_t size = job.n;
    const bool there = column < job.panel.rows, masked = job.needs.masked, whole = job.panel.rows == size;
    Running running;
    for (int m0 = thread / kColumns; m0 < size; m0 += kColumnThreads * kGroup) {
        float x[kGroup];
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
            const int m = m0 + k * kColumnThreads;
            x[k] = there && m < size ? job.logits[m * size + n] : kNegInf;
        }
        if (masked) {
#pragma unroll
            for (int k = 0; k < kGroup; ++k) {
                const int m = m0 + k * kColumnThreads;
                if (!there || m >= size) continue;
                const float a = job.panel.sum(job.panel.a + (whole ? m * size + n : column * size + m));
                if (leaves(a, job.scaled_threshold, n, m)) x[k] = kNegInf;
            }
        }
        running.add(x);
    }
    running.reduce(kColumns);
    float* parts = reinterpret_cast<float*>(shared_memory());
    if (lane < kColumns) {
        parts[(warp * kColumns + lane) * 2] = running.high;
        parts[(warp * kColumns + lane) * 2 + 1] = running.sum;
    }
    block_barrier();
    if (thread >= kColumns || !there) return;
    const Softmax softmax = Running::merge(parts + thread * 2, kWarps, kColumns * 2);
    job.col_lse[n] = softmax.high, job.col_lse[size + n] = softmax.inverse;
    job.row_terms[n * kTerms + 4] = softmax.entropy(job.logits[n * size + n]);
}

constexpr int kLses = 5, kDistanceSums = 9;
constexpr int kSharedFloats = kWarps * (2 * kLses + kDistanceSums);

FNAC_KERNEL(kThreads, 3)
rows_kernel(const RowsArguments job) {
    if (block_x() < job.column_blocks) return columns_of_panel(job);
    const int thread = thread_index() % kRowThreads, lane = thread % kWarpSize;
    const int warp = thread_index() / kWarpSize, first_warp = thread_index() / kRowThreads * kRowWarps;
    const int row = static_cast<int>(block_x() - job.column_blocks) * kRows + thread_index() / kRowThreads;
    const int n = static_cast<int>(job.panel.row0) + row;
    const int size = row < job.panel.rows ? static_cast<int>(job.n) : 0;
    const Needs& needs = job.needs;
    // The parts are added up once, unless blocks of columns read them meanwhile.
    const bool fold = job.panel.parts > 1 && !needs.masked;

    Running of_a, of_f, of_i, of_l, of_kept;
    for (int m = thread; m < size; m += kGroup * kRowThreads) {
        Group group;
        group.load(job, row, m, job.panel.parts);
        if (fold) group.store(job, row, m);
        if (needs.s1 || needs.s2) of_a.add(group.a);
        if (needs.s2) of_f.add(group.f);
        if (needs.s3) of_i.add(group.i);
        if (needs.s1 || needs.s3 || !needs.masked) of_l.add(group.l);
        if (needs.masked) {
#pragma unroll
            for (int k = 0; k < kGroup; ++k)
                if (leaves(group.a[k], job.scaled_threshold, n, m + k * kRowThreads)) group.l[k] = kNegInf;
            of_kept.add(group.l);
        }
    }
    float* parts = reinterpret_cast<float*>(shared_memory());
    const auto share = [&](Running& running, int k) {
        running.reduce(1);
        if (lane != 0) return;
        parts[(warp * kLses + k) * 2] = running.high;
        parts[(warp * kLses + k) * 2 + 1] = running.sum;
    };
    if (needs.s1 || needs.s2) share(of_a, 0);
    if (needs.s2) share(of_f, 1);
    if (needs.s3) share(of_i, 2);
    if (needs.s1 || needs.s3 || !needs.masked) share(of_l, 3);
    if (needs.masked) share(of_kept, 4);
    block_barrier();
    const auto merged = [&](int k) {
        return Running::merge(parts + (first_warp * kLses + k) * 2, kRowWarps, kLses * 2);
    };
    Softmax softmax_a, softmax_f, softmax_i, softmax_l, kept;
    if (needs.s1 || needs.s2) softmax_a = merged(0);
    if (needs.s2) softmax_f = merged(1);
    if (needs.s3) softmax_i = merged(2);
    if (needs.s1 || needs.s3 || !needs.masked) kept = softmax_l = merged(3);
    if (needs.masked) kept = merged(4);

    Distance d1, d2, d3;
    if (needs.s1 || needs.s2 || needs.s3) {
        for (int m = thread; m < size; m += kGroup * kRowThreads) {
            Group group;
            group.load(job, row, m, fold ? 1 : job.panel.parts);
#pragma unroll
            for (int k = 0; k < kGroup; ++k) {
                if (m + k * kRowThreads >= size) continue;
                const float pa = needs.s1 || needs.s2 ? softmax_a(group.a[k]) : 0.f;
                const float pl = needs.s1 || needs.s3 ? softmax_l(group.l[k]) : 0.f;
                if (needs.s1) d1.add(pa, pl);
                if (needs.s2) d2.add(pa, softmax_f(group.f[k]));
                if (needs.s3) d3.add(softmax_i(group.i[k]), pl);
            }
        }
    }
    float* sums = parts + kWarps * kLses * 2;
    d1.write(sums + warp * kDistanceSums, 0);
    d2.write(sums + warp * kDistanceSums, 1);
    d3.write(sums + warp * kDistanceSums, 2);
    block_barrier();
    if (thread != 0 || size == 0) return;
    d1 = d2 = d3 = {};
    d1.read(sums + first_warp * kDistanceSums, 0, kDistanceSums);
    d2.read(sums + first_warp * kDistanceSums, 1, kDistanceSums);
    d3.read(sums + first_warp * kDistanceSums, 2, kDistanceSums);
    float* stats = job.row_stats + int64_t{n} * kRowStats;
    softmax_a.write(stats + kLseA);
    softmax_f.write(stats + kLseF);
    softmax_i.write(stats + kLseI);
    softmax_l.write(stats + kLseL);
    kept.write(stats + kLseKept);
    stats[kS1A] = d1.with_x, stats[kS1L] = d1.with_y;
    stats[kS2A] = d2.with_x, stats[kS2F] = d2.with_y;
    stats[kS3I] = d3.with_x, stats[kS3L] = d3.with_y;
    const float own = job.logits[n * job.n + n];
    float* terms = job.row_terms + int64_t{n} * kTerms;
    terms[0] = needs.nce ? kept.entropy(own) : 0.f;
    terms[1] = d1.total, terms[2] = d2.total, terms[3] = d3.total;
    if (!needs.nce) terms[4] = 0.f;
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
        for (int t = 0; t < 5; ++t) own[t % 4] += job.row_terms[n * kTerms + t];
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
    return PanelPlan(job.inputs).bytes() + job.inputs.n * kTerms * static_cast<int64_t>(sizeof(float));
}

void run(const Adjacency& job, const Launch& where) {
    const AdjacencyInputs& inputs = job.inputs;
    const int64_t n = inputs.n;
    float* row_terms = static_cast<float*>(where.workspace);
    for_panels(inputs, row_terms + n * kTerms, where, [&](const Panel& panel) {
        const Needs needs(inputs);
        const int64_t column_blocks = needs.nce ? ceil_div(panel.rows, kColumns) : 0;
        launch(rows_kernel, {"rows_kernel", panel.rows, n, inputs.c, 1},
               {column_blocks + ceil_div(panel.rows, kRows)}, kThreads, kSharedFloats * sizeof(float), where,
               RowsArguments{inputs.logits, panel, n, needs, inputs.threshold * inputs.scale, job.row_stats,
                             job.col_lse, row_terms, static_cast<int>(column_blocks)});
    });
    const double* w = inputs.weights;
    launch(means_kernel, {"means_kernel", n, n, inputs.c, 1}, {1}, kMeansThreads,
           4 * kMeansThreads * sizeof(double), where,
           MeansArguments{row_terms, n, {w[0], w[1], w[2], w[3]}, job.loss, job.terms});
}

}  // namespace fnac::cuda
