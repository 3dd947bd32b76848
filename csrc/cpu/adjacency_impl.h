// The contrastive and adjacency terms. A = a a', F = f f' and I = v v' are symmetric (bitwise: the same
// products in the same order), so half of each is computed. The forward pass leaves them to the backward pass
// where the caller has room; elsewhere they are computed again. Row m of a transposed softmax at column n is
// exp(A[n, m] - lse[m]).
//
// Padding: padded columns of every matrix hold -inf, whose exp is 0.
//
// Columns of row_stats: what makes softmaxes of the rows of A, F, I, L, of L without the masked pairs, each a
// pair (maximum, inverse of the sum of exponentials), which costs no digit, as a log-sum-exp does; then the
// row sums of s1 P_A, s2 P_A, s2 P_F, s3 P_I, s1 P_L, s3 P_L with s1 = sign(P_A - P_L), s2 = sign(P_A - P_F),
// s3 = sign(P_I - P_L). col_lse is the same of the columns of L without the masked pairs: n maxima, n
// inverses.
#pragma once

namespace fnac {
namespace {

// clang-format off
enum Stat { kLseA = 0, kLseF = 2, kLseI = 4, kLseL = 6, kLseKept = 8, kS1A = 10, kS2A, kS2F, kS3I, kS1L, kS3L };
// clang-format on

enum Matrix { kA, kF, kI, kMatrices };

// Which matrices the wanted terms read.
struct Needs {
    bool nce, s1, s2, s3, mask, matrix[kMatrices];
    explicit Needs(const Adjacency& job)
        : nce(job.weights[0] != 0),
          s1(job.weights[1] != 0),
          s2(job.weights[2] != 0),
          s3(job.weights[3] != 0),
          mask(job.masked && nce),
          matrix{s1 || s2 || mask, s2, s3} {}
    int64_t matrices() const { return matrix[kA] + matrix[kF] + matrix[kI]; }
};

// Whether pair (n, m) leaves the InfoNCE denominators; a is its element of A.
inline bool masked(const Adjacency& job, float a, int64_t n, int64_t m) {
    return n != m && a >= job.threshold * job.scale;
}

// A triangle for each of A, F and I that the terms need, one after the other.
template <class V>
class Triangles {
  public:
    Triangles(const Triangle<V>& triangle, const Needs& needs, float* memory) : triangle_(triangle) {
        for (const Matrix k : {kA, kF, kI}) {
            matrices_[k] = needs.matrix[k] ? memory : nullptr;
            if (needs.matrix[k]) memory += triangle.floats();
        }
    }
    const Triangle<V>& triangle() const { return triangle_; }
    float* operator[](Matrix k) const { return matrices_[k]; }

  private:
    Triangle<V> triangle_;
    float* matrices_[kMatrices];
};

enum class Pass { kForward, kBackward };

// A, F and I with their scale. What the forward pass keeps begins with the rows of a strip, which depend on
// its number of threads, or 0 where there was no room. What of it has no meaning is 0, because operators'
// results are compared.
template <class V>
class Similarities {
  public:
    Similarities(const Adjacency& job, const Needs& needs, Pass pass)
        : found_(pass == Pass::kBackward && job.kept_size > 0 && job.kept[0] > 0),
          triangle_(found_ ? Triangle<V>(job.n, static_cast<int64_t>(job.kept[0]))
                           : Triangle<V>::for_threads(job.n, job.threads)),
          floats_(needs.matrices() * triangle_.floats()),
          kept_(found_ || (pass == Pass::kForward && kHeader + floats_ <= job.kept_size)),
          own_(kept_ ? 0 : sizeof(float) * floats_),
          triangles_(triangle_, needs, kept_ ? job.kept + kHeader : own_.template as<float>()) {
        if (pass == Pass::kForward && kept_) {
            std::memset(job.kept, 0, sizeof(float) * kHeader);
            job.kept[0] = static_cast<float>(triangle_.rows());
            const int64_t used = kHeader + floats_;
            std::memset(job.kept + used, 0, sizeof(float) * (job.kept_size - used));
        } else if (pass == Pass::kForward && job.kept_size > 0) {
            job.kept[0] = 0;  // and nothing else: fresh pages that nobody touches take no memory
        }
        if (!found_) multiply_all(job, needs);
    }

    const Triangles<V>& triangles() const { return triangles_; }
    int64_t floats() const { return floats_; }
    bool kept() const { return kept_; }

  private:
    static constexpr int64_t kWidth = Triangle<V>::kWidth, kHeader = 16;

    void multiply_all(const Adjacency& job, const Needs& needs) {
        const Triangle<V>& t = triangle_;
        const float* const all[kMatrices] = {job.aud, job.foreground, job.avg};
        const float* sources[kMatrices];
        float* outs[kMatrices];
        int64_t count = 0;
        for (const Matrix k : {kA, kF, kI})
            if (needs.matrix[k]) sources[count] = all[k], outs[count++] = triangles_[k];
        const int64_t c = job.c, panels = t.padded() / kWidth, each = t.padded() * c;
        const Scratch packed(sizeof(float) * count * each);
        parallel_for(job.threads, count * panels, [&](int64_t task, int) {
            const int64_t k = task / panels, p = task % panels;
            pack_panel<V>(sources[k], c, 1, t.n(), c, p, packed.as<float>() + k * each + p * kWidth * c);
        });
        const float scale = job.scale;
        const int64_t piece_size = t.rows() * c + V::kLanes;
        const Scratch pieces(sizeof(float) * job.threads * piece_size);
        // Strips become shorter: the longest first, so that threads end together.
        parallel_for(job.threads, count * t.strips(), [&](int64_t task, int worker) {
            const int64_t k = task % count, strip = task / count, first = t.first(strip);
            const int64_t columns = t.columns(strip), stride = t.stride(strip);
            float* out = outs[k] + t.offset(strip);
            multiply<V>(sources[k] + first * c, c, 1, t.rows(strip), c,
                        packed.as<float>() + k * each + first * c, columns / kWidth,
                        pieces.as<float>() + worker * piece_size, out, stride);
            for (int64_t r = 0; r < t.rows(strip); ++r) {
                float* row = out + r * stride;
                for (int64_t m = 0; m < t.n() - first; ++m) row[m] *= scale;
                for (int64_t m = t.n() - first; m < columns; ++m) row[m] = kNegInf;
                std::memset(row + columns, 0, sizeof(float) * (stride - columns));
            }
            std::memset(out + t.rows(strip) * stride, 0, sizeof(float) * (t.rows() - t.rows(strip)) * stride);
        });
    }

    bool found_;  // as the forward pass left them
    Triangle<V> triangle_;
    int64_t floats_;
    bool kept_;
    Scratch own_;
    Triangles<V> triangles_;
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

// A row of every matrix, padded: l of the logits, lt of their transposed.
struct Row {
    const float *a, *f, *i, *l, *lt;
};

template <class V>
void adjacency_row(const Adjacency& job, const Needs& needs, const Row& x, int64_t size, int64_t n,
                   float* kept, double* terms) {
    using F = typename V::F;
    float* stats = job.row_stats + n * kRowStats;
    for (int64_t s = 0; s < kRowStats; ++s) stats[s] = 0.f;
    const SumExp unmasked = sum_exp<V>(x.l, size);
    unmasked.write(stats + kLseL);
    if (needs.s1 || needs.s2) sum_exp<V>(x.a, size).write(stats + kLseA);
    if (needs.s2) sum_exp<V>(x.f, size).write(stats + kLseF);
    if (needs.s3) sum_exp<V>(x.i, size).write(stats + kLseI);
    job.col_lse[n] = job.col_lse[job.n + n] = 0.f;
    if (needs.nce) {
        const auto kept_sum = [&](const float* logits) {
            for (int64_t m = 0; m < size; ++m) kept[m] = masked(job, x.a[m], n, m) ? kNegInf : logits[m];
            return sum_exp<V>(kept, size);
        };
        const SumExp row = needs.mask ? kept_sum(x.l) : unmasked;
        const SumExp column = needs.mask ? kept_sum(x.lt) : sum_exp<V>(x.lt, size);
        row.write(stats + kLseKept);
        const auto entropy = [&](SumExp of) {
            return static_cast<double>(of.high - x.l[n]) + std::log(of.sum);
        };
        terms[0] = entropy(row) + entropy(column);
        job.col_lse[n] = column.high, job.col_lse[job.n + n] = 1 / column.sum;
    }
    AbsSign<V> s1, s2, s3;
    const auto p = [&](const float* logits, Stat lse) {
        return softmax<V>(logits, V::set(stats[lse]), V::set(stats[lse + 1]));
    };
    for (int64_t m = 0; m < size; m += V::kLanes) {
        const F pl = needs.s1 || needs.s3 ? p(x.l + m, kLseL) : V::set(0.f);
        const F pa = needs.s1 || needs.s2 ? p(x.a + m, kLseA) : V::set(0.f);
        if (needs.s1) s1.add(pa, pl);
        if (needs.s2) s2.add(pa, p(x.f + m, kLseF));
        if (needs.s3) s3.add(p(x.i + m, kLseI), pl);
    }
    terms[1] = V::sum(s1.total);
    terms[2] = V::sum(s2.total);
    terms[3] = V::sum(s3.total);
    stats[kS1A] = V::sum(s1.first), stats[kS1L] = V::sum(s1.second);
    stats[kS2A] = V::sum(s2.first), stats[kS2F] = V::sum(s2.second);
    stats[kS3I] = V::sum(s3.first), stats[kS3L] = V::sum(s3.second);
}

template <class V>
void adjacency(const Adjacency& job) {
    const Needs needs(job);
    const Similarities<V> similarities(job, needs, Pass::kForward);
    const Triangles<V>& of = similarities.triangles();
    const Triangle<V>& triangle = of.triangle();
    const int64_t n = job.n, size = triangle.padded();
    // Blocks of rows: a line of memory of every column, half of it where rows are long or few.
    constexpr int64_t width = Triangle<V>::kWidth, most_bytes = 1 << 20;
    constexpr int buffers = 5;
    const bool low = buffers * sizeof(float) * size * width > most_bytes || n < 2 * job.threads * width;
    const int64_t height = low ? V::kLanes : width;
    const int64_t buffer_size = height * size, worker_size = buffers * buffer_size + size;
    const Scratch scratch(sizeof(float) * job.threads * worker_size);
    const Scratch row_terms(sizeof(double) * n * 4);
    double* terms = row_terms.as<double>();
    parallel_for(job.threads, ceil_div(n, height), [&](int64_t task, int worker) {
        float* memory = scratch.as<float>() + worker * worker_size;
        const int64_t first = task * height, rows = smaller(height, n - first);
        float* matrices[kMatrices];
        for (const Matrix k : {kA, kF, kI}) {
            matrices[k] = memory + k * buffer_size;
            if (needs.matrix[k]) triangle.copy_rows(of[k], first, rows, matrices[k], size);
        }
        float *l = memory + kMatrices * buffer_size, *lt = l + buffer_size, *kept = lt + buffer_size;
        transpose<V>(job.logits + first, n, n, rows, lt, size);
        for (int64_t r = 0; r < rows; ++r) {
            std::memcpy(l + r * size, job.logits + (first + r) * n, sizeof(float) * n);
            for (int64_t m = n; m < size; ++m) l[r * size + m] = lt[r * size + m] = kNegInf;
            double* t = terms + (first + r) * 4;
            t[0] = t[1] = t[2] = t[3] = 0;
            const auto row = [&](const float* x) { return x + r * size; };
            adjacency_row<V>(job, needs,
                             {row(matrices[kA]), row(matrices[kF]), row(matrices[kI]), row(l), row(lt)}, size,
                             first + r, kept, t);
        }
    });
    double loss = 0;
    for (int t = 0; t < 4; ++t) {
        double total = 0;
        for (int64_t m = 0; m < n; ++m) total += terms[m * 4 + t];
        const double pairs = static_cast<double>(n);
        const double mean = job.weights[t] == 0 ? 0 : total / (t == 0 ? pairs : pairs * pairs);
        job.terms[t] = static_cast<float>(mean);
        loss += job.weights[t] == 0 ? 0 : job.weights[t] * mean;
    }
    *job.loss = static_cast<float>(loss);
}

}  // namespace
}  // namespace fnac
