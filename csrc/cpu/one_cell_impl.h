// Maps of one cell: there is nothing to choose from, so the logits and both gradients are dense products.
#pragma once

namespace fnac {
namespace {

// Calls finish(r, row) for each row of the product of x, (rows, k) with these strides, and panels of
// `columns` lanes. Where k is 0, so are the rows, and x may be null.
template <class V, class T, class Finish>
void dense_product(const T* x, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k,
                   const Scratch& panels, int64_t columns, int threads, Finish&& finish) {
    if (k == 0) row_stride = 0;                   // null has no rows to step to
    constexpr int64_t height = 4 * V::kMaxCells;  // rows that a panel serves while it is in L1
    const int64_t count = ceil_div(columns, 2 * V::kLanes), stride = count * 2 * V::kLanes;
    const int64_t piece_size = height * k + V::kLanes, worker_size = piece_size + height * stride;
    const Scratch scratch(sizeof(float) * threads * worker_size);
    parallel_for(threads, ceil_div(rows, height), [&](int64_t task, int worker) {
        float* piece = scratch.as<float>() + worker * worker_size;
        float* out = piece + piece_size;
        const int64_t first = task * height, here = smaller(height, rows - first);
        multiply<V>(x + first * row_stride, row_stride, k_stride, here, k, panels.as<float>(), count, piece,
                    out, stride);
        for (int64_t r = 0; r < here; ++r) finish(first + r, out + r * stride);
    });
}

template <class V>
void max_logits_one_cell(const MaxLogits& job) {
    const FeatureMap& img = job.img;
    const Scratch sounds(panel_bytes<V>(job.m, img.c));
    pack_panels<V>(job.aud, img.c, 1, job.m, img.c, job.threads, sounds.as<float>());
    std::memset(job.argmax, 0, sizeof(uint16_t) * img.n * job.m);
    with_dtype(img.dtype, [&]<class T>(T) {
        dense_product<V>(static_cast<const T*>(img.data), img.c, 1, img.n, img.c, sounds, job.m, job.threads,
                         [&](int64_t n, const float* row) {
                             for (int64_t m = 0; m < job.m; ++m)
                                 job.logits[n * job.m + m] = row[m] * job.scale;
                         });
    });
}

template <class V, class T>
void image_gradient_one_cell(const FeatureBackward& job) {
    using F = typename V::F;
    const int64_t c = job.img.c, k = job.grad_logits == nullptr ? 0 : job.m;
    const Scratch sounds(panel_bytes<V>(c, k));
    pack_panels<V>(job.aud, 1, c, c, k, job.threads, sounds.as<float>());
    dense_product<V>(job.grad_logits, k, 1, job.img.n, k, sounds, c, job.threads,
                     [&](int64_t n, const float* row) {
                         const F weight = V::set(job.mask == nullptr ? 0.f : static_cast<float>(job.mask[n]));
                         const F map = V::set(job.grad_maps == nullptr ? 0.f : job.grad_maps[n]),
                                 scale = V::set(job.scale);
                         for (int64_t i = 0; i < c; i += V::kLanes) {
                             const auto of = [&](const float* rows) {
                                 return rows == nullptr ? V::set(0.f) : V::load_n(rows + n * c + i, c - i);
                             };
                             F g = V::load(row + i);
                             if (job.grad_maps != nullptr) g = V::fma(map, of(job.aud), g);
                             g = V::fma(scale, g, V::fma(weight, of(job.grad_foreground), of(job.grad_avg)));
                             V::store_n(static_cast<T*>(job.dimg) + n * c + i, g, c - i);
                         }
                     });
}

template <class V, class T>
void audio_gradient_one_cell(const FeatureBackward& job) {
    using F = typename V::F;
    const int64_t c = job.img.c, k = job.grad_logits == nullptr ? 0 : job.img.n;
    const T* images = static_cast<const T*>(job.img.data);
    const Scratch cells(panel_bytes<V>(c, k));
    pack_panels<V>(images, 1, c, c, k, job.threads, cells.as<float>());
    dense_product<V>(
        job.grad_logits, 1, job.m, job.m, k, cells, c, job.threads, [&](int64_t m, const float* row) {
            const F map = V::set(job.grad_maps == nullptr ? 0.f : job.grad_maps[m]),
                    scale = V::set(job.scale);
            for (int64_t i = 0; i < c; i += V::kLanes) {
                F g = V::load(row + i);
                if (job.grad_maps != nullptr) g = V::fma(map, V::load_n(images + m * c + i, c - i), g);
                const F more =
                    job.grad_aud == nullptr ? V::set(0.f) : V::load_n(job.grad_aud + m * c + i, c - i);
                V::store_n(job.daud + m * c + i, V::fma(scale, g, more), c - i);
            }
        });
}

template <class V>
void feature_backward_one_cell(const FeatureBackward& job) {
    with_dtype(job.img.dtype, [&]<class T>(T) {
        if (job.dimg != nullptr) image_gradient_one_cell<V, T>(job);
        if (job.daud != nullptr) audio_gradient_one_cell<V, T>(job);
    });
}

}  // namespace
}  // namespace fnac
