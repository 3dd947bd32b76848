// Localization maps, foreground masks and pooled features: map_kernel makes a tile of cells' maps, then
// cell_sums_kernel reads the features once more, mostly from L2, and sums them over the cells. Two kernels
// and not one, so that few images with large maps fill the machine as well.
//
// Lanes go along whatever lies contiguous in memory, cells of NCHW or channels of channels_last.
#include "cuda/cell_sums.cuh"
#include "cuda/sums.cuh"

namespace fnac::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr float kMinMaxEps = 1e-5f;

struct MapArguments {
    const void* img;
    const void* aud;
    float* maps;
    int c, p;
    int64_t stride_c, stride_p;
    float scale;
    int blocks;  // of an image
};

// NCHW: each warp sums a share of the channels of 32 cells, shared memory brings the shares together.
// channels_last: each warp makes the maps of four cells, one after the other.
template <class T>
FNAC_KERNEL(kThreads, 3)
map_kernel(const MapArguments job) {
    const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
    const int64_t n = block_x() / job.blocks;
    const int first = static_cast<int>(block_x() % job.blocks) * kWarpSize;
    const T* img = static_cast<const T*>(job.img) + n * job.c * job.p;
    const T* aud = static_cast<const T*>(job.aud) + n * job.c;
    float* map = job.maps + n * job.p;
    if (job.stride_p == 1) {
        float* shares = reinterpret_cast<float*>(shared_memory());
        const int p = first + lane;
        float sum = 0.f;
        if (p < job.p) {
#pragma unroll 8
            for (int c = warp; c < job.c; c += kWarps)
                sum = multiply_add(widen(aud[c]), widen(img[c * job.stride_c + p]), sum);
        }
        shares[warp * kWarpSize + lane] = sum;
        block_barrier();
        if (warp != 0 || p >= job.p) return;
        for (int other = 1; other < kWarps; ++other) sum += shares[other * kWarpSize + lane];
        map[p] = sum * job.scale;
        return;
    }
    for (int i = warp; i < kWarpSize; i += kWarps) {
        const int p = first + i;
        if (p >= job.p) return;
        float sum = 0.f;
#pragma unroll 8
        for (int c = lane; c < job.c; c += kWarpSize)
            sum = multiply_add(widen(aud[c]), widen(img[p * job.stride_p + c]), sum);
        sum = warp_sum(sum);
        if (lane == 0) map[p] = sum * job.scale;
    }
}

struct CellSumsArguments {
    CellSums sums;
    int blocks;  // of an image
};

constexpr int kChannels = 64;  // of a block
constexpr int kOwn = kChannels / kWarps;

// Least and largest value of a map, by the whole block: a NaN is both.
struct Range {
    float low, high;
};
FNAC_DEVICE Range range(const float* map, int p, float* shared) {
    const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
    float low = map[0], high = map[0];
    for (int i = thread_index(); i < p; i += kThreads) {
        low = smaller_or_nan(map[i], low);
        high = larger_or_nan(map[i], high);
    }
    low = warp_min(low);
    high = warp_max(high);
    if (lane == 0) {
        shared[warp] = low;
        shared[kWarps + warp] = high;
    }
    block_barrier();
    for (int i = 0; i < kWarps; ++i) {
        low = smaller_or_nan(shared[i], low);
        high = larger_or_nan(shared[kWarps + i], high);
    }
    return {low, high};
}

// NCHW: a warp sums eight channels, lanes along the cells. channels_last: a warp sums a share of the cells, a
// lane two channels, and shared memory brings the shares together.
template <class T>
FNAC_KERNEL(kThreads, 2)
cell_sums_kernel(const CellSumsArguments arguments) {
    const CellSums& job = arguments.sums;
    const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
    const int64_t n = block_x() / arguments.blocks;
    const int channels = static_cast<int>(job.img.c), cells = static_cast<int>(job.img.p);
    const int first = static_cast<int>(block_x() % arguments.blocks) * kChannels;
    const T* img = static_cast<const T*>(job.img.data) + n * channels * cells;
    const float* map = job.maps + n * cells;
    float* shared = reinterpret_cast<float*>(shared_memory());

    Range bounds{0.f, 0.f};
    if (job.as_mask) bounds = range(map, cells, shared);
    // With weight 0 a product and not a skipped cell, so that a NaN in the background reaches the sum as it
    // does in PyTorch; comparisons with a NaN are false.
    const auto weight = [&](int p) {
        if (!job.as_mask) return map[p];
        return (map[p] - bounds.low) / (bounds.high - bounds.low + kMinMaxEps) > job.threshold ? 1.f : 0.f;
    };
    if (job.mask != nullptr && first == 0)
        for (int p = thread_index(); p < cells; p += kThreads) job.mask[n * cells + p] = weight(p) != 0.f;

    const auto write = [&](int c, float all, float weighted) {
        if (c >= channels) return;
        if (job.all != nullptr) job.all[n * channels + c] = all * job.scale;
        job.weighted[n * channels + c] = weighted * job.scale;
    };
    if (job.img.stride_p == 1) {
        const int c0 = first + warp * kOwn;
        float all[kOwn] = {}, weighted[kOwn] = {};
        for (int p = lane; p < cells; p += kWarpSize) {
            const float w = weight(p);
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
                if (c0 + i >= channels) break;
                const float x = widen(img[(c0 + i) * job.img.stride_c + p]);
                all[i] += x;
                weighted[i] = multiply_add(w, x, weighted[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            const float a = warp_sum(all[i]), w = warp_sum(weighted[i]);
            if (lane == i) write(c0 + i, a, w);
        }
        return;
    }
    constexpr int kPerLane = kChannels / kWarpSize;
    float all[kPerLane] = {}, weighted[kPerLane] = {};
#pragma unroll 4
    for (int p = warp; p < cells; p += kWarps) {
        const float w = weight(p);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            const int c = first + lane + i * kWarpSize;
            if (c >= channels) break;
            const float x = widen(img[p * job.img.stride_p + c]);
            all[i] += x;
            weighted[i] = multiply_add(w, x, weighted[i]);
        }
    }
    block_barrier();  // the range may still be read
    for (int i = 0; i < kPerLane; ++i) {
        shared[warp * kChannels + lane + i * kWarpSize] = all[i];
        shared[(kWarps + warp) * kChannels + lane + i * kWarpSize] = weighted[i];
    }
    block_barrier();
    const int c = thread_index();
    if (c >= kChannels) return;
    float total = 0.f, total_weighted = 0.f;
    for (int w = 0; w < kWarps; ++w) {
        total += shared[w * kChannels + c];
        total_weighted += shared[(kWarps + w) * kChannels + c];
    }
    write(first + c, total, total_weighted);
}

}  // namespace

void sum_cells(const CellSums& job, const Launch& where) {
    const FeatureMap& img = job.img;
    const int64_t blocks = ceil_div(img.c, kChannels);
    with_dtype(img.dtype, [&]<class T>(T) {
        launch(cell_sums_kernel<T>, {"cell_sums_kernel", img.n, img.n, img.c, img.p}, {img.n * blocks},
               kThreads, 2 * kWarps * kChannels * sizeof(float), where,
               CellSumsArguments{job, static_cast<int>(blocks)});
    });
}

int64_t workspace_bytes(const Pool&, int) { return 0; }

void run(const Pool& job, const Launch& where) {
    const FeatureMap& img = job.img;
    if (job.aud != nullptr) {
        const int64_t blocks = ceil_div(img.p, kWarpSize);
        const MapArguments arguments{
            img.data,     job.aud,      job.maps,  static_cast<int>(img.c), static_cast<int>(img.p),
            img.stride_c, img.stride_p, job.scale, static_cast<int>(blocks)};
        with_dtype(img.dtype, [&]<class T>(T) {
            launch(map_kernel<T>, {"map_kernel", img.n, img.n, img.c, img.p}, {img.n * blocks}, kThreads,
                   kThreads * sizeof(float), where, arguments);
        });
    }
    if (job.mask == nullptr) return;
    sum_cells({img, job.maps, true, job.threshold, 1.f / static_cast<float>(img.p), job.mask, job.avg,
               job.foreground},
              where);
}

}  // namespace fnac::cuda
