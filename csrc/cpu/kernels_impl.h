// The CPU kernels over a traits type V (vector width, registers, a few instructions); each kernels_<isa>.cpp
// defines its V and includes this once. Everything here has internal linkage: code compiled for one
// instruction set must never be the copy that the linker keeps for another, so no standard container is used
// either.
//
// One micro-kernel does all dense products: R rows ("cells", broadcast) times a panel of 2 vectors ("lanes"),
// over a common length k. A piece is stored [k][R], a panel [k][2 * kLanes]. Lanes are audios in the forward
// pass, so maximum and argmax are vertical; they are channels in the products of the adjacency gradient.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace fnac {
namespace {

constexpr float kMinMaxEps = 1e-5f;
constexpr int64_t kPanelBytes = 512 * 1024;  // audio panels kept in L2 while image pieces pass by
constexpr int64_t kSlice = 32;               // channels that the sparse backward handles at a time
constexpr int64_t kGroupBytes = 256 * 1024;  // features and gradients of the images it handles at a time

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// --- dtypes ---

float widen(float x) { return x; }
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};
float widen(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
float widen(Float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
    const uint32_t rest = x.bits & 0x7fff;
    if (rest >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // Scaling by 2^112 moves the exponent's bias and makes half denormals normal.
    const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
}
void narrow(float x, float& out) { out = x; }
void narrow(float x, BFloat16& out) {  // to nearest, ties to even
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if (x != x) {
        out.bits = 0x7fc0;
    } else {
        out.bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}
void narrow(float x, Float16& out) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) {
        out.bits = sign | 0x7e00;
    } else if (magnitude >= 0x477ff000) {  // 65520 rounds to infinity
        out.bits = sign | 0x7c00;
    } else if (magnitude < 0x38800000) {  // denormal: adding 0.5 leaves the rounded bits at the bottom
        const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
        out.bits = sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(shifted) - 0x3f000000);
    } else {
        magnitude += 0xc8000fff + ((magnitude >> 13) & 1);
        out.bits = sign | static_cast<uint16_t>(magnitude >> 13);
    }
}

template <class Body>
void with_dtype(Dtype dtype, Body&& body) {
    switch (dtype) {
        case Dtype::kFloat32:
            return body(float{});
        case Dtype::kBFloat16:
            return body(BFloat16{});
        case Dtype::kFloat16:
            return body(Float16{});
    }
}

// --- packing ---

// out[k][rows] = src(row, k), for a piece of rows.
template <class T>
void pack_piece(const T* src, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, float* out) {
    if (row_stride == 1) {
        for (int64_t i = 0; i < k; ++i)
            for (int64_t r = 0; r < rows; ++r) out[i * rows + r] = widen(src[i * k_stride + r]);
    } else {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < k; ++i) out[i * rows + r] = widen(src[r * row_stride + i * k_stride]);
    }
}

// out[panel][k][width] = src(lane, k), zero beyond the last lane.
void pack_panels(const float* src, int64_t lane_stride, int64_t k_stride, int64_t lanes, int64_t k,
                 int64_t width, int threads, float* out) {
    parallel_for(threads, ceil_div(lanes, width), [&](int64_t panel, int) {
        float* to = out + panel * k * width;
        for (int64_t i = 0; i < k; ++i) {
            for (int64_t j = 0; j < width; ++j) {
                const int64_t lane = panel * width + j;
                to[i * width + j] = lane < lanes ? src[lane * lane_stride + i * k_stride] : 0.f;
            }
        }
    });
}

// --- the micro-kernel and its two epilogues ---

template <class V, int R>
inline __attribute__((always_inline)) void dot_tile(const float* piece, const float* panel, int64_t k,
                                                    typename V::F (&acc)[R][2]) {
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = V::set(0.f);
    for (int64_t i = 0; i < k; ++i) {
        const typename V::F b0 = V::load(panel + i * 2 * V::kLanes);
        const typename V::F b1 = V::load(panel + i * 2 * V::kLanes + V::kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const typename V::F a = V::set(piece[i * R + r]);
            acc[r][0] = V::fma(a, b0, acc[r][0]);
            acc[r][1] = V::fma(a, b1, acc[r][1]);
        }
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

// --- max_logits ---

template <class V>
void max_logits(const MaxLogits& job) {
    constexpr int64_t width = 2 * V::kLanes;
    const FeatureMap& img = job.img;
    const int64_t panels = ceil_div(job.m, width), panel_size = img.c * width;
    const Scratch packed(sizeof(float) * panels * panel_size);
    pack_panels(job.aud, img.c, 1, job.m, img.c, width, job.threads, packed.as<float>());

    const int64_t fit = kPanelBytes / static_cast<int64_t>(sizeof(float) * panel_size);
    const int64_t block = smaller(panels, fit < 1 ? 1 : fit), blocks = ceil_div(panels, block);
    // Cells are cut into equal pieces: 49 = 13 + 12 + 12 + 12, so that every tile keeps the FMA units busy.
    const int64_t pieces = ceil_div(img.p, V::kMaxCells);
    const int64_t piece_size = img.c * V::kMaxCells, state_size = block * width;
    const int64_t worker_size = piece_size + 2 * state_size;
    const Scratch scratch(sizeof(float) * job.threads * worker_size);

    parallel_for(job.threads, blocks * img.n, [&](int64_t task, int worker) {
        const int64_t n = task % img.n, first = task / img.n * block;
        const int64_t count = smaller(block, panels - first);
        float* piece = scratch.as<float>() + worker * worker_size;
        float* best = piece + piece_size;
        int32_t* index = reinterpret_cast<int32_t*>(best + state_size);
        for (int64_t i = 0; i < count * width; ++i) best[i] = -std::numeric_limits<float>::infinity();
        std::memset(index, 0, sizeof(int32_t) * count * width);
        for (int64_t q = 0; q < pieces; ++q) {
            const int64_t begin = q * img.p / pieces, cells = (q + 1) * img.p / pieces - begin;
            with_dtype(img.dtype, [&]<class T>(T) {
                const T* src = static_cast<const T*>(img.data) + n * img.image_size() + begin * img.stride_p;
                pack_piece(src, img.stride_p, img.stride_c, cells, img.c, piece);
            });
            for (int64_t i = 0; i < count; ++i) {
                kTiles<V>.max[cells](piece, packed.as<float>() + (first + i) * panel_size, img.c,
                                     static_cast<int32_t>(begin), best + i * width, index + i * width);
            }
        }
        const int64_t m0 = first * width, columns = smaller(count * width, job.m - m0);
        for (int64_t i = 0; i < columns; ++i) {
            job.logits[n * job.m + m0 + i] = best[i] * job.scale;
            job.argmax[n * job.m + m0 + i] = static_cast<uint16_t>(index[i]);
        }
    });
}

// --- pool ---

void minmax_mask(const float* map, int64_t p, float threshold, uint8_t* mask) {
    float low = map[0], high = map[0];
    for (int64_t i = 0; i < p; ++i) {  // a NaN makes every comparison below false, as in PyTorch
        low = map[i] < low || map[i] != map[i] ? map[i] : low;
        high = map[i] > high || map[i] != map[i] ? map[i] : high;
    }
    for (int64_t i = 0; i < p; ++i) mask[i] = (map[i] - low) / (high - low + kMinMaxEps) > threshold;
}

template <class T>
void pool_image(const Pool& job, int64_t n) {
    const FeatureMap& img = job.img;
    const T* src = static_cast<const T*>(img.data) + n * img.image_size();
    float* map = job.maps + n * img.p;
    const bool nchw = img.stride_p == 1;
    if (job.aud != nullptr) {
        const float* aud = job.aud + n * img.c;
        std::memset(map, 0, sizeof(float) * img.p);
        if (nchw) {
            for (int64_t c = 0; c < img.c; ++c)
                for (int64_t p = 0; p < img.p; ++p) map[p] += aud[c] * widen(src[c * img.stride_c + p]);
        } else {
            for (int64_t p = 0; p < img.p; ++p) {
                float lanes[16] = {};
                const T* row = src + p * img.stride_p;
                int64_t c = 0;
                for (; c + 16 <= img.c; c += 16)
                    for (int64_t i = 0; i < 16; ++i) lanes[i] += aud[c + i] * widen(row[c + i]);
                for (; c < img.c; ++c) lanes[0] += aud[c] * widen(row[c]);
                for (const float lane : lanes) map[p] += lane;
            }
        }
        for (int64_t p = 0; p < img.p; ++p) map[p] *= job.scale;
    }
    if (job.mask == nullptr) return;
    uint8_t* mask = job.mask + n * img.p;
    minmax_mask(map, img.p, job.threshold, mask);
    float* foreground = job.foreground + n * img.c;
    float* avg = job.avg == nullptr ? nullptr : job.avg + n * img.c;
    const float share = 1.f / static_cast<float>(img.p);
    std::memset(foreground, 0, sizeof(float) * img.c);
    if (avg != nullptr) std::memset(avg, 0, sizeof(float) * img.c);
    // 0 * x and not a skipped x: a NaN or inf in the background reaches the mean as it does in PyTorch.
    for (int64_t a = 0; a < (nchw ? img.c : img.p); ++a) {
        for (int64_t b = 0; b < (nchw ? img.p : img.c); ++b) {
            const int64_t c = nchw ? a : b, p = nchw ? b : a;
            const float x = widen(src[c * img.stride_c + p * img.stride_p]);
            foreground[c] += static_cast<float>(mask[p]) * x;
            if (avg != nullptr) avg[c] += x;
        }
    }
    for (int64_t c = 0; c < img.c; ++c) {
        foreground[c] *= share;
        if (avg != nullptr) avg[c] *= share;
    }
}

template <class V>
void pool(const Pool& job) {
    parallel_for(job.threads, job.img.n, [&](int64_t n, int) {
        with_dtype(job.img.dtype, [&]<class T>(T) { pool_image<T>(job, n); });
    });
}

// --- feature_backward ---

// A task owns a slice of channels, so daud has one writer and needs no reduction: results do not depend on
// threads.
template <class V, class T>
void backward_slice(const FeatureBackward& job, int64_t first, int64_t images, float* features, float* grads,
                    float* aud, float* daud) {
    constexpr int kVectors = kSlice / V::kLanes;
    const FeatureMap& img = job.img;
    const int64_t width = smaller(kSlice, img.c - first), cells = img.p * kSlice;
    const float share = 1.f / static_cast<float>(img.p);
    if (job.aud != nullptr) {
        for (int64_t m = 0; m < job.m; ++m)
            for (int64_t j = 0; j < kSlice; ++j)
                aud[m * kSlice + j] = j < width ? job.aud[m * img.c + first + j] * job.scale : 0.f;
        std::memset(daud, 0, sizeof(float) * job.m * kSlice);
    }
    for (int64_t n0 = 0; n0 < img.n; n0 += images) {
        const int64_t count = smaller(images, img.n - n0);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t n = n0 + i;
            const T* src = static_cast<const T*>(img.data) + n * img.image_size() + first * img.stride_c;
            float* x = features + i * cells;
            float* d = grads + i * cells;
            if (job.daud != nullptr) {
                for (int64_t j = 0; j < kSlice; ++j)
                    for (int64_t p = 0; p < img.p; ++p)
                        x[p * kSlice + j] = j < width ? widen(src[j * img.stride_c + p * img.stride_p]) : 0.f;
            }
            for (int64_t j = 0; j < kSlice; ++j) {
                const bool inside = j < width;
                const float mean = inside && job.grad_avg ? job.grad_avg[n * img.c + first + j] * share : 0.f;
                const float fore =
                    inside && job.grad_foreground ? job.grad_foreground[n * img.c + first + j] * share : 0.f;
                for (int64_t p = 0; p < img.p; ++p)
                    d[p * kSlice + j] =
                        mean +
                        (job.mask != nullptr ? static_cast<float>(job.mask[n * img.p + p]) * fore : 0.f);
            }
            if (job.grad_maps != nullptr) {
                for (int64_t p = 0; p < img.p; ++p) {
                    const float g = job.grad_maps[n * img.p + p];
                    for (int64_t j = 0; j < kSlice; ++j) {
                        d[p * kSlice + j] += g * aud[n * kSlice + j];
                        if (job.daud != nullptr) daud[n * kSlice + j] += g * x[p * kSlice + j];
                    }
                }
            }
        }
        if (job.grad_logits != nullptr) {
            for (int64_t m = 0; m < job.m; ++m) {
                typename V::F a[kVectors], da[kVectors];
                for (int v = 0; v < kVectors; ++v) {
                    a[v] = V::load(aud + m * kSlice + v * V::kLanes);
                    da[v] = V::load(daud + m * kSlice + v * V::kLanes);
                }
                for (int64_t i = 0; i < count; ++i) {
                    const int64_t pair = (n0 + i) * job.m + m;
                    const typename V::F g = V::set(job.grad_logits[pair]);
                    const int64_t cell = i * cells + job.argmax[pair] * kSlice;
                    for (int v = 0; v < kVectors; ++v) {
                        float* d = grads + cell + v * V::kLanes;
                        V::store(d, V::fma(g, a[v], V::load(d)));
                        da[v] = V::fma(g, V::load(features + cell + v * V::kLanes), da[v]);
                    }
                }
                for (int v = 0; v < kVectors; ++v) V::store(daud + m * kSlice + v * V::kLanes, da[v]);
            }
        }
        if (job.dimg == nullptr) continue;
        for (int64_t i = 0; i < count; ++i) {
            T* to = static_cast<T*>(job.dimg) + (n0 + i) * img.image_size() + first * img.stride_c;
            const float* d = grads + i * cells;
            if (img.stride_p == 1) {
                for (int64_t j = 0; j < width; ++j)
                    for (int64_t p = 0; p < img.p; ++p) narrow(d[p * kSlice + j], to[j * img.stride_c + p]);
            } else {
                for (int64_t p = 0; p < img.p; ++p)
                    for (int64_t j = 0; j < width; ++j) narrow(d[p * kSlice + j], to[p * img.stride_p + j]);
            }
        }
    }
    if (job.daud != nullptr) {
        for (int64_t m = 0; m < job.m; ++m)
            for (int64_t j = 0; j < width; ++j)
                job.daud[m * img.c + first + j] = daud[m * kSlice + j] * job.scale;
    }
}

template <class V>
void feature_backward(const FeatureBackward& job) {
    const FeatureMap& img = job.img;
    const int64_t fit = kGroupBytes / static_cast<int64_t>(2 * sizeof(float) * img.p * kSlice);
    const int64_t images = smaller(img.n, fit < 1 ? 1 : smaller(fit, 8));
    const int64_t group = images * img.p * kSlice, rows = (job.aud == nullptr ? 0 : job.m) * kSlice;
    const int64_t worker_size = 2 * group + 2 * rows;
    const Scratch scratch(sizeof(float) * job.threads * worker_size);
    std::memset(scratch.as<float>(), 0, sizeof(float) * job.threads * worker_size);
    parallel_for(job.threads, ceil_div(img.c, kSlice), [&](int64_t slice, int worker) {
        float* mine = scratch.as<float>() + worker * worker_size;
        with_dtype(img.dtype, [&]<class T>(T) {
            backward_slice<V, T>(job, slice * kSlice, images, mine, mine + group, mine + 2 * group,
                                 mine + 2 * group + rows);
        });
    });
}

}  // namespace
}  // namespace fnac

#include "cpu/adjacency_impl.h"

namespace fnac {
namespace {

template <class V>
const Kernels& kernels_of() {
    static const Kernels table{V::kName,     max_logits<V>,        pool<V>, feature_backward<V>,
                               adjacency<V>, adjacency_backward<V>};
    return table;
}

}  // namespace
}  // namespace fnac
