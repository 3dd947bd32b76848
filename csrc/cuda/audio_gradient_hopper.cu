// dAud on Hopper, of bfloat16 features: one-hot weights of sounds by cells, times the cells of all images one
// after the other. As many multiply-adds as the logits; cells come from L2, 2 bytes for 128 multiply-adds.
// The images are cut into ranges, one for each block where the sounds alone are too few.
#include "cuda/gradient_products.cuh"
#include "cuda/gradients_hopper.cuh"

namespace fnac::cuda {
namespace {

using Tile = GradientTile;
constexpr int64_t kBlocks = 132;     // aimed at by ranges: multiprocessors
constexpr int64_t kLeastImages = 4;  // of a range

struct AudioGradientHopperArguments {
    Matrix cells;  // (n * p, c)
    const float* grad_logits;
    const uint16_t* argmax;
    float* sums;  // (shares, m, c)
    int n, m, c, p;
    int sound_blocks, slices;
    int share;  // images of a range
};

// The pairs of a stage: for each image that it touches, of each sound the row of the stage where its weight
// is, and the weight, twice each, as a word for two columns.
template <int kImages>
struct Pairs {
    static constexpr int kBytes = kImages * Tile::kRows * 8;
    FNAC_DEVICE static uint32_t* of(char* pairs, int image, int sound) {
        return reinterpret_cast<uint32_t*>(pairs + (image * Tile::kRows + sound) * 8);
    }
};

struct Block {
    int m0, c0, first, last;  // sounds, channels, images first..last
    FNAC_DEVICE explicit Block(const AudioGradientHopperArguments& job) {
        // Blocks that run at the same time are at the same images, so that these stay in L2.
        const int block = static_cast<int>(block_x());
        m0 = block % job.sound_blocks * Tile::kRows;
        c0 = block / job.sound_blocks % job.slices * Tile::kChannels;
        first = block / job.sound_blocks / job.slices * job.share;
        last = first + job.share < job.n ? first + job.share : job.n;
    }
    FNAC_DEVICE int stages(int p) const { return ((last - first) * p + Tile::kDepth - 1) / Tile::kDepth; }
};

template <int kImages>
FNAC_DEVICE void fill_stages(const AudioGradientHopperArguments& job, const Block& block) {
    using Memory = GradientMemory<Pairs<kImages>::kBytes>;
    GradientBarriers& barriers = Memory::barriers();
    const int sound = thread_index() % kGroupSize, m = block.m0 + sound, stages = block.stages(job.p);
    constexpr int kAhead = 2;
    uint32_t cells[kAhead][kImages];
    float gradients[kAhead][kImages];
    const auto load = [&](int slot, int at) {
        const int n0 = block.first + at * Tile::kDepth / job.p;
#pragma unroll
        for (int i = 0; i < kImages; ++i) {
            const bool read = m < job.m && n0 + i < block.last;
            const int64_t pair = read ? static_cast<int64_t>(n0 + i) * job.m + m : 0;
            cells[slot][i] = read ? job.argmax[pair] : kNoCell;
            gradients[slot][i] = read ? job.grad_logits[pair] : 0.f;
        }
    };
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) load(slot, slot);
    for (int begin = 0; begin < stages; begin += kAhead)
#pragma unroll
        for (int slot = 0; slot < kAhead; ++slot) {
            const int at = begin + slot, stage = at % Tile::kStages;
            if (at >= stages) break;
            barrier_wait(barriers.empty[stage], at / Tile::kStages % 2 ^ 1);
            const int row = at * Tile::kDepth;  // of the stage, from the first image's first cell on
            const int n0 = row / job.p;
#pragma unroll
            for (int i = 0; i < kImages; ++i) {
                const int to = (n0 + i) * job.p + static_cast<int>(cells[slot][i]) - row;
                const uint32_t in_stage = to >= 0 && to < Tile::kDepth ? to : kNoCell;
                uint32_t* pair = Pairs<kImages>::of(Memory::pairs(stage), i, sound);
                pair[0] = in_stage * 0x10001u;
                pair[1] = narrow<BFloat16>(gradients[slot][i]).bits * 0x10001u;
            }
            load(slot, at + kAhead);
            if (sound == 0) {
                barrier_expect(barriers.full[stage], Tile::kStageBytes);
                copy_stage(Memory::features(stage), job.cells, block.c0,
                           static_cast<int64_t>(block.first) * job.p + row, barriers.full[stage]);
            } else {
                barrier_arrive(barriers.full[stage]);
            }
        }
}

template <int kImages>
FNAC_DEVICE void multiply_stages(const AudioGradientHopperArguments& job, const Block& block,
                                 float (&sums)[Tile::kProducts]) {
    using Memory = GradientMemory<Pairs<kImages>::kBytes>;
    GradientBarriers& barriers = Memory::barriers();
    const int lane = thread_index() % kWarpSize, stages = block.stages(job.p);
    const uint32_t columns = static_cast<uint32_t>(lane % 4) * 0x20002u + 0x10000u;  // 2 q and 2 q + 1
    for (int at = 0; at < stages; ++at) {
        const int stage = at % Tile::kStages;
        barrier_wait(barriers.full[stage], at / Tile::kStages % 2);
        uint32_t weights[4][4] = {};
#pragma unroll
        for (int image = 0; image < kImages; ++image)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint32_t* pair = Pairs<kImages>::of(Memory::pairs(stage), image, gradient_row(half));
                const uint32_t row = pair[0], gradient = pair[1];
#pragma unroll
                for (int eight = 0; eight < 8; ++eight)
                    weights[eight / 2][eight % 2 * 2 + half] |=
                        equal_halves(row, columns + static_cast<uint32_t>(eight) * 0x80008u) & gradient;
            }
        multiply_stage(sums, weights, Memory::features(stage), at > 0);
        products_wait<0>();
        if (lane == 0) barrier_arrive(barriers.empty[stage]);
    }
}

template <int kImages>
FNAC_HOPPER_KERNEL(Tile::kThreads)
audio_gradient_hopper_kernel(const FNAC_CONSTANT AudioGradientHopperArguments job) {
    GradientMemory<Pairs<kImages>::kBytes>::barriers().start();
    const Block block(job);
    if (thread_index() >= 2 * kGroupSize) {
        give_registers<56>();
        fill_stages<kImages>(job, block);
    } else {
        take_registers<224>();
        float sums[Tile::kProducts];
        multiply_stages<kImages>(job, block, sums);
        const int share = static_cast<int>(block_x()) / job.sound_blocks / job.slices,
                  quarter = thread_index() % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int m = block.m0 + gradient_row(half);
            if (m >= job.m) continue;
            float* to = job.sums + (static_cast<int64_t>(share) * job.m + m) * job.c + block.c0 + quarter * 2;
#pragma unroll
            for (int j = 0; j < Tile::kChannels / 8; ++j)
                if (block.c0 + j * 8 < job.c)  // the number of channels is a multiple of 8
                    *reinterpret_cast<Float2*>(to + j * 8) = {sums[j * 4 + half * 2],
                                                              sums[j * 4 + half * 2 + 1]};
        }
    }
}

template <int kImages>
void start(const AudioGradientHopperArguments& arguments, int64_t shares, const Launch& where) {
    launch(audio_gradient_hopper_kernel<kImages>,
           {"audio_gradient_hopper_kernel", arguments.n, arguments.m, arguments.c, arguments.p},
           {shares * arguments.sound_blocks * arguments.slices}, Tile::kThreads,
           GradientMemory<Pairs<kImages>::kBytes>::kBytes, where, arguments);
}

int64_t images_of_share(const FeatureBackward& job) {
    const int64_t blocks = ceil_div(job.m, Tile::kRows) * ceil_div(job.img.c, Tile::kChannels);
    const int64_t wanted = smaller(larger(kBlocks / blocks, 1), ceil_div(job.img.n, kLeastImages));
    return ceil_div(job.img.n, wanted);
}

}  // namespace

int64_t audio_shares_hopper(const FeatureBackward& job) { return ceil_div(job.img.n, images_of_share(job)); }

void audio_gradient_hopper(const FeatureBackward& job, const void* cells, float* sums, const Launch& where) {
    const FeatureMap& img = job.img;
    const AudioGradientHopperArguments arguments{
        make_matrix(cells, img.n * img.p, img.c, Tile::kDepth),
        job.grad_logits,
        job.argmax,
        sums,
        static_cast<int>(img.n),
        static_cast<int>(job.m),
        static_cast<int>(img.c),
        static_cast<int>(img.p),
        static_cast<int>(ceil_div(job.m, Tile::kRows)),
        static_cast<int>(ceil_div(img.c, Tile::kChannels)),
        static_cast<int>(images_of_share(job)),
    };
    // Images that 64 cells in a row may touch.
    const int64_t images = 1 + ceil_div(Tile::kDepth - 1, img.p), shares = audio_shares_hopper(job);
    if (images <= 2) return start<2>(arguments, shares, where);
    if (images <= 3) return start<3>(arguments, shares, where);
    return start<5>(arguments, shares, where);
}

}  // namespace fnac::cuda
