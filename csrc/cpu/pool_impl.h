// Localization maps, foreground masks and pooled features of matched pairs: one image at a time, which stays
// in L2 between the pass that makes its map and the pass that pools by it.
#pragma once

namespace fnac {
namespace {

constexpr float kMinMaxEps = 1e-5f;

void minmax_mask(const float* map, int64_t p, float threshold, uint8_t* mask, float* weights) {
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

// map[p] = scale * sum_c aud[c] * x[c][p], lanes are cells.
template <class V, class T>
void map_nchw(const T* x, const float* aud, int64_t c, int64_t p, float scale, float* map) {
    constexpr int kVectors = 4;
    for (int64_t first = 0; first < p; first += kVectors * V::kLanes) {
        typename V::F acc[kVectors];
        int64_t rest[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            acc[v] = V::set(0.f);
            rest[v] = p - first - v * V::kLanes;
            rest[v] = rest[v] < 0 ? 0 : rest[v];
        }
        for (int64_t i = 0; i < c; ++i)
            for (int v = 0; v < kVectors; ++v)
                if (rest[v] > 0)
                    acc[v] =
                        V::fma(V::set(aud[i]), V::load_n(x + i * p + first + v * V::kLanes, rest[v]), acc[v]);
        for (int v = 0; v < kVectors; ++v)
            V::store_n(map + first + v * V::kLanes, V::mul(acc[v], V::set(scale)), rest[v]);
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
    for (int64_t i = 0; i < c; ++i) {
        typename V::F all = V::set(0.f), fore = V::set(0.f);
        for (int64_t j = 0; j < p; j += V::kLanes) {
            const typename V::F value = V::load_n(x + i * p + j, p - j);
            all = V::add(all, value);
            fore = V::fma(V::load_n(weights + j, p - j), value, fore);
        }
        foreground[i] = share * V::sum(fore);
        if (avg != nullptr) avg[i] = share * V::sum(all);
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
