// dImg: a block owns 128 channels of at most 64 cells of an image, and every gradient of theirs meets in one
// write.
//
// The sounds of the image are sorted by the cell that they chose (a counting sort, stable, so that the order
// of the sums is that of the sounds). Each warp then takes an equal share of the sorted list, however the
// sounds crowd on a cell, sums rows of sounds in registers and adds a cell's sum to the block's tile in
// shared memory once. A share may begin within a cell: that first sum is kept apart and added afterwards, in
// the order of the shares.
//
// Traffic at B = 4096, 512 channels in 16 bits: N M C reads of sounds (17 GB) from L2, which holds all of
// them, and one write of dImg; the sort reads argmax and gradient of a pair once for each 128 channels.
#include "cuda/feature_backward.cuh"
#include "cuda/gradients_hopper.cuh"

namespace fnac::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kCells = 64;
constexpr int kChannels = 128;
constexpr int kPitch = kChannels + 4;  // of the tile: transposed reads meet fewer banks twice
constexpr int kSounds = 2048;          // sorted at a time

struct ImageGradientArguments {
    const void* aud;
    const float* grad_logits;
    const uint16_t* argmax;
    const float* grad_maps;
    const uint8_t* mask;
    const float* grad_avg;
    const float* grad_foreground;
    void* dimg;
    int64_t m;
    int c, p;
    int64_t stride_c, stride_p;
    float scale;
    int tile_cells, tiles;  // cells of a block, blocks along the cells
    int slices;             // blocks along the channels
    bool aligned;           // four channels can be loaded at once
};

struct Pair {
    float gradient;
    int sound;
};

struct Shared {
    float tile[kCells][kPitch];
    Pair sorted[kSounds];
    int offsets[kWarps][kCells];  // of a warp's next sound within a cell
    int begins[kCells + 1];       // of a cell's sounds in the sorted list
    int totals[kCells];
    Float4 first_sums[kWarps][kWarpSize];
    int first_cells[kWarps];  // of a share that begins within a cell, otherwise -1
};

template <class T>
struct alignas(4 * sizeof(T)) Four {
    T x[4];
};

template <class T>
FNAC_DEVICE Float4 load_four(const T* row, int c, int channels, bool aligned) {
    if (aligned) {
        if (c >= channels) return {};
        const Four<T> four = *reinterpret_cast<const Four<T>*>(row + c);
        return {widen(four.x[0]), widen(four.x[1]), widen(four.x[2]), widen(four.x[3])};
    }
    const auto one = [&](int i) { return c + i < channels ? widen(row[c + i]) : 0.f; };
    return {one(0), one(1), one(2), one(3)};
}

FNAC_DEVICE void accumulate(Float4& sum, float weight, Float4 x) {
    sum.x = multiply_add(weight, x.x, sum.x);
    sum.y = multiply_add(weight, x.y, sum.y);
    sum.z = multiply_add(weight, x.z, sum.z);
    sum.w = multiply_add(weight, x.w, sum.w);
}

// Calls body(sound, cell, lanes of the warp at the same cell) for the warp's share of sounds m0..m1, in
// order, with all lanes: cell is -1 where there is no sound or its cell is not the block's.
template <class Body>
FNAC_DEVICE void for_own_sounds(const uint16_t* argmax, int64_t m0, int64_t m1, int first_cell, int cells,
                                const Body& body) {
    const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize;
    constexpr int kShare = kSounds / kWarps;
    for (int i = 0; i < kShare; i += kWarpSize) {
        const int64_t m = m0 + warp * kShare + i + lane;
        if (m - lane >= m1) break;
        const int cell = m < m1 ? argmax[m] - first_cell : -1;
        const int own = cell >= 0 && cell < cells ? cell : -1;
        body(m, own, match(own));
    }
}

// Fills sorted and begins.
FNAC_DEVICE void sort_sounds(Shared& shared, const uint16_t* argmax, const float* gradients, int64_t m0,
                             int64_t m1, int first_cell, int cells) {
    const int thread = thread_index(), warp = thread / kWarpSize, lane = thread % kWarpSize;
    for (int i = lane; i < kCells; i += kWarpSize) shared.offsets[warp][i] = 0;
    warp_barrier();
    for_own_sounds(argmax, m0, m1, first_cell, cells, [&](int64_t, int cell, uint32_t same) {
        if (cell >= 0 && lane == lowest_bit(same)) shared.offsets[warp][cell] += count_bits(same);
        warp_barrier();
    });
    block_barrier();
    if (thread < kCells) {
        int total = 0;
        for (auto& offsets : shared.offsets) {
            const int count = offsets[thread];
            offsets[thread] = total;
            total += count;
        }
        shared.totals[thread] = total;
    }
    block_barrier();
    if (thread <= kCells) {
        int begin = 0;
        for (int cell = 0; cell < thread; ++cell) begin += shared.totals[cell];
        shared.begins[thread] = begin;
    }
    block_barrier();
    for_own_sounds(argmax, m0, m1, first_cell, cells, [&](int64_t m, int cell, uint32_t same) {
        if (cell >= 0) {
            const int rank = count_bits(same & ((1u << lane) - 1));
            shared.sorted[shared.begins[cell] + shared.offsets[warp][cell] + rank] = {
                gradients[m], static_cast<int>(m - m0)};
        }
        warp_barrier();
        if (cell >= 0 && lane == lowest_bit(same)) shared.offsets[warp][cell] += count_bits(same);
        warp_barrier();
    });
    block_barrier();
}

// Adds the sorted sounds' rows to the tile; `sounds` is the row of sound m0.
template <class T>
FNAC_DEVICE void add_sounds(Shared& shared, const T* sounds, int first_channel, int channels, bool aligned) {
    const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
    const int count = shared.begins[kCells], share = (count + kWarps - 1) / kWarps;
    const int end = count < (warp + 1) * share ? count : (warp + 1) * share;
    int at = warp * share, cell = 0;
    if (lane == 0) shared.first_cells[warp] = -1;
    while (at < end) {
        while (shared.begins[cell + 1] <= at) ++cell;
        const int stop = end < shared.begins[cell + 1] ? end : shared.begins[cell + 1];
        const bool is_first = at == shared.begins[cell];
        Float4 sum{};
#pragma unroll 4
        for (; at < stop; ++at) {
            const Pair pair = shared.sorted[at];
            accumulate(sum, pair.gradient,
                       load_four(sounds + static_cast<int64_t>(pair.sound) * channels,
                                 first_channel + lane * 4, channels, aligned));
        }
        if (is_first) {
            accumulate(*reinterpret_cast<Float4*>(&shared.tile[cell][lane * 4]), 1.f, sum);
        } else {
            shared.first_sums[warp][lane] = sum;
            if (lane == 0) shared.first_cells[warp] = cell;
        }
    }
    block_barrier();
    if (warp == 0) {
        for (int other = 0; other < kWarps; ++other)
            if (shared.first_cells[other] >= 0)
                accumulate(*reinterpret_cast<Float4*>(&shared.tile[shared.first_cells[other]][lane * 4]), 1.f,
                           shared.first_sums[other][lane]);
    }
    block_barrier();
}

template <class T>
FNAC_KERNEL(kThreads, 2)
image_gradient_kernel(const ImageGradientArguments job) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    const int slice = static_cast<int>(block_x() % job.slices);
    const int64_t n = block_x() / job.slices / job.tiles;
    const int first_cell = static_cast<int>(block_x() / job.slices % job.tiles) * job.tile_cells;
    const int first_channel = slice * kChannels;
    const int cells = job.p - first_cell < job.tile_cells ? job.p - first_cell : job.tile_cells;
    const int width = job.c - first_channel < kChannels ? job.c - first_channel : kChannels;
    const T* aud = static_cast<const T*>(job.aud);

    if (job.grad_logits != nullptr) {
        for (int i = thread_index(); i < kCells * kPitch; i += kThreads) (&shared.tile[0][0])[i] = 0.f;
        block_barrier();
        for (int64_t m0 = 0; m0 < job.m; m0 += kSounds) {
            const int64_t m1 = m0 + kSounds < job.m ? m0 + kSounds : job.m;
            sort_sounds(shared, job.argmax + n * job.m, job.grad_logits + n * job.m, m0, m1, first_cell,
                        cells);
            add_sounds(shared, aud + m0 * job.c, first_channel, job.c, job.aligned);
        }
    }
    T* dimg = static_cast<T*>(job.dimg) + n * job.c * job.p;
    const float share = 1.f / static_cast<float>(job.p);
    const bool planes = job.stride_p == 1;
    for (int i = thread_index(); i < cells * width; i += kThreads) {
        const int cell = planes ? i % cells : i / width, channel = planes ? i / cells : i % width;
        const int p = first_cell + cell, c = first_channel + channel;
        float gradient = job.grad_logits != nullptr ? shared.tile[cell][channel] : 0.f;
        if (job.grad_maps != nullptr)
            gradient = multiply_add(job.grad_maps[n * job.p + p], widen(aud[n * job.c + c]), gradient);
        gradient *= job.scale;
        if (job.grad_avg != nullptr) gradient = multiply_add(job.grad_avg[n * job.c + c], share, gradient);
        if (job.grad_foreground != nullptr)
            gradient = multiply_add(static_cast<float>(job.mask[n * job.p + p]),
                                    job.grad_foreground[n * job.c + c] * share, gradient);
        dimg[c * job.stride_c + p * job.stride_p] = narrow<T>(gradient);
    }
}

}  // namespace

void image_gradient(const FeatureBackward& job, const Launch& where) {
    if (gradients_hopper_serve(job, where.device)) return image_gradient_hopper(job, where);
    const FeatureMap& img = job.img;
    const int64_t tiles = ceil_div(img.p, kCells), slices = ceil_div(img.c, kChannels);
    with_dtype(img.dtype, [&]<class T>(T) {
        const ImageGradientArguments arguments{
            job.aud,
            job.grad_logits,
            job.argmax,
            job.grad_maps,
            job.mask,
            job.grad_avg,
            job.grad_foreground,
            job.dimg,
            job.m,
            static_cast<int>(img.c),
            static_cast<int>(img.p),
            img.stride_c,
            img.stride_p,
            job.scale,
            static_cast<int>(ceil_div(img.p, tiles)),
            static_cast<int>(tiles),
            static_cast<int>(slices),
            img.c % 4 == 0 && is_aligned(job.aud),
        };
        launch(image_gradient_kernel<T>, {"image_gradient_kernel", img.n, job.m, img.c, img.p},
               {img.n * tiles * slices}, kThreads, sizeof(Shared), where, arguments);
    });
}

}  // namespace fnac::cuda
