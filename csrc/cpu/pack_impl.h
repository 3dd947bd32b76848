// Rearranging features: transposition in registers, pieces of cells and panels of lanes for the micro-kernel.
#pragma once

namespace fnac {
namespace {

// A block of height x width elements, at most kLanes each, transposed; 0 beyond. A whole block of floats goes
// the traits' way, which lets loads do part of the work.
template <class V, class T>
inline __attribute__((always_inline)) void load_transposed(const T* from, int64_t stride, int64_t height,
                                                           int64_t width, typename V::F (&x)[V::kLanes]) {
    if constexpr (requires { V::load_transposed(from, stride, x); }) {
        if (height >= V::kLanes && width >= V::kLanes) return V::load_transposed(from, stride, x);
    }
    for (int64_t i = 0; i < V::kLanes; ++i)
        x[i] = i < height ? V::load_n(from + i * stride, width) : V::set(0.f);
    V::transpose(x);
}

// to[i * to_stride] = from[i * from_stride]: of a block of one row or one column, such as the last of 49
// cells, a transposition in registers would be mostly 0. Whether it was done.
template <class From, class To>
bool copy_line(const From* from, int64_t from_stride, int64_t count, To* to, int64_t to_stride) {
    if constexpr (std::is_same_v<From, float> && std::is_same_v<To, float>) {
        for (int64_t i = 0; i < count; ++i) to[i * to_stride] = from[i * from_stride];
        return true;
    }
    return false;
}

// to[c * to_stride + r] = from[r * from_stride + c] for `rows` x `cols` elements. Where rows is no multiple
// of kLanes, up to kLanes - 1 elements after a row of `to` are overwritten too, before the next row is
// written. `fetch(r, c)`, before the block there, may prefetch what is read later.
template <class V, class From, class To, class Fetch>
void transpose(const From* from, int64_t from_stride, int64_t rows, int64_t cols, To* to, int64_t to_stride,
               Fetch fetch) {
    for (int64_t r = 0; r < rows; r += V::kLanes) {
        const int64_t height = smaller(V::kLanes, rows - r);
        for (int64_t c = 0; c < cols; c += V::kLanes) {
            const int64_t width = smaller(V::kLanes, cols - c);
            if (width == 1 &&
                copy_line(from + r * from_stride + c, from_stride, height, to + c * to_stride + r, 1))
                continue;
            fetch(r, c);
            typename V::F x[V::kLanes];
            load_transposed<V>(from + r * from_stride + c, from_stride, height, width, x);
            for (int64_t i = 0; i < width; ++i) V::store(to + (c + i) * to_stride + r, x[i]);
        }
    }
}

// Rows are read a vector at a time: no stream that the hardware would see ahead, so the next are prefetched.
template <class V, class From, class To>
void transpose(const From* from, int64_t from_stride, int64_t rows, int64_t cols, To* to, int64_t to_stride) {
    transpose<V>(from, from_stride, rows, cols, to, to_stride, [&](int64_t r, int64_t c) {
        for (int64_t i = 0; i < V::kLanes; ++i)
            __builtin_prefetch(from + (r + i + V::kLanes) * from_stride + c);
    });
}

// The same, and nothing else is overwritten; rows of `to` are finished one group after the other, as suits a
// result that leaves the caches.
template <class V, class To>
void transpose_exact(const float* from, int64_t from_stride, int64_t rows, int64_t cols, To* to,
                     int64_t to_stride) {
    for (int64_t c = 0; c < cols; c += V::kLanes) {
        const int64_t width = smaller(V::kLanes, cols - c);
        for (int64_t r = 0; r < rows; r += V::kLanes) {
            const int64_t height = smaller(V::kLanes, rows - r);
            if (height == 1 &&
                copy_line(from + r * from_stride + c, 1, width, to + c * to_stride + r, to_stride))
                continue;
            typename V::F x[V::kLanes];
            load_transposed<V>(from + r * from_stride + c, from_stride, height, width, x);
            for (int64_t i = 0; i < width; ++i) V::store_n(to + (c + i) * to_stride + r, x[i], height);
        }
    }
}

// out[k][rows] = src(row, k), for a piece of at most kMaxCells rows; out has room for kLanes elements more.
template <class V, class T>
void pack_piece(const T* src, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, float* out) {
    static_assert(V::kMaxCells <= V::kLanes);
    if (row_stride == 1) {
        for (int64_t i = 0; i < k; ++i) V::store(out + i * rows, V::load_n(src + i * k_stride, rows));
    } else {
        transpose<V>(src, row_stride, rows, k, out, rows);
    }
}

template <class V>
size_t panel_bytes(int64_t lanes, int64_t k) {
    return sizeof(float) * ceil_div(lanes, 2 * V::kLanes) * 2 * V::kLanes * k;
}

// Panel `panel` of lanes: out[k][width] = src(width * panel + lane, k), zero beyond the last lane;
// width = 2 * kLanes, and one stride is 1.
template <class V, class T>
void pack_panel(const T* src, int64_t lane_stride, int64_t k_stride, int64_t lanes, int64_t k, int64_t panel,
                float* out) {
    constexpr int64_t width = 2 * V::kLanes;
    for (int64_t half = 0; half < width; half += V::kLanes) {
        const int64_t first = panel * width + half;
        const int64_t count = first < lanes ? smaller(V::kLanes, lanes - first) : 0;
        if (lane_stride == 1) {
            for (int64_t i = 0; i < k; ++i)
                V::store(out + i * width + half, V::load_n(src + first + i * k_stride, count));
        } else {
            // No rows are read beyond the last lane, and whole vectors are written.
            for (int64_t i = 0; i < k; i += V::kLanes) {
                const int64_t depth = smaller(V::kLanes, k - i);
                typename V::F x[V::kLanes];
                load_transposed<V>(src + first * lane_stride + i, lane_stride, count, depth, x);
                for (int64_t j = 0; j < depth; ++j) V::store(out + (i + j) * width + half, x[j]);
            }
        }
    }
}

// All panels, one after the other.
template <class V, class T>
void pack_panels(const T* src, int64_t lane_stride, int64_t k_stride, int64_t lanes, int64_t k, int threads,
                 float* out) {
    constexpr int64_t width = 2 * V::kLanes;
    parallel_for(threads, ceil_div(lanes, width), [&](int64_t panel, int) {
        pack_panel<V>(src, lane_stride, k_stride, lanes, k, panel, out + panel * k * width);
    });
}

}  // namespace
}  // namespace fnac
