// Localization maps, foreground masks and pooled features of matched pairs: one image at a time, which stays
// in L2 between the pass that makes its map and the pass that pools by it.
#pragma once

namespace fnac {
namespace {

constexpr float kMinMaxEps = 1e-5f;

inline void minmax_mask(const float* map, int64_t p, float threshold, uint8_t* mask, float* weights) {
    float low = map[0], high = map[0];
    for (int64_t i = 0; i < p; ++i) {  // a NaN makes every comparison below false, as in PyTorch
        low = map[i] < low || map[i] != map[i] ? map[i] : low;
        high = map[i] > high || map[i] != map[i] ? map[i] : high;
    }
    for (int64_t i = 0; i < p; ++i) {
        mask[i] = (map[i] - low) / (high - low + kMinMaxEps) > threshold;
        weights[i] = mask[i];
    }
}

// kVectors vectors of a map, `last` elements in the last of them.
template <class V, int kVectors, class T>
void map_vectors(const T* x, const float* aud, int64_t c, int64_t p, int64_t last, float scale, float* map) {
    typename V::F even[kVectors], odd[kVectors];
    for (int v = 0; v < kVectors; ++v) even[v] = odd[v] = V::set(0.f);
    const auto add_channel = [&](int64_t i, typename V::F(&sums)[kVectors]) {
        const typename V::F a = V::set(aud[i]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            const int64_t count = v + 1 < kVectors ? V::kLanes : last;
            sums[v] = V::fma(a, V::load_n(x + i * p + v * V::kLanes, count), sums[v]);
        }
    };
    for (int64_t i = 0; i + 1 < c; i += 2) {
        add_channel(i, even);
        add_channel(i + 1, odd);
    }
    if (c % 2 == 1) add_channel(c - 1, even);
    for (int v = 0; v < kVectors; ++v) {
        const typename V::F sum = V::mul(V::add(even[v], odd[v]), V::set(scale));
        V::store_n(map + v * V::kLanes, sum, v + 1 < kVectors ? V::kLanes : last);
    }
}

// map[p] = scale * sum_c aud[c] * x[c][p], lanes are cells.
template <class V, class T>
void map_nchw(const T* x, const float* aud, int64_t c, int64_t p, float scale, float* map) {
    constexpr decltype(&map_vectors<V, 1, T>) kMaps[] = {map_vectors<V, 1, T>, map_vectors<V, 2, T>,
                                                         map_vectors<V, 3, T>, map_vectors<V, 4, T>};
    constexpr int64_t kMost = 4 * V::kLanes;
    for (int64_t first = 0; first < p; first += kMost) {
        const int64_t vectors = ceil_div(smaller(p - first, kMost), V::kLanes);
        const int64_t last = smaller(p - first - (vectors - 1) * V::kLanes, V::kLanes);
        kMaps[vectors - 1](x + first, aud, c, p, last, scale, map + first);
    }
}

// The same of channels_last features, lanes are channels.
template <class V, class T>
void map_channels_last(const T* x, const float* aud, int64_t c, int64_t p, float scale, float* map) {
    for (int64_t i = 0; i < p; ++i) {
        typename V::F even = V::set(0.f), odd = V::set(0.f);
        for (int64_t j = 0; j < c; j += 2 * V::kLanes) {
            even = V::fma(V::load_n(aud + j, c - j), V::load_n(x + i * c + j, c - j), even);
            const int64_t k = j + V::kLanes;
            if (k < c) odd = V::fma(V::load_n(aud + k, c - k), V::load_n(x + i * c + k, c - k), odd);
        }
        map[i] = scale * V::sum(V::add(even, odd));
    }
}

// Sums over cells of x and of weight * x: with weight 0 a product and not a skipped cell, so that a NaN or
// inf in the background reaches the mean as it does in PyTorch.
template <class V, class T>
void sums_nchw(const T* x, const float* weights, int64_t c, int64_t p, float share, float* avg,
               float* foreground) {
    constexpr int kTogether = 4;
    for (int64_t first = 0; first < c; first += kTogether) {
        typename V::F all[kTogether], fore[kTogether];
        const T* rows[kTogether];  // the last again where there are not so many
        for (int i = 0; i < kTogether; ++i) {
            all[i] = fore[i] = V::set(0.f);
            rows[i] = x + smaller(first + i, c - 1) * p;
        }
        const auto add_cells = [&](int64_t j, int64_t count) {
            const typename V::F weight = V::load_n(weights + j, count);
#pragma GCC unroll 4
            for (int i = 0; i < kTogether; ++i) {
                const typename V::F value = V::load_n(rows[i] + j, count);
                all[i] = V::add(all[i], value);
                fore[i] = V::fma(weight, value, fore[i]);
            }
        };
        int64_t j = 0;
        for (; j + V::kLanes <= p; j += V::kLanes) add_cells(j, V::kLanes);
        if (j < p) add_cells(j, p - j);
        float all_sums[kTogether], fore_sums[kTogether];
        V::sums(all, all_sums);
        V::sums(fore, fore_sums);
        for (int64_t i = 0; i < smaller(kTogether, c - first); ++i) {
            foreground[first + i] = share * fore_sums[i];
            if (avg != nullptr) avg[first + i] = share * all_sums[i];
        }
    }
}

template <class V, class T>
void sums_channels_last(const T* x, const float* weights, int64_t c, int64_t p, float share, float* avg,
                        float* foreground) {
    constexpr int kVectors = 4;
    for (int64_t first = 0; first < c; first += kVectors * V::kLanes) {
        typename V::F all[kVectors], fore[kVectors];
        int64_t rest[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            all[v] = fore[v] = V::set(0.f);
            rest[v] = c - first - v * V::kLanes;
            rest[v] = rest[v] < 0 ? 0 : rest[v];
        }
        for (int64_t i = 0; i < p; ++i) {
            for (int v = 0; v < kVectors; ++v) {
                if (rest[v] == 0) continue;
                const typename V::F value = V::load_n(x + i * c + first + v * V::kLanes, rest[v]);
                all[v] = V::add(all[v], value);
                fore[v] = V::fma(V::set(weights[i]), value, fore[v]);
            }
        }
        for (int v = 0; v < kVectors; ++v) {
            if (rest[v] == 0) continue;
            const int64_t at = first + v * V::kLanes;
            V::store_n(foreground + at, V::mul(fore[v], V::set(share)), rest[v]);
            if (avg != nullptr) V::store_n(avg + at, V::mul(all[v], V::set(share)), rest[v]);
        }
    }
}

template <class V, class T>
void pool_image(const Pool& job, int64_t n, float* weights) {
    const FeatureMap& img = job.img;
    const T* x = static_cast<const T*>(img.data) + n * img.image_size();
    float* map = job.maps + n * img.p;
    const bool nchw = img.stride_p == 1;
    if (job.aud != nullptr) {
        const auto make_map = nchw ? map_nchw<V, T> : map_channels_last<V, T>;
        make_map(x, job.aud + n * img.c, img.c, img.p, job.scale, map);
    }
    if (job.mask == nullptr) return;
    minmax_mask(map, img.p, job.threshold, job.mask + n * img.p, weights);
    const auto make_sums = nchw ? sums_nchw<V, T> : sums_channels_last<V, T>;
    make_sums(x, weights, img.c, img.p, 1.f / static_cast<float>(img.p),
              job.avg == nullptr ? nullptr : job.avg + n * img.c, job.foreground + n * img.c);
}

template <class V>
void pool(const Pool& job) {
    const Scratch weights(sizeof(float) * job.threads * job.img.p);
    parallel_for(job.threads, job.img.n, [&](int64_t n, int worker) {
        with_dtype(job.img.dtype,
                   [&]<class T>(T) { pool_image<V, T>(job, n, weights.as<float>() + worker * job.img.p); });
    });
}

}  // namespace
}  // namespace fnac
