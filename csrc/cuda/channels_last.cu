// Features of 16 bits from NCHW to channels_last: a block takes 64 channels of an image, which lie side by
// side in NCHW, through shared memory. The number of channels is even.
#include "cuda/hopper.cuh"

namespace fnac::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChannels = 64;
constexpr int kCells = 256;  // at a time

struct ChannelsLastArguments {
    const uint16_t* from;
    uint16_t* to;
    int c, p, slices;
    int pitch;  // of a channel in shared memory, an odd number of words
};

FNAC_KERNEL(kThreads, 4)
channels_last_kernel(const ChannelsLastArguments job) {
    uint16_t* tile = reinterpret_cast<uint16_t*>(shared_memory());  // kChannels rows of cells
    const int64_t n = block_x() / job.slices;
    const int c0 = static_cast<int>(block_x() % job.slices) * kChannels;
    const int channels = job.c - c0 < kChannels ? job.c - c0 : kChannels;
    const uint16_t* from = job.from + (n * job.c + c0) * job.p;
    uint16_t* to = job.to + n * job.c * job.p + c0;
    const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
    constexpr int kWarps = kThreads / kWarpSize;
    for (int p0 = 0; p0 < job.p; p0 += kCells) {
        const int cells = job.p - p0 < kCells ? job.p - p0 : kCells;
        for (int p = lane; p < cells; p += kWarpSize) {
            uint16_t own[kChannels / kWarps];  // all on their way at once
#pragma unroll
            for (int i = 0; i < kChannels / kWarps; ++i) {
                const int c = i * kWarps + warp;
                own[i] = c < channels ? from[c * job.p + p0 + p] : 0;
            }
#pragma unroll
            for (int i = 0; i < kChannels / kWarps; ++i) tile[(i * kWarps + warp) * job.pitch + p] = own[i];
        }
        block_barrier();
        static_assert(kChannels == 2 * kWarpSize);
        const int c = lane * 2;
#pragma unroll 4
        for (int p = warp; p < cells; p += kWarps) {
            if (c >= channels) break;
            *reinterpret_cast<uint32_t*>(to + static_cast<int64_t>(p0 + p) * job.c + c) =
                tile[c * job.pitch + p] | static_cast<uint32_t>(tile[(c + 1) * job.pitch + p]) << 16;
        }
        block_barrier();
    }
}

}  // namespace

const void* in_channels_last(const FeatureMap& img, void* copy, const Launch& where) {
    if (img.stride_c == 1) return img.data;
    const int slices = static_cast<int>(ceil_div(img.c, kChannels));
    const int pitch = static_cast<int>(ceil_div(smaller(img.p, kCells), 2) | 1) * 2;
    launch(channels_last_kernel, {"channels_last_kernel", img.n, 1, img.c, img.p}, {img.n * slices}, kThreads,
           kChannels * pitch * static_cast<int64_t>(sizeof(uint16_t)), where,
           ChannelsLastArguments{static_cast<const uint16_t*>(img.data), static_cast<uint16_t*>(copy),
                                 static_cast<int>(img.c), static_cast<int>(img.p), slices, pitch});
    return copy;
}

}  // namespace fnac::cuda
