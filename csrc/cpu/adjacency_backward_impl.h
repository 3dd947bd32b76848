// The gradients of the contrastive and adjacency terms. Tile by tile of the upper triangle, A, F and I become
// dA + dA', dF + dF' and dI + dI', which are symmetric too, and both of L's elements get their gradient, so
// each softmax is computed once; then they are multiplied by the features.
#pragma once

namespace fnac {
namespace {

// Gradients of the terms, the caller's and the weights' together.
struct TermGrads {
    float g[4];
    explicit TermGrads(const Adjacency& job) {
        for (int t = 0; t < 4; ++t) {
            const double terms = job.grad_terms == nullptr ? 0 : job.grad_terms[t];
            const double loss = job.grad_loss == nullptr ? 0 : *job.grad_loss * job.weights[t];
            g[t] = job.weights[t] == 0 ? 0.f : static_cast<float>(terms + loss);
        }
    }
};

enum ColumnStat { kLseColumn = kRowStats, kColumnStats = kLseColumn + 2 };

// row_stats and col_lse by statistic, padded by zeros: for lanes that are columns.
class ColumnStats {
  public:
    ColumnStats(const Adjacency& job, int64_t size)
        : size_(size), memory_(sizeof(float) * kColumnStats * size) {
        float* to = memory_.as<float>();
        for (int64_t m = 0; m < size; ++m) {
            for (int64_t s = 0; s < kRowStats; ++s)
                to[s * size + m] = m < job.n ? job.row_stats[m * kRowStats + s] : 0.f;
            for (int64_t s = 0; s < 2; ++s)
                to[(kLseColumn + s) * size + m] = m < job.n ? job.col_lse[s * job.n + m] : 0.f;
        }
    }
    const float* operator[](int64_t stat) const { return memory_.as<float>() + stat * size_; }

  private:
    int64_t size_;
    Scratch memory_;
};

// A row of a tile: of A, F and I, of L and its transposed, and of their gradients.
struct TileRow {
    const float *a, *f, *i, *l, *lt;
    float *da, *df, *di, *dl, *dlt;
};

template <class V>
class AdjacencyGradient {
    using F = typename V::F;

  public:
    AdjacencyGradient(const Adjacency& job, const Needs& needs, const ColumnStats& columns)
        : job_(job), needs_(needs), columns_(columns), grads_(job) {}

    // Row n of a tile whose columns are m0 .. m0 + count, whole vectors. dlt is written where kBoth.
    template <bool kBoth>
    void row(const TileRow& x, int64_t n, int64_t m0, int64_t count) const {
        const float* stats = job_.row_stats + n * kRowStats;
        const auto row = [&](int s) { return V::set(stats[s]); };
        const float* const g = grads_.g;
        const double size = static_cast<double>(job_.n);
        const F zero = V::set(0.f), g1 = V::set(g[1]), g2 = V::set(g[2]), g3 = V::set(g[3]);
        const F share = V::set(static_cast<float>(1 / (size * size)));
        const F g0 = V::set(static_cast<float>(g[0] / size));
        const bool with_a = needs_.s1 || needs_.s2, with_l = needs_.s1 || needs_.s3;
        for (int64_t m = 0; m < count; m += V::kLanes) {
            const auto column = [&](int s) { return V::load(columns_[s] + m0 + m); };
            const auto p = [&](const float* of, Stat lse) {
                return softmax<V>(of + m, row(lse), row(lse + 1));
            };
            const auto pt = [&](const float* of, Stat lse) {
                return softmax<V>(of + m, column(lse), column(lse + 1));
            };
            // The gradient of both elements of a symmetric matrix through softmaxes x and xt whose signs are
            // s and st.
            const auto both = [&](F x, F s, Stat sum, F xt, F st) {
                return V::add(V::mul(x, V::sub(s, row(sum))), V::mul(xt, V::sub(st, column(sum))));
            };
            const F pl = with_l ? p(x.l, kLseL) : zero, plt = with_l ? pt(x.lt, kLseL) : zero;
            const F pa = with_a ? p(x.a, kLseA) : zero, pat = with_a ? pt(x.a, kLseA) : zero;
            F gl = zero, dot = zero, glt = zero, dot_t = zero, da = zero;
            if (needs_.s1) {
                const F s = V::sign(V::sub(pa, pl)), st = V::sign(V::sub(pat, plt));
                da = V::mul(g1, both(pa, s, kS1A, pat, st));
                gl = V::mul(g1, s), glt = V::mul(g1, st);
                dot = V::mul(g1, row(kS1L)), dot_t = V::mul(g1, column(kS1L));
            }
            if (needs_.s2) {
                const F pf = p(x.f, kLseF), pft = pt(x.f, kLseF);
                const F s = V::sign(V::sub(pa, pf)), st = V::sign(V::sub(pat, pft));
                da = V::fma(g2, both(pa, s, kS2A, pat, st), da);
                const F df = V::mul(g2, both(pf, s, kS2F, pft, st));
                V::store(x.df + m, V::mul(V::sub(zero, df), share));
            }
            if (needs_.s3) {
                const F pi = p(x.i, kLseI), pit = pt(x.i, kLseI);
                const F s = V::sign(V::sub(pi, pl)), st = V::sign(V::sub(pit, plt));
                V::store(x.di + m, V::mul(V::mul(g3, both(pi, s, kS3I, pit, st)), share));
                gl = V::fma(g3, s, gl), glt = V::fma(g3, st, glt);
                dot = V::fma(g3, row(kS3L), dot), dot_t = V::fma(g3, column(kS3L), dot_t);
            }
            F dl = V::mul(V::mul(pl, V::sub(dot, gl)), share),
              dlt = V::mul(V::mul(plt, V::sub(dot_t, glt)), share);
            if (needs_.nce) {
                // Each element of L is in one row's softmax, pl where no pair is masked, and in one column's.
                const bool again = needs_.mask || !with_l;
                const F kept = again ? p(x.l, kLseKept) : pl, kept_t = again ? pt(x.lt, kLseKept) : plt;
                const F by_column = softmax<V>(x.l + m, column(kLseColumn), column(kLseColumn + 1));
                dl = V::fma(g0, unmasked(V::add(kept, by_column), x, n, m0, m), dl);
                if constexpr (kBoth) {
                    const float *high = job_.col_lse + n, *inverse = high + job_.n;
                    const F by_column_t = softmax<V>(x.lt + m, V::set(*high), V::set(*inverse));
                    dlt = V::fma(g0, unmasked(V::add(kept_t, by_column_t), x, n, m0, m), dlt);
                }
            }
            V::store(x.dl + m, dl);
            if constexpr (kBoth) V::store(x.dlt + m, dlt);
            if (with_a) V::store(x.da + m, V::mul(da, share));
        }
        if (needs_.nce && m0 <= n && n < m0 + count) x.dl[n - m0] -= static_cast<float>(2 * g[0] / size);
    }

  private:
    // The values of columns m0 + m and so on, 0 for pairs that leave the denominators.
    F unmasked(F values, const TileRow& x, int64_t n, int64_t m0, int64_t m) const {
        if (!needs_.mask) return values;
        float lanes[V::kLanes];
        V::store(lanes, values);
        for (int64_t j = 0; j < V::kLanes; ++j)
            if (masked(job_, x.a[m + j], n, m0 + m + j)) lanes[j] = 0.f;
        return V::load(lanes);
    }

    const Adjacency& job_;
    const Needs& needs_;
    const ColumnStats& columns_;
    TermGrads grads_;
};

// The gradients of the products A, F and I, which may be written in their place, and L's gradient.
template <class V>
void differentiate(const Adjacency& job, const Needs& needs, const Triangles<V>& matrices,
                   const Triangles<V>& gradients) {
    const Triangle<V>& triangle = matrices.triangle();
    const ColumnStats columns(job, triangle.padded());
    const AdjacencyGradient<V> gradient(job, needs, columns);
    constexpr int buffers = 4;
    const int64_t n = job.n, width = triangle.rows(), stride = width + 16, buffer_size = width * stride;
    const Scratch scratch(sizeof(float) * job.threads * buffers * buffer_size);
    parallel_for(job.threads, triangle.tiles(), [&](int64_t tile, int worker) {
        float* const l = scratch.as<float>() + worker * buffers * buffer_size;
        float *const lt = l + buffer_size, *const dl = lt + buffer_size, *const dlt = dl + buffer_size;
        int64_t strip = 0, other = tile;  // the strips of its rows and of its columns
        while (other >= triangle.strips() - strip) other -= triangle.strips() - strip++;
        other += strip;
        const int64_t n0 = triangle.first(strip), rows = triangle.rows(strip);
        const int64_t m0 = triangle.first(other), columns_here = triangle.rows(other);
        const int64_t padded = smaller(width, triangle.padded() - m0);
        transpose<V>(job.logits + m0 * n + n0, n, columns_here, rows, lt, stride);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t at = r * stride;
            std::memcpy(l + at, job.logits + (n0 + r) * n + m0, sizeof(float) * columns_here);
            for (int64_t m = columns_here; m < padded; ++m) l[at + m] = lt[at + m] = kNegInf;
            const auto of = [&](const Triangles<V>& matrix, Matrix k) {
                return needs.matrix[k] ? triangle.row(matrix[k], strip, n0 + r) + m0 - n0 : nullptr;
            };
            const TileRow row{of(matrices, kA),  of(matrices, kF),  of(matrices, kI),  l + at,  lt + at,
                              of(gradients, kA), of(gradients, kF), of(gradients, kI), dl + at, dlt + at};
            if (other == strip)
                gradient.template row<false>(row, n0 + r, m0, padded);
            else
                gradient.template row<true>(row, n0 + r, m0, padded);
            std::memcpy(job.dlogits + (n0 + r) * n + m0, dl + at, sizeof(float) * columns_here);
        }
        if (other != strip) transpose_exact<V>(dlt, stride, rows, columns_here, job.dlogits + m0 * n + n0, n);
    });
}

template <class V>
void adjacency_backward(const Adjacency& job) {
    constexpr int64_t width = Triangle<V>::kWidth;
    const Needs needs(job);
    const Similarities<V> similarities(job, needs, Pass::kBackward);
    const Triangles<V>& matrices = similarities.triangles();
    const Triangle<V>& triangle = matrices.triangle();
    // What the forward pass kept may be wanted again.
    const Scratch apart(similarities.kept() ? sizeof(float) * similarities.floats() : 0);
    const Triangles<V> gradients =
        similarities.kept() ? Triangles<V>(triangle, needs, apart.as<float>()) : matrices;
    differentiate<V>(job, needs, matrices, gradients);

    // Products with the features: lanes are channels.
    struct Product {
        const float *matrix, *features;
        float* out;
    } products[kMatrices];
    int64_t count = 0;
    if (needs.s1 || needs.s2) products[count++] = {gradients[kA], job.aud, job.daud};
    if (needs.s2) products[count++] = {gradients[kF], job.foreground, job.dforeground};
    if (needs.s3) products[count++] = {gradients[kI], job.avg, job.davg};
    const int64_t n = job.n, c = job.c, panels = ceil_div(c, width), each = panels * width * n;
    const Scratch packed(sizeof(float) * count * each);
    parallel_for(job.threads, count * panels, [&](int64_t task, int) {
        const int64_t k = task / panels, p = task % panels;
        pack_panel<V>(products[k].features, 1, c, c, n, p, packed.as<float>() + k * each + p * width * n);
    });
    const float scale = job.scale;
    const int64_t stride = panels * width, rows = triangle.rows();
    const int64_t worker_size = rows * (n + stride) + V::kLanes;
    const Scratch scratch(sizeof(float) * job.threads * worker_size);
    parallel_for(job.threads, count * triangle.strips(), [&](int64_t task, int worker) {
        const int64_t k = task / triangle.strips(), strip = task % triangle.strips();
        const int64_t first = triangle.first(strip), here = triangle.rows(strip);
        float* out = scratch.as<float>() + worker * worker_size;
        float* pieces = out + rows * stride;
        for (int64_t r = 0; r < here; r += V::kMaxCells)
            triangle.pack_rows(products[k].matrix, first + r, smaller(V::kMaxCells, here - r),
                               pieces + r * n);
        multiply_pieces<V>(pieces, here, n, packed.as<float>() + k * each, panels, out, stride);
        for (int64_t r = 0; r < here; ++r)
            for (int64_t i = 0; i < c; ++i)
                products[k].out[(first + r) * c + i] = out[r * stride + i] * scale;
    });
}

}  // namespace
}  // namespace fnac
