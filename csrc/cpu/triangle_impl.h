// Symmetric n x n matrices of which the upper triangle is kept: strips of rows, each from its own first
// column to the last. Strips begin at whole panels, so a strip of products of rows is a run of panels.
#pragma once

namespace fnac {
namespace {

template <class V>
class Triangle {
  public:
    static constexpr int64_t kWidth = 2 * V::kLanes;  // of a panel

    // Strips of so many rows, a multiple of kWidth.
    Triangle(int64_t n, int64_t rows) : n_(n), padded_(ceil_div(n, kWidth) * kWidth), rows_(rows) {}

    // Strips are lower where there are many threads for few rows.
    static Triangle for_threads(int64_t n, int threads) {
        const int64_t panels = smaller(n / (4 * threads * kWidth), kMostRows / kWidth);
        return {n, (panels < 1 ? 1 : panels) * kWidth};
    }

    int64_t n() const { return n_; }
    int64_t padded() const { return padded_; }  // columns of whole panels
    int64_t strips() const { return ceil_div(n_, rows_); }
    int64_t tiles() const { return strips() * (strips() + 1) / 2; }  // a strip by the columns of a strip
    int64_t rows() const { return rows_; }                           // of a strip; the last may have fewer
    int64_t rows(int64_t strip) const { return smaller(rows_, n_ - first(strip)); }
    int64_t first(int64_t strip) const { return strip * rows_; }  // its first row and its first column
    int64_t columns(int64_t strip) const { return padded_ - first(strip); }
    // From row to row: no power of two, whose rows would share few sets of the caches.
    int64_t stride(int64_t strip) const { return columns(strip) + kGap; }
    int64_t offset(int64_t strip) const {
        return rows_ * (strip * (padded_ + kGap) - rows_ * (strip * (strip - 1) / 2));
    }
    int64_t floats() const { return offset(strips()); }

    // to[r * stride + m] = matrix[first + r][m] for rows of one strip, in whole panels.
    void copy_rows(const float* matrix, int64_t first_row, int64_t count, float* to,
                   int64_t to_stride) const {
        const int64_t own = first_row / rows_;
        for (int64_t s = 0; s < own; ++s)
            transpose<V>(matrix + offset(s) + first_row - first(s), stride(s), rows_, count, to + first(s),
                         to_stride);
        const float* from = row(matrix, own, first_row);
        for (int64_t r = 0; r < count; ++r)
            std::memcpy(to + r * to_stride + first(own), from + r * stride(own),
                        sizeof(float) * columns(own));
    }

    // The same rows, at most kMaxCells, as a piece of the micro-kernel with k = n.
    void pack_rows(const float* matrix, int64_t first_row, int64_t count, float* to) const {
        const int64_t own = first_row / rows_;
        for (int64_t s = 0; s < own; ++s)
            pack_piece<V>(matrix + offset(s) + first_row - first(s), 1, stride(s), count, rows_,
                          to + first(s) * count);
        pack_piece<V>(row(matrix, own, first_row), stride(own), 1, count, n_ - first(own),
                      to + first(own) * count);
    }

    // Row n of the strip, from the strip's first column on.
    template <class Float>
    Float* row(Float* matrix, int64_t strip, int64_t n) const {
        return matrix + offset(strip) + (n - first(strip)) * stride(strip);
    }

  private:
    static constexpr int64_t kMostRows = 48 < 2 * kWidth ? 2 * kWidth : 48, kGap = 16;

    int64_t n_, padded_, rows_;
};

}  // namespace
}  // namespace fnac
