// The gradient of the features, sparse in the logits: each pair touches one cell. A task owns a slice of
// channels for a part of the images. Per group of images the slice of features T and of gradients D lies as
// [cell][kSlice], small enough for the near caches; going once over the audios does D[k] += g * a and
// da += g * T[k]. The pooled terms' gradients are D's initial value, so dimg is written once. With more
// threads than slices the images are parted, and daud is added up over the parts in their order: results
// depend on the number of threads only there.
#pragma once

namespace fnac {
namespace {

constexpr int64_t kGroupBytes = 128 * 1024;  // T and D of the images handled at a time
constexpr int64_t kMaxGroup = 8;
constexpr int64_t kStreamedFrom = 16 * 1024 * 1024;  // bytes of dimg that no cache will hold until it is read

template <class V, class T>
class BackwardSlice {
    using F = typename V::F;
    static constexpr int kVectors = 4;
    static constexpr int64_t kBytes = sizeof(T);
    static constexpr bool kStreams = std::is_same_v<T, float>;

  public:
    static constexpr int64_t kSlice = kVectors * V::kLanes;  // channels

    // memory: 2 * (images * cells + m) * kSlice floats
    BackwardSlice(const FeatureBackward& job, int64_t first, int64_t images, float* daud, float* memory)
        : job_(job),
          to_(daud),
          first_(first),
          width_(smaller(kSlice, job.img.c - first)),
          streams_(kStreams && kBytes * job.img.n * job.img.image_size() >= kStreamedFrom),
          cells_(job.img.p * kSlice),
          features_(memory),
          grads_(memory + images * cells_),
          aud_(grads_ + images * cells_),
          daud_(aud_ + job.m * kSlice) {
        if (job.aud != nullptr) load_audio();
    }

    // The images [begin, end). Slices start at images far apart: threads that reach fresh pages of dimg
    // together would wait for each other.
    void run(int64_t begin, int64_t end, int64_t images) const {
        const int64_t groups = ceil_div(end - begin, images), start = first_ / kSlice * 5 % 8 * groups / 8;
        const auto image = [&](int64_t i) { return begin + (start + i) % groups * images; };
        for (int64_t i = 0; i < groups; ++i) {
            const int64_t n = image(i), next = image(i + 1);
            group(n, smaller(images, end - n),
                  {*this, next, i + 1 < groups ? smaller(images, end - next) : 0});
        }
        if (job_.daud != nullptr) store_audio();
        if (streams_) V::streamed();
    }

  private:
    void load_audio() const {
        for (int64_t m = 0; m < job_.m; ++m) {
            for (int v = 0; v < kVectors; ++v) {
                const F a = part(job_.aud + m * job_.img.c, v);
                V::store(aud_ + m * kSlice + v * V::kLanes, V::mul(a, V::set(job_.scale)));
                V::store(daud_ + m * kSlice + v * V::kLanes, V::set(0.f));
            }
        }
    }

    // A share of a part of the images is not the place for what comes from elsewhere.
    void store_audio() const {
        const float* more = to_ == job_.daud ? job_.grad_aud : nullptr;
        for (int64_t m = 0; m < job_.m; ++m)
            for (int v = 0; v < kVectors; ++v)
                if (v * V::kLanes < width_)
                    V::store_n(to_ + m * job_.img.c + first_ + v * V::kLanes,
                               V::fma(V::load(daud_ + m * kSlice + v * V::kLanes), V::set(job_.scale),
                                      part(more == nullptr ? nullptr : more + m * job_.img.c, v)),
                               width_ - v * V::kLanes);
    }

    // Vector v of this slice of a row of channels, 0 beyond the last channel and where there is no row.
    template <class S>
    F part(const S* row, int v) const {
        if (row == nullptr || v * V::kLanes >= width_) return V::set(0.f);
        return V::load_n(row + first_ + v * V::kLanes, width_ - v * V::kLanes);
    }

    // This slice of the next group's features and gradients, fetched line by line while this group's are
    // summed up: from image to image it is pages apart, so no hardware sees it ahead.
    class Ahead {
      public:
        Ahead(const BackwardSlice& slice, int64_t n, int64_t count)
            : features_(slice.job_.daud == nullptr ? nullptr : static_cast<const T*>(slice.job_.img.data)),
              grads_(slice.streams_ ? nullptr : static_cast<T*>(slice.job_.dimg)) {
            const FeatureMap& img = slice.job_.img;
            const bool nchw = img.stride_p == 1;  // then an image's slice is one run, else one for each cell
            lines_ = ceil_div((nchw ? img.p : 1) * slice.width_, kLine);
            step_ = nchw ? img.image_size() : img.stride_p;
            run_ = n * img.image_size() + slice.first_ * img.stride_c;
            left_ = slice.job_.dimg == nullptr ? 0 : count * (nchw ? 1 : img.p) * lines_;
        }
        int64_t left() const { return left_; }
        void fetch(int64_t lines) {
            for (lines = smaller(lines, left_), left_ -= lines; lines > 0; --lines) {
                const int64_t at = run_ + line_ * kLine;
                if (features_ != nullptr) __builtin_prefetch(features_ + at, 0, 2);
                if (grads_ != nullptr) __builtin_prefetch(grads_ + at, 1, 2);
                if (++line_ == lines_) line_ = 0, run_ += step_;
            }
        }

      private:
        static constexpr int64_t kLine = 64 / sizeof(T);
        const T* features_;
        T* grads_;
        int64_t lines_, step_, run_, left_, line_ = 0;
    };

    void group(int64_t n0, int64_t count, Ahead ahead) const {
        for (int64_t i = 0; i < count; ++i) {
            if (job_.daud != nullptr) load_features(n0 + i, features_ + i * cells_);
            start_gradient(n0 + i, grads_ + i * cells_);
            if (job_.grad_maps != nullptr) add_maps(n0 + i, features_ + i * cells_, grads_ + i * cells_);
        }
        if (job_.grad_logits != nullptr) {
            if (job_.daud != nullptr && job_.dimg != nullptr)
                add_logits<true, true>(n0, count, ahead);
            else if (job_.daud != nullptr)
                add_logits<false, true>(n0, count, ahead);
            else
                add_logits<true, false>(n0, count, ahead);
        }
        if (job_.dimg != nullptr)
            for (int64_t i = 0; i < count; ++i)
                store_gradient(n0 + i, grads_ + i * cells_, features_ + i * cells_);
    }

    void load_features(int64_t n, float* to) const {
        const FeatureMap& img = job_.img;
        const T* from = static_cast<const T*>(img.data) + n * img.image_size();
        if (img.stride_p == 1) {
            transpose<V>(from + first_ * img.stride_c, img.stride_c, width_, img.p, to, kSlice);
        } else {
            for (int64_t p = 0; p < img.p; ++p)
                for (int v = 0; v < kVectors; ++v)
                    V::store(to + p * kSlice + v * V::kLanes, part(from + p * img.stride_p, v));
        }
    }

    void start_gradient(int64_t n, float* d) const {
        const int64_t p = job_.img.p;
        const F share = V::set(1.f / static_cast<float>(p));
        F mean[kVectors], fore[kVectors];
        const auto row = [&](const float* rows) { return rows == nullptr ? nullptr : rows + n * job_.img.c; };
        for (int v = 0; v < kVectors; ++v) {
            mean[v] = V::mul(part(row(job_.grad_avg), v), share);
            fore[v] = V::mul(part(row(job_.grad_foreground), v), share);
        }
        for (int64_t i = 0; i < p; ++i) {
            const F weight = V::set(job_.mask != nullptr ? static_cast<float>(job_.mask[n * p + i]) : 0.f);
            for (int v = 0; v < kVectors; ++v)
                V::store(d + i * kSlice + v * V::kLanes, V::fma(weight, fore[v], mean[v]));
        }
    }

    void add_maps(int64_t n, const float* x, float* d) const {
        for (int64_t p = 0; p < job_.img.p; ++p) add(job_.grad_maps[n * job_.img.p + p], n, x, d, p);
    }

    void add(float g, int64_t m, const float* x, float* d, int64_t p) const {
        for (int v = 0; v < kVectors; ++v) {
            const int64_t lane = v * V::kLanes, cell = p * kSlice + lane, audio = m * kSlice + lane;
            V::store(d + cell, V::fma(V::set(g), V::load(aud_ + audio), V::load(d + cell)));
            if (job_.daud != nullptr)
                V::store(daud_ + audio, V::fma(V::set(g), V::load(x + cell), V::load(daud_ + audio)));
        }
    }

    // What the loops read is copied to locals: a vector store may alias any member, which would be read
    // again.
    template <bool kImg, bool kAud>
    void add_logits(int64_t n0, int64_t count, Ahead ahead) const {
        const int64_t audios = job_.m, cells = cells_;
        const float *const features = features_, *const aud = aud_;
        float *const grads = grads_, *const daud = daud_;
        const float* const weights = job_.grad_logits + n0 * audios;
        const uint16_t* const argmax = job_.argmax + n0 * audios;
        const int64_t lines = ceil_div(ahead.left(), audios);
        for (int64_t m = 0; m < audios; ++m) {
            ahead.fetch(lines);
            F a[kVectors], da[kVectors];
            for (int v = 0; v < kVectors; ++v) {
                a[v] = V::load(aud + m * kSlice + v * V::kLanes);
                da[v] = V::set(0.f);
            }
            for (int64_t i = 0; i < count; ++i) {
                const F g = V::set(weights[i * audios + m]);
                const int64_t cell = i * cells + argmax[i * audios + m] * kSlice;
                float* const d = grads + cell;
                const float* const x = features + cell;
                for (int v = 0; v < kVectors; ++v) {
                    if constexpr (kImg)
                        V::store(d + v * V::kLanes, V::fma(g, a[v], V::load(d + v * V::kLanes)));
                    if constexpr (kAud) da[v] = V::fma(g, V::load(x + v * V::kLanes), da[v]);
                }
            }
            if constexpr (kAud)
                for (int v = 0; v < kVectors; ++v) {
                    float* const sum = daud + m * kSlice + v * V::kLanes;
                    V::store(sum, V::add(V::load(sum), da[v]));
                }
        }
    }

    // Whether `count` elements from `to` on are whole lines of memory, to be written past the caches: these
    // would read each line first.
    bool streams(const T* to, int64_t count) const {
        constexpr int64_t line = 64;
        return streams_ && reinterpret_cast<uintptr_t>(to) % line == 0 && kBytes * count % line == 0;
    }
    static void stream(const float* from, int64_t count, float* to) {
        for (int64_t i = 0; i < count; i += V::kLanes) V::stream(to + i, V::load(from + i));
    }

    // `room`: of the image's features, which are not needed any more.
    void store_gradient(int64_t n, const float* d, float* room) const {
        const FeatureMap& img = job_.img;
        T* to = static_cast<T*>(job_.dimg) + n * img.image_size() + first_ * img.stride_c;
        if (img.stride_p == 1) {
            if constexpr (kStreams) {
                if (streams(to, width_ * img.p)) {
                    transpose_exact<V>(d, kSlice, img.p, width_, room, img.p);
                    return stream(room, width_ * img.p, to);
                }
            }
            return transpose_exact<V>(d, kSlice, img.p, width_, to, img.p);
        }
        for (int64_t p = 0; p < img.p; ++p, to += img.stride_p, d += kSlice) {
            if constexpr (kStreams) {
                if (width_ == kSlice && streams(to, kSlice)) {
                    stream(d, kSlice, to);
                    continue;
                }
            }
            for (int v = 0; v < kVectors; ++v)
                if (v * V::kLanes < width_)
                    V::store_n(to + v * V::kLanes, V::load(d + v * V::kLanes), width_ - v * V::kLanes);
        }
    }

    const FeatureBackward& job_;
    float* const to_;  // (m, c): daud, or the share of a part of the images
    const int64_t first_, width_;
    const bool streams_;
    const int64_t cells_;
    float *const features_, *const grads_, *const aud_, *const daud_;
};

template <class V>
void feature_backward(const FeatureBackward& job) {
    constexpr int64_t kSlice = BackwardSlice<V, float>::kSlice;
    const FeatureMap& img = job.img;
    if (img.p == 1) return feature_backward_one_cell<V>(job);
    const int64_t fit = kGroupBytes / static_cast<int64_t>(2 * sizeof(float) * img.p * kSlice);
    const int64_t images = smaller(img.n, fit < 1 ? 1 : smaller(fit, kMaxGroup));
    const int64_t worker_size = 2 * (images * img.p + job.m) * kSlice;
    const Scratch scratch(sizeof(float) * job.threads * worker_size);
    const int64_t slices = ceil_div(img.c, kSlice), audio_size = job.m * img.c;
    const int64_t parts = slices < job.threads ? smaller(job.threads / slices, ceil_div(img.n, images)) : 1;
    const bool shared = parts > 1 && job.daud != nullptr;
    const Scratch shares(shared ? sizeof(float) * parts * audio_size : 0);
    parallel_for(job.threads, slices * parts, [&](int64_t task, int worker) {
        const int64_t part = task / slices, first = task % slices * kSlice;
        float* memory = scratch.as<float>() + worker * worker_size;
        float* daud = shared ? shares.as<float>() + part * audio_size : job.daud;
        with_dtype(img.dtype, [&]<class T>(T) {
            const BackwardSlice<V, T> slice(job, first, images, daud, memory);
            slice.run(part * img.n / parts, (part + 1) * img.n / parts, images);
        });
    });
    if (!shared) return;
    parallel_for(job.threads, job.m, [&](int64_t m, int) {
        for (int64_t c = m * img.c; c < (m + 1) * img.c; ++c) {
            float sum = job.grad_aud == nullptr ? 0.f : job.grad_aud[c];
            for (int64_t part = 0; part < parts; ++part) sum += shares.as<float>()[part * audio_size + c];
            job.daud[c] = sum;
        }
    });
}

}  // namespace
}  // namespace fnac
