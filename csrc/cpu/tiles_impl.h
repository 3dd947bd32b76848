// One micro-kernel does all dense products: R rows ("cells", broadcast) times a panel of 2 vectors ("lanes"),
// over a common length k. A piece is stored [k][R], a panel [k][2 * kLanes]. Lanes are audios in the forward
// pass, so maximum and argmax are vertical; they are channels in the products of the adjacency gradient.
#pragma once

namespace fnac {
namespace {

constexpr int64_t kChain = 128;  // products that are added up one after the other

// Longer sums are sums of such sums, since each addition rounds by the size of what was added up before it.
template <class V, int R>
inline __attribute__((always_inline)) void dot_tile(const float* piece, const float* panel, int64_t k,
                                                    typename V::F (&acc)[R][2]) {
    typename V::F before[R][2];
    for (int64_t begin = 0;; begin += kChain) {
        const int64_t end = smaller(begin + kChain, k);
        for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = V::set(0.f);
        for (int64_t i = begin; i < end; ++i) {
            const typename V::F b0 = V::load(panel + i * 2 * V::kLanes);
            const typename V::F b1 = V::load(panel + i * 2 * V::kLanes + V::kLanes);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const typename V::F a = V::set(piece[i * R + r]);
                acc[r][0] = V::fma(a, b0, acc[r][0]);
                acc[r][1] = V::fma(a, b1, acc[r][1]);
            }
        }
        if (begin > 0) {
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < 2; ++v) acc[r][v] = V::add(before[r][v], acc[r][v]);
        }
        if (end == k) return;
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < 2; ++v) before[r][v] = acc[r][v];
    }
}

template <class V, int R>
void tile_max(const float* piece, const float* panel, int64_t k, int32_t first_cell, float* best,
              int32_t* index) {
    typename V::F acc[R][2];
    dot_tile<V, R>(piece, panel, k, acc);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        V::update_max(acc[r][0], first_cell + r, best, index);
        V::update_max(acc[r][1], first_cell + r, best + V::kLanes, index + V::kLanes);
    }
}

template <class V, int R>
void tile_store(const float* piece, const float* panel, int64_t k, int64_t out_stride, float* out) {
    typename V::F acc[R][2];
    dot_tile<V, R>(piece, panel, k, acc);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        V::store(out + r * out_stride, acc[r][0]);
        V::store(out + r * out_stride + V::kLanes, acc[r][1]);
    }
}

template <class V>
struct Tiles {
    using Max = void (*)(const float*, const float*, int64_t, int32_t, float*, int32_t*);
    using Store = void (*)(const float*, const float*, int64_t, int64_t, float*);
    Max max[V::kMaxCells + 1];
    Store store[V::kMaxCells + 1];
};

template <class V, int... R>
constexpr Tiles<V> make_tiles(std::integer_sequence<int, R...>) {
    return {{nullptr, tile_max<V, R + 1>...}, {nullptr, tile_store<V, R + 1>...}};
}

template <class V>
constexpr Tiles<V> kTiles = make_tiles<V>(std::make_integer_sequence<int, V::kMaxCells>{});

// out[r][width p + j] = sum_i x[r][i] * panels[p][i][j], width = 2 * kLanes, for rows that were packed:
// pieces of kMaxCells rows, the last of what is left. A panel is read once for all rows.
template <class V>
void multiply_pieces(const float* pieces, int64_t rows, int64_t k, const float* panels, int64_t count,
                     float* out, int64_t out_stride) {
    constexpr int64_t width = 2 * V::kLanes;
    for (int64_t p = 0; p < count; ++p)
        for (int64_t r = 0; r < rows; r += V::kMaxCells)
            kTiles<V>.store[smaller(V::kMaxCells, rows - r)](pieces + r * k, panels + p * k * width, k,
                                                             out_stride, out + r * out_stride + p * width);
}

// The same of x as it lies. `pieces` has room for rows * k + kLanes elements.
template <class V, class T>
void multiply(const T* x, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, const float* panels,
              int64_t count, float* pieces, float* out, int64_t out_stride) {
    for (int64_t r = 0; r < rows; r += V::kMaxCells)
        pack_piece<V>(x + r * row_stride, row_stride, k_stride, smaller(V::kMaxCells, rows - r), k,
                      pieces + r * k);
    multiply_pieces<V>(pieces, rows, k, panels, count, out, out_stride);
}

}  // namespace
}  // namespace fnac
