// The contrastive and adjacency terms. Work is done in blocks of rows, a few pieces of the micro-kernel each,
// so that a panel of features serves them all while it is in L1: the block's rows of A = a a', F = f f' and
// I = v v' are computed, used and forgotten, in the forward pass and again in the backward
// pass, so nothing of size n x n exists but the logits and their gradient. Because A, F and I are symmetric
// (bitwise: the same products in the same order), a row block also holds what the transposed softmaxes need:
// row m of the softmax at column n is exp(A[n, m] - lse[m]).
//
// Padding: a block's rows are padded to whole panels; padded columns of every matrix hold -inf, whose exp is
// 0.
//
// Columns of row_stats: the log-sum-exps of A, F, I, L, of L without the masked pairs, each as a pair
// (maximum, log of the sum) because their sum in float32 would cost the softmax two digits; then the row sums
// of s1 P_A, s2 P_A, s2 P_F, s3 P_I, s1 P_L, s3 P_L with s1 = sign(P_A - P_L), s2 = sign(P_A - P_F), s3 =
// sign(P_I - P_L).
#pragma once

namespace fnac {
namespace {

// clang-format off
enum Stat { kLseA = 0, kLseF = 2, kLseI = 4, kLseL = 6, kLseKept = 8, kS1A = 10, kS2A, kS2F, kS3I, kS1L, kS3L };
// clang-format on

constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// exp for x <= 0 or so, to 2 ulp; below e^-69 = 1e-30 it is 0, which spares the products that follow from
// denormals.
template <class V>
typename V::F exp_negative(typename V::F x) {
    const auto n = V::round(V::mul(x, V::set(1.44269504f)));
    auto r = V::fma(n, V::set(-0.693359375f), x);
    r = V::fma(n, V::set(2.12194440e-4f), r);
    auto y = V::set(1.f / 5040);
    for (const float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f})
        y = V::fma(y, r, V::set(c));
    return V::zero_below(x, V::set(-69.f), V::exp2_scale(y, n));
}

struct LogSumExp {
    float high, log;
    float value() const { return high + log; }
    void write(float* to) const { to[0] = high, to[1] = log; }
};

// log sum exp of x[0..size): NaN where there is a NaN, because its exp is one whatever the maximum.
template <class V>
LogSumExp log_sum_exp(const float* x, int64_t size) {
    auto top = V::set(kNegInf);
    for (int64_t i = 0; i < size; i += V::kLanes) top = V::max(V::load(x + i), top);
    float lanes[V::kLanes], high = kNegInf;
    V::store(lanes, top);
    for (const float lane : lanes) high = lane > high ? lane : high;
    auto total = V::set(0.f);
    for (int64_t i = 0; i < size; i += V::kLanes)
        total = V::add(total, exp_negative<V>(V::sub(V::load(x + i), V::set(high))));
    return {high, std::log(V::sum(total))};
}

// The softmax of x, given its log-sum-exp's two parts.
template <class V>
typename V::F softmax(const float* x, typename V::F high, typename V::F log) {
    return exp_negative<V>(V::sub(V::sub(V::load(x), high), log));
}

struct Features {
    const float* rows;
    const float* panels;  // lanes are rows
};

// Which matrices the wanted terms read.
struct Needs {
    bool nce, s1, s2, s3, a, f, i, mask;
    explicit Needs(const Adjacency& job)
        : nce(job.weights[0] != 0),
          s1(job.weights[1] != 0),
          s2(job.weights[2] != 0),
          s3(job.weights[3] != 0),
          a(s1 || s2 || (job.masked && nce)),
          f(s2),
          i(s3),
          mask(job.masked && nce) {}
};

// Buffers of one block of rows: whole pieces, each of `size` padded columns.
template <class V>
class Block {
  public:
    static constexpr int kBuffers = 5;
    static constexpr int64_t kWidth = 2 * V::kLanes;
    static constexpr int64_t kBytes = 1280 * 1024;  // of buffers: they stay in L2
    static constexpr int64_t kMostPieces = 4;

    static int64_t padded(int64_t n) { return ceil_div(n, kWidth) * kWidth; }
    // Rows of a block: fewer where the columns are many, or the threads.
    static int64_t rows(int64_t n, int threads) {
        const int64_t fit =
            kBytes / static_cast<int64_t>(kBuffers * sizeof(float)) / padded(n) / V::kMaxCells;
        const int64_t share = ceil_div(ceil_div(n, V::kMaxCells), 2 * threads);
        const int64_t pieces = smaller(smaller(fit, share), kMostPieces);
        return (pieces < 1 ? 1 : pieces) * V::kMaxCells;
    }
    static int64_t floats(int64_t n, int64_t c, int64_t rows) {
        return rows * (kBuffers * padded(n) + (c > n ? c : n) + kWidth) + V::kLanes;
    }

    Block(const Adjacency& job, int64_t rows, float* memory) : job_(job), size_(padded(job.n)) {
        for (int b = 0; b < kBuffers; ++b) buffer_[b] = memory + b * rows * size_;
        piece_ = memory + kBuffers * rows * size_;
    }

    float* a() const { return buffer_[0]; }
    float* f() const { return buffer_[1]; }
    float* i() const { return buffer_[2]; }
    float* l() const { return buffer_[3]; }   // logits of the rows
    float* lt() const { return buffer_[4]; }  // logits of the columns: lt[r][m] = L[m][first + r]
    int64_t size() const { return size_; }
    float* piece() const { return piece_; }  // for what is multiplied

    // out[r][m] = <features[first + r], features[m]> * scale
    void products(const Features& features, int64_t first, int64_t rows, float* out) const {
        multiply<V>(features.rows + first * job_.c, job_.c, 1, rows, job_.c, features.panels, size_ / kWidth,
                    piece_, out, size_);
        for (int64_t r = 0; r < rows; ++r) {
            float* row = out + r * size_;
            for (int64_t m = 0; m < job_.n; ++m) row[m] *= job_.scale;
            for (int64_t m = job_.n; m < size_; ++m) row[m] = kNegInf;
        }
    }

    void gather_logits(int64_t first, int64_t rows) const {
        transpose<V>(job_.logits + first, job_.n, job_.n, rows, lt(), size_);
        for (int64_t r = 0; r < rows; ++r) {
            float *row = l() + r * size_, *column = lt() + r * size_;
            std::memcpy(row, job_.logits + (first + r) * job_.n, sizeof(float) * job_.n);
            for (int64_t m = job_.n; m < size_; ++m) row[m] = column[m] = kNegInf;
        }
    }

    // Whether pair (n, m) leaves the InfoNCE denominators; a is the row of A that carries the scale.
    bool masked(const float* a, int64_t n, int64_t m) const {
        return n != m && a[m] >= job_.threshold * job_.scale;
    }

  private:
    const Adjacency& job_;
    int64_t size_;
    float* buffer_[kBuffers];
    float* piece_;
};

// Packs the features that the terms need as panels whose lanes are rows.
template <class V>
class Panels {
  public:
    Panels(const Adjacency& job, const Needs& needs)
        : each_(Block<V>::padded(job.n) * job.c),
          memory_(sizeof(float) * each_ * (needs.a + needs.f + needs.i)) {
        float* to = memory_.as<float>();
        const auto pack = [&](bool wanted, const float* rows) {
            Features out{rows, to};
            if (wanted) {
                pack_panels<V>(rows, job.c, 1, job.n, job.c, job.threads, to);
                to += each_;
            }
            return out;
        };
        a = pack(needs.a, job.aud);
        f = pack(needs.f, job.foreground);
        i = pack(needs.i, job.avg);
    }
    Features a, f, i;

  private:
    int64_t each_;
    Scratch memory_;
};

template <class V>
struct AbsSign {
    typename V::F total = V::set(0.f), first = V::set(0.f), second = V::set(0.f);
    void add(typename V::F x, typename V::F y) {
        const auto difference = V::sub(x, y), s = V::sign(difference);
        total = V::add(total, V::abs(difference));
        first = V::fma(s, x, first);
        second = V::fma(s, y, second);
    }
};

template <class V>
void adjacency_row(const Adjacency& job, const Needs& needs, const Block<V>& block, int64_t n, int64_t r,
                   float* kept, double* terms) {
    using F = typename V::F;
    const int64_t size = block.size(), at = r * size;
    const float *a = block.a() + at, *f = block.f() + at, *i = block.i() + at, *l = block.l() + at,
                *lt = block.lt() + at;
    float* stats = job.row_stats + n * kRowStats;
    for (int64_t s = 0; s < kRowStats; ++s) stats[s] = 0.f;
    log_sum_exp<V>(l, size).write(stats + kLseL);
    if (needs.s1 || needs.s2) log_sum_exp<V>(a, size).write(stats + kLseA);
    if (needs.f) log_sum_exp<V>(f, size).write(stats + kLseF);
    if (needs.i) log_sum_exp<V>(i, size).write(stats + kLseI);
    job.col_lse[n] = 0.f;
    if (needs.nce) {
        const auto lse = [&](const float* x) {
            if (!needs.mask) return log_sum_exp<V>(x, size);
            for (int64_t m = 0; m < size; ++m) kept[m] = m < job.n && block.masked(a, n, m) ? kNegInf : x[m];
            return log_sum_exp<V>(kept, size);
        };
        const LogSumExp row = lse(l), column = lse(lt);
        row.write(stats + kLseKept);
        job.col_lse[n] = column.value();
        const auto entropy = [&](LogSumExp x) { return static_cast<double>(x.high - l[n]) + x.log; };
        terms[0] = entropy(row) + entropy(column);
    }
    AbsSign<V> s1, s2, s3;
    const auto p = [&](const float* x, Stat lse) {
        return softmax<V>(x, V::set(stats[lse]), V::set(stats[lse + 1]));
    };
    for (int64_t m = 0; m < size; m += V::kLanes) {
        const F pl = needs.s1 || needs.s3 ? p(l + m, kLseL) : V::set(0.f);
        const F pa = needs.s1 || needs.s2 ? p(a + m, kLseA) : V::set(0.f);
        if (needs.s1) s1.add(pa, pl);
        if (needs.s2) s2.add(pa, p(f + m, kLseF));
        if (needs.s3) s3.add(p(i + m, kLseI), pl);
    }
    terms[1] = V::sum(s1.total);
    terms[2] = V::sum(s2.total);
    terms[3] = V::sum(s3.total);
    stats[kS1A] = V::sum(s1.first), stats[kS1L] = V::sum(s1.second);
    stats[kS2A] = V::sum(s2.first), stats[kS2F] = V::sum(s2.second);
    stats[kS3I] = V::sum(s3.first), stats[kS3L] = V::sum(s3.second);
}

template <class V>
void fill_block(const Adjacency& job, const Needs& needs, const Panels<V>& panels, const Block<V>& block,
                int64_t first, int64_t rows) {
    block.gather_logits(first, rows);
    if (needs.a) block.products(panels.a, first, rows, block.a());
    if (needs.f) block.products(panels.f, first, rows, block.f());
    if (needs.i) block.products(panels.i, first, rows, block.i());
    (void)job;
}

template <class V>
void adjacency(const Adjacency& job) {
    const Needs needs(job);
    const Panels<V> panels(job, needs);
    const int64_t height = Block<V>::rows(job.n, job.threads);
    const int64_t block_size = Block<V>::floats(job.n, job.c, height),
                  floats = block_size + Block<V>::padded(job.n);
    const Scratch scratch(sizeof(float) * job.threads * floats);
    const Scratch row_terms(sizeof(double) * job.n * 4);
    double* terms = row_terms.as<double>();
    parallel_for(job.threads, ceil_div(job.n, height), [&](int64_t task, int worker) {
        float* memory = scratch.as<float>() + worker * floats;
        const Block<V> block(job, height, memory);
        const int64_t first = task * height, rows = smaller(height, job.n - first);
        fill_block(job, needs, panels, block, first, rows);
        for (int64_t r = 0; r < rows; ++r) {
            double* t = terms + (first + r) * 4;
            t[0] = t[1] = t[2] = t[3] = 0;
            adjacency_row(job, needs, block, first + r, r, memory + block_size, t);
        }
    });
    double loss = 0;
    for (int t = 0; t < 4; ++t) {
        double total = 0;
        for (int64_t n = 0; n < job.n; ++n) total += terms[n * 4 + t];
        const double size = static_cast<double>(job.n);
        const double mean = job.weights[t] == 0 ? 0 : total / (t == 0 ? size : size * size);
        job.losses[1 + t] = static_cast<float>(mean);
        loss += job.weights[t] == 0 ? 0 : job.weights[t] * mean;
    }
    job.losses[0] = static_cast<float>(loss);
}

// Turns the rows of A, F, I in the block into dA + dA', dF + dF', dI + dI' (times 1 / n^2), and writes dL.
template <class V>
void adjacency_row_backward(const Adjacency& job, const Needs& needs, const Block<V>& block, const float* g,
                            const float* stats_t, int64_t n, int64_t r, float* dl) {
    using F = typename V::F;
    const int64_t size = block.size(), at = r * size;
    float *a = block.a() + at, *f = block.f() + at, *i = block.i() + at;
    const float *l = block.l() + at, *lt = block.lt() + at;
    const float* stats = job.row_stats + n * kRowStats;
    const auto column = [&](Stat s, int64_t m) { return V::load(stats_t + s * size + m); };
    const auto row = [&](Stat s) { return V::set(stats[s]); };
    const auto p = [&](const float* x, Stat lse) {
        return softmax<V>(x, V::set(stats[lse]), V::set(stats[lse + 1]));
    };
    const auto pt = [&](const float* x, Stat lse, int64_t m) {
        return softmax<V>(x, V::load(stats_t + lse * size + m), V::load(stats_t + (lse + 1) * size + m));
    };
    const double size_d = static_cast<double>(job.n);
    const F zero = V::set(0.f), g1 = V::set(g[1]), g2 = V::set(g[2]), g3 = V::set(g[3]);
    const F share = V::set(static_cast<float>(1 / (size_d * size_d)));
    const F g0 = V::set(static_cast<float>(g[0] / size_d));
    const bool with_a = needs.s1 || needs.s2;
    for (int64_t m = 0; m < size; m += V::kLanes) {
        const bool with_l = needs.s1 || needs.s3;
        const F pl = with_l ? p(l + m, kLseL) : zero, plt = with_l ? pt(lt + m, kLseL, m) : zero;
        F gl = zero, dot_l = zero, da = zero, df = zero, di = zero;
        F pa = zero, pat = zero;
        if (with_a) pa = p(a + m, kLseA), pat = pt(a + m, kLseA, m);
        if (needs.s1) {
            const F s = V::sign(V::sub(pa, pl)), st = V::sign(V::sub(pat, plt));
            da = V::mul(g1,
                        V::add(V::mul(pa, V::sub(s, row(kS1A))), V::mul(pat, V::sub(st, column(kS1A, m)))));
            gl = V::mul(g1, s);
            dot_l = V::mul(g1, row(kS1L));
        }
        if (needs.s2) {
            const F pf = p(f + m, kLseF), pft = pt(f + m, kLseF, m);
            const F s = V::sign(V::sub(pa, pf)), st = V::sign(V::sub(pat, pft));
            da = V::fma(
                g2, V::add(V::mul(pa, V::sub(s, row(kS2A))), V::mul(pat, V::sub(st, column(kS2A, m)))), da);
            df = V::mul(g2,
                        V::add(V::mul(pf, V::sub(s, row(kS2F))), V::mul(pft, V::sub(st, column(kS2F, m)))));
            V::store(f + m, V::mul(V::sub(zero, df), share));
        }
        if (needs.s3) {
            const F pi = p(i + m, kLseI), pit = pt(i + m, kLseI, m);
            const F s = V::sign(V::sub(pi, pl)), st = V::sign(V::sub(pit, plt));
            di = V::mul(g3,
                        V::add(V::mul(pi, V::sub(s, row(kS3I))), V::mul(pit, V::sub(st, column(kS3I, m)))));
            V::store(i + m, V::mul(di, share));
            gl = V::fma(g3, s, gl);
            dot_l = V::fma(g3, row(kS3L), dot_l);
        }
        F out = V::mul(V::mul(pl, V::sub(dot_l, gl)), share);
        if (needs.nce) {
            F both = V::add(p(l + m, kLseKept),
                            exp_negative<V>(V::sub(V::load(l + m), V::load(stats_t + kRowStats * size + m))));
            if (needs.mask) {
                float kept[V::kLanes];
                V::store(kept, both);
                for (int64_t j = 0; j < V::kLanes; ++j)
                    if (m + j < job.n && block.masked(a, n, m + j)) kept[j] = 0.f;
                both = V::load(kept);
            }
            out = V::fma(g0, both, out);
        }
        V::store(dl + m, out);
        if (with_a) V::store(a + m, V::mul(da, share));
    }
    if (needs.nce) dl[n] -= static_cast<float>(2 * g[0] / size_d);
    std::memcpy(job.dlogits + n * job.n, dl, sizeof(float) * job.n);
}

template <class V>
void adjacency_backward(const Adjacency& job) {
    constexpr int64_t width = Block<V>::kWidth;
    const Needs needs(job);
    const Panels<V> panels(job, needs);
    const int64_t size = Block<V>::padded(job.n), channels = ceil_div(job.c, width) * width;
    float g[4];
    for (int t = 0; t < 4; ++t) {
        const double terms = job.grad_terms == nullptr ? 0 : job.grad_terms[t];
        const double loss = job.grad_loss == nullptr ? 0 : *job.grad_loss * job.weights[t];
        g[t] = job.weights[t] == 0 ? 0.f : static_cast<float>(terms + loss);
    }
    // Statistics by column, +inf in the padding, so that exp(x - lse) is 0 there.
    const Scratch transposed(sizeof(float) * (kRowStats + 1) * size);
    float* stats_t = transposed.as<float>();
    for (int64_t m = 0; m < size; ++m) {
        for (int64_t s = 0; s < kRowStats; ++s)
            stats_t[s * size + m] = m < job.n ? job.row_stats[m * kRowStats + s] : 0.f;
        stats_t[kRowStats * size + m] = m < job.n ? job.col_lse[m] : 0.f;
    }
    // Products with the features: lanes are channels.
    const bool with_a = needs.s1 || needs.s2;
    const Scratch features(sizeof(float) * 3 * channels * job.n);
    float* lanes[3] = {features.as<float>(), features.as<float>() + channels * job.n,
                       features.as<float>() + 2 * channels * job.n};
    const float* sources[3] = {job.aud, job.foreground, job.avg};
    float* targets[3] = {job.daud, job.dforeground, job.davg};
    const bool wanted[3] = {with_a, needs.f, needs.i};
    for (int k = 0; k < 3; ++k)
        if (wanted[k]) pack_panels<V>(sources[k], 1, job.c, job.c, job.n, job.threads, lanes[k]);

    const int64_t height = Block<V>::rows(job.n, job.threads);
    const int64_t block_size = Block<V>::floats(job.n, job.c, height),
                  floats = block_size + size + height * channels;
    const Scratch scratch(sizeof(float) * job.threads * floats);
    parallel_for(job.threads, ceil_div(job.n, height), [&](int64_t task, int worker) {
        float* memory = scratch.as<float>() + worker * floats;
        const Block<V> block(job, height, memory);
        float* dl = memory + block_size;
        float* product = dl + size;
        const int64_t first = task * height, rows = smaller(height, job.n - first);
        fill_block(job, needs, panels, block, first, rows);
        for (int64_t r = 0; r < rows; ++r)
            adjacency_row_backward(job, needs, block, g, stats_t, first + r, r, dl);
        const float* matrices[3] = {block.a(), block.f(), block.i()};
        for (int k = 0; k < 3; ++k) {
            if (!wanted[k]) continue;
            multiply<V>(matrices[k], size, 1, rows, job.n, lanes[k], channels / width, block.piece(), product,
                        channels);
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t c = 0; c < job.c; ++c)
                    targets[k][(first + r) * job.c + c] = product[r * channels + c] * job.scale;
        }
    });
}

}  // namespace
}  // namespace fnac
