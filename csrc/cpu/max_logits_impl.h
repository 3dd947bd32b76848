// Max-pooled logits in float32: lanes are audios, so maximum and argmax are vertical.
#pragma once

namespace fnac {
namespace {

constexpr int64_t kPanelBytes = 512 * 1024;  // audio panels kept in L2 while image pieces pass by

template <class V>
void max_logits(const MaxLogits& job) {
    constexpr int64_t width = 2 * V::kLanes;
    const FeatureMap& img = job.img;
    if (img.p == 1 && job.only == nullptr) return max_logits_one_cell<V>(job);
    const int64_t panels = ceil_div(job.m, width), panel_size = img.c * width;
    const Scratch packed(panel_bytes<V>(job.m, img.c));
    pack_panels<V>(job.aud, img.c, 1, job.m, img.c, job.threads, packed.as<float>());

    const int64_t fit = kPanelBytes / static_cast<int64_t>(sizeof(float) * panel_size);
    const int64_t block = smaller(panels, fit < 1 ? 1 : fit), blocks = ceil_div(panels, block);
    // Cells are cut into equal pieces: 49 = 13 + 12 + 12 + 12, so that every tile keeps the FMA units busy.
    const int64_t pieces = ceil_div(img.p, V::kMaxCells);
    const int64_t piece_size = img.c * V::kMaxCells + V::kLanes, state_size = block * width;
    const int64_t worker_size = piece_size + 2 * state_size;
    const Scratch scratch(sizeof(float) * job.threads * worker_size);

    parallel_for(job.threads, blocks * img.n, [&](int64_t task, int worker) {
        const int64_t n = task % img.n, first = task / img.n * block;
        if (job.only != nullptr && !job.only[n]) return;
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
                pack_piece<V>(src, img.stride_p, img.stride_c, cells, img.c, piece);
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

}  // namespace
}  // namespace fnac
