// Features of 16 bits from NCHW to channels_last: a block takes 64 channels of an image, which lie side by
// side in NCHW, through shared memory, and may add its cells up meanwhile. The number of channels is even.
#include "cuda/hopper.cuh"

namespace fnac::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChannels = 64;
constexpr int kCells = 256;  // at a time

struct ChannelsLastArguments {
    const uint16_t* from;
    uint16_t* to;
    const float* weights;  // (n, p), or null
    float* sums;           // (n, c): sum_p weight * img
    int c, p, slices;
    int pitch;  // of a channel in shared memory, an odd number of words
};

constexpr int kWarps = kThreads / kWarpSize;
static_assert(kChannels == 2 * kWarpSize);  // two for each lane

FNAC_KERNEL(kThreads, 4)
channels_last_kernel(const ChannelsLastArguments job) {
    uint16_t* tile = reinterpret_cast<uint16_t*>(shared_memory());  // kChannels rows of cells
    const int64_t n = block_x() / job.slices;
    const int c0 = static_cast<int>(block_x() % job.slices) * kChannels;
    const int channels = job.c - c0 < kChannels ? job.c - c0 : kChannels;
    const uint16_t* from = job.from + (n * job.c + c0) * job.p;
    uint16_t* to = job.to + n * job.c * job.p + c0;
    const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize, c = lane * 2;
    float sums[2] = {};
    for (int p0 = 0; p0 < job.p; p0 += kCells) {
        const int cells = job.p - p0 < kCells ? job.p - p0 : kCells;
        for (int p = lane; p < cells; p += kWarpSize) {
            uint16_t own[kChannels / kWarps];  // all on their way at once
#pragma unroll
            for (int i = 0; i < kChannels / kWarps; ++i) {
                const int row = i * kWarps + warp;
                own[i] = row < channels ? from[row * job.p + p0 + p] : 0;
            }
#pragma unroll
            for (int i = 0; i < kChannels / kWarps; ++i) tile[(i * kWarps + warp) * job.pitch + p] = own[i];
        }
        block_barrier();
#pragma unroll 4
        for (int p = warp; p < cells; p += kWarps) {
            if (c >= channels) break;
            const uint16_t low = tile[c * job.pitch + p], high = tile[(c + 1) * job.pitch + p];
            *reinterpret_cast<uint32_t*>(to + static_cast<int64_t>(p0 + p) * job.c + c) =
                low | static_cast<uint32_t>(high) << 16;
            if (job.weights == nullptr) continue;
            const float weight = job.weights[n * job.p + p0 + p];
            sums[0] = multiply_add(weight, widen(BFloat16{low}), sums[0]);
            sums[1] = multiply_add(weight, widen(BFloat16{high}), sums[1]);
        }
        block_barrier();
    }
    if (job.weights == nullptr) return;
    float* parts = reinterpret_cast<float*>(shared_memory());  // of each warp
    for (int i = 0; i < 2; ++i) parts[warp * kChannels + c + i] = sums[i];
    block_barrier();
    if (thread_index() >= channels) return;
    float sum = 0.f;
    for (int other = 0; other < kWarps; ++other) sum += parts[other * kChannels + thread_index()];
    job.sums[n * job.c + c0 + thread_index()] = sum;
}

}  // namespace

void copy_channels_last(const FeatureMap& img, void* copy, const float* weights, float* sums,
                        const Launch& where) {
    const int slices = static_cast<int>(ceil_div(img.c, kChannels));
    const int pitch = static_cast<int>(ceil_div(smaller(img.p, kCells), 2) | 1) * 2;
    const int64_t tile = kChannels * pitch * static_cast<int64_t>(sizeof(uint16_t));
    const int64_t parts = kWarps * kChannels * static_cast<int64_t>(sizeof(float));
    launch(
        channels_last_kernel, {"channels_last_kernel", img.n, 1, img.c, img.p}, {img.n * slices}, kThreads,
        larger(tile, parts), where,
        ChannelsLastArguments{static_cast<const uint16_t*>(img.data), static_cast<uint16_t*>(copy), weights,
                              sums, static_cast<int>(img.c), static_cast<int>(img.p), slices, pitch});
}

}  // namespace fnac::cuda
