// dImg on Hopper, of bfloat16 features: one-hot weights of cells by sounds, times the sounds. Rows are the
// cells of all images one after the other, so that none is wasted; the weights are rounded to bfloat16, like
// the result.
//
// N M P C multiply-adds at B = 4096, 7x7, 512 channels cost as much as the logits, 842 GFLOP; sounds come
// from L2, 2 bytes for 128 multiply-adds. Every other gradient joins when the sums are written.
#include "cuda/gradient_products.cuh"
#include "cuda/gradients_hopper.cuh"

namespace fnac::cuda {
namespace {

using Tile = GradientTile;

struct ImageGradientHopperArguments {
    Matrix sounds;  // (m, c)
    const BFloat16* aud;
    const float* grad_logits;
    const uint16_t* argmax;
    const float* grad_maps;
    const uint8_t* mask;
    const float* grad_avg;
    const float* grad_foreground;
    BFloat16* dimg;
    int64_t rows;  // n * p
    int n, m, c, p;
    int64_t stride_c, stride_p;
    float scale;
    int slices;  // blocks along the channels
};

// The pairs of a stage: of each image 4 steps of 16 sounds, of each step four lanes' 16 bytes: cells and
// gradients of sounds 2 q, 2 q + 1, then of those + 8.
template <int kImages>
struct Pairs {
    static constexpr int kImageBytes = Tile::kDepth * 4;
    static constexpr int kBytes = kImages * kImageBytes;
    FNAC_DEVICE static uint16_t* cell(char* pairs, int image, int sound) {
        const int quarter = sound % 8 / 2, low = sound / 8 % 2 * 4 + sound % 2;
        return reinterpret_cast<uint16_t*>(pairs + image * kImageBytes + sound / 16 * 64 + quarter * 16) +
               low;
    }
};

// A thread's pairs on their way, some stages ahead.
template <int kImages>
class PairLoads {
  public:
    static constexpr int kOwn = (kImages + 1) / 2;  // images of a thread, every other one
    static constexpr int kAhead = 2;

    FNAC_DEVICE PairLoads(const ImageGradientHopperArguments& job, int first) : job_(job) {
        sound_ = thread_index() % Tile::kDepth;
        const int second = thread_index() % kGroupSize / Tile::kDepth;
        image_ = second;
        n_ = first + second;
    }
    FNAC_DEVICE void load(int slot, int m0) {
        const int m = m0 + sound_;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            const bool read = m < job_.m && n_ + 2 * i < job_.n;
            const int64_t at = read ? static_cast<int64_t>(n_ + 2 * i) * job_.m + m : 0;
            cells_[slot][i] = read ? job_.argmax[at] : kNoCell;
            gradients_[slot][i] = read ? job_.grad_logits[at] : 0.f;
        }
    }
    FNAC_DEVICE void store(int slot, char* pairs) const {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            if (image_ + 2 * i >= kImages) break;
            uint16_t* cell = Pairs<kImages>::cell(pairs, image_ + 2 * i, sound_);
            cell[0] = static_cast<uint16_t>(cells_[slot][i]);
            cell[2] = narrow<BFloat16>(gradients_[slot][i]).bits;
        }
    }

  private:
    const ImageGradientHopperArguments& job_;
    int sound_, image_, n_;
    uint32_t cells_[kAhead][kOwn];
    float gradients_[kAhead][kOwn];
};

template <int kImages>
FNAC_DEVICE void fill_stages(const ImageGradientHopperArguments& job, int first_image, int c0) {
    using Memory = GradientMemory<Pairs<kImages>::kBytes>;
    using Loads = PairLoads<kImages>;
    GradientBarriers& barriers = Memory::barriers();
    Loads loads(job, first_image);
    const int stages = (job.m + Tile::kDepth - 1) / Tile::kDepth;
#pragma unroll
    for (int ahead = 0; ahead < Loads::kAhead; ++ahead) loads.load(ahead, ahead * Tile::kDepth);
    for (int begin = 0; begin < stages; begin += Loads::kAhead)
#pragma unroll
        for (int slot = 0; slot < Loads::kAhead; ++slot) {
            const int at = begin + slot, stage = at % Tile::kStages;
            if (at >= stages) break;
            barrier_wait(barriers.empty[stage], at / Tile::kStages % 2 ^ 1);
            loads.store(slot, Memory::pairs(stage));
            loads.load(slot, (at + Loads::kAhead) * Tile::kDepth);
            if (thread_index() % kGroupSize == 0) {
                barrier_expect(barriers.full[stage], Tile::kStageBytes);
                copy_stage(Memory::features(stage), job.sounds, c0, at * Tile::kDepth, barriers.full[stage]);
            } else {
                barrier_arrive(barriers.full[stage]);
            }
        }
}

template <int kImages>
FNAC_DEVICE void multiply_stages(const ImageGradientHopperArguments& job, int64_t row0, int first_image,
                                 float (&sums)[Tile::kProducts]) {
    using Memory = GradientMemory<Pairs<kImages>::kBytes>;
    GradientBarriers& barriers = Memory::barriers();
    const int lane = thread_index() % kWarpSize;
    uint32_t cell[2];
    int offset[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t row = row0 + gradient_row(half);
        cell[half] = static_cast<uint32_t>(row % job.p) * 0x10001u;
        offset[half] =
            static_cast<int>(row / job.p - first_image) * Pairs<kImages>::kImageBytes + lane % 4 * 16;
    }
    const int stages = (job.m + Tile::kDepth - 1) / Tile::kDepth;
    for (int at = 0; at < stages; ++at) {
        const int stage = at % Tile::kStages;
        barrier_wait(barriers.full[stage], at / Tile::kStages % 2);
        const char* pairs = Memory::pairs(stage);
        uint32_t weights[4][4];
#pragma unroll
        for (int step = 0; step < 4; ++step)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Bits128 four = *reinterpret_cast<const Bits128*>(pairs + offset[half] + step * 64);
                weights[step][half] = equal_halves(four.words[0], cell[half]) & four.words[1];
                weights[step][half + 2] = equal_halves(four.words[2], cell[half]) & four.words[3];
            }
        multiply_stage(sums, weights, Memory::features(stage), at > 0);
        products_wait<0>();
        if (lane == 0) barrier_arrive(barriers.empty[stage]);
    }
}

// What reaches all cells of an image alike: for each of the tile's images the gradients of its maps' scores,
// of its mean, and of the foreground of its masked cells, by channel. In shared memory behind all else,
// loaded while the first stage is on its way.
template <int kImages>
struct Means {
    float map[kImages][Tile::kChannels];
    float avg[kImages][Tile::kChannels];
    float foreground[kImages][Tile::kChannels];

    FNAC_DEVICE void load(const ImageGradientHopperArguments& job, int first_image, int c0) {
        const float share = 1.f / static_cast<float>(job.p);
#pragma unroll
        for (int image = 0; image < kImages; ++image) {
            const int64_t n = first_image + image;
            const int own = thread_index(), c = c0 + own;
            const bool read = n < job.n && c < job.c;
            const int64_t at = read ? n * job.c + c : 0;
            map[image][own] = read && job.grad_maps != nullptr ? widen(job.aud[at]) * job.scale : 0.f;
            avg[image][own] = read && job.grad_avg != nullptr ? job.grad_avg[at] * share : 0.f;
            foreground[image][own] =
                read && job.grad_foreground != nullptr ? job.grad_foreground[at] * share : 0.f;
        }
    }
};
static_assert(Tile::kChannels == 2 * kGroupSize);  // a channel for each thread that multiplies

// The sums, turned in shared memory: neighbouring lanes then write neighbouring elements.
struct Turned {
    // Of a row; odd where lanes go down the rows, otherwise a multiple of 8 but not of 32.
    static constexpr int kPlanePitch = Tile::kChannels + 1, kRowPitch = Tile::kChannels + 8;
    static constexpr int kBytes = Tile::kRows * kRowPitch * static_cast<int>(sizeof(float));
    static_assert(kPlanePitch <= kRowPitch);

    FNAC_DEVICE static void store(bool planes, const float (&sums)[Tile::kProducts]) {
        float* turned = reinterpret_cast<float*>(shared_memory());
        const int pitch = planes ? kPlanePitch : kRowPitch;
#pragma unroll
        for (int i = 0; i < Tile::kProducts; ++i)
            turned[gradient_row(i / 2 % 2) * pitch + i / 4 * 8 + thread_index() % 4 * 2 + i % 2] = sums[i];
    }
    FNAC_DEVICE static float at(bool planes, int row, int channel) {
        return reinterpret_cast<const float*>(
            shared_memory())[row * (planes ? kPlanePitch : kRowPitch) + channel];
    }
};

template <int kImages>
struct Layout {
    using Stages = GradientMemory<Pairs<kImages>::kBytes>;
    static constexpr int kMeansAt = Stages::kBytes > Turned::kBytes ? Stages::kBytes : Turned::kBytes;
    static constexpr int kBytes = kMeansAt + static_cast<int>(sizeof(Means<kImages>));
    static_assert(kMeansAt % sizeof(float) == 0);
    FNAC_DEVICE static Means<kImages>& means() {
        return *reinterpret_cast<Means<kImages>*>(shared_memory() + kMeansAt);
    }
};

// A row of dImg, complete.
template <int kImages>
class Row {
  public:
    FNAC_DEVICE Row(const ImageGradientHopperArguments& job, int64_t row, int first_image, int c0)
        : stride_(job.stride_c),
          image_(static_cast<int>(row / job.p) - first_image),
          to_(job.dimg + row / job.p * job.c * job.p + row % job.p * job.stride_p + c0 * job.stride_c),
          scale_(job.scale),
          map_(job.grad_maps != nullptr ? job.grad_maps[row] : 0.f),
          mask_(job.grad_foreground != nullptr ? static_cast<float>(job.mask[row]) : 0.f) {}

    FNAC_DEVICE void write(int c, float sum) const {
        const Means<kImages>& means = Layout<kImages>::means();
        float gradient = multiply_add(map_, means.map[image_][c], sum * scale_);
        gradient = multiply_add(mask_, means.foreground[image_][c], gradient + means.avg[image_][c]);
        to_[c * stride_] = narrow<BFloat16>(gradient);
    }

  private:
    const int64_t stride_;
    const int image_;
    BFloat16* const to_;
    const float scale_, map_, mask_;
};

template <int kImages>
FNAC_DEVICE void write_gradient(const ImageGradientHopperArguments& job, int64_t row0, int first_image,
                                int c0, const float (&sums)[Tile::kProducts]) {
    const bool planes = job.stride_p == 1;
    group_barrier<2 * kGroupSize>(1);  // the stages are free
    Turned::store(planes, sums);
    group_barrier<2 * kGroupSize>(1);
    const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
    const int channels = job.c - c0 < Tile::kChannels ? job.c - c0 : Tile::kChannels;
    const int rows = job.rows - row0 < Tile::kRows ? static_cast<int>(job.rows - row0) : Tile::kRows;
    if (planes) {
        for (int own = lane; own < rows; own += kWarpSize) {
            const Row<kImages> row(job, row0 + own, first_image, c0);
#pragma unroll 4
            for (int c = warp; c < channels; c += Tile::kWarps) row.write(c, Turned::at(true, own, c));
        }
    } else {
        for (int own = warp; own < rows; own += Tile::kWarps) {
            const Row<kImages> row(job, row0 + own, first_image, c0);
#pragma unroll 4
            for (int c = lane; c < channels; c += kWarpSize) row.write(c, Turned::at(false, own, c));
        }
    }
}

template <int kImages>
FNAC_HOPPER_KERNEL(Tile::kThreads)
image_gradient_hopper_kernel(const FNAC_CONSTANT ImageGradientHopperArguments job) {
    GradientMemory<Pairs<kImages>::kBytes>::barriers().start();
    const int c0 = static_cast<int>(block_x() % job.slices) * Tile::kChannels;
    const int64_t row0 = block_x() / job.slices * Tile::kRows;
    const int first_image = static_cast<int>(row0 / job.p);
    if (thread_index() >= 2 * kGroupSize) {
        give_registers<56>();
        fill_stages<kImages>(job, first_image, c0);
    } else {
        take_registers<224>();
        Layout<kImages>::means().load(job, first_image, c0);
        float sums[Tile::kProducts];
        multiply_stages<kImages>(job, row0, first_image, sums);
        write_gradient<kImages>(job, row0, first_image, c0, sums);
    }
}

template <int kImages>
void start(const ImageGradientHopperArguments& arguments, const Launch& where) {
    launch(image_gradient_hopper_kernel<kImages>,
           {"image_gradient_hopper_kernel", arguments.n, arguments.m, arguments.c, arguments.p},
           {ceil_div(arguments.rows, Tile::kRows) * arguments.slices}, Tile::kThreads,
           Layout<kImages>::kBytes, where, arguments);
}

constexpr int64_t kLeastCells = 16;
// Gathering costs the same for every map and these products by the cell; they meet near 128 cells of many
// sounds. A gather of few sounds waits for memory.
constexpr int64_t kMostCells = 128, kFewSounds = 512, kMostCellsOfFew = 256;

}  // namespace

bool gradients_hopper_serve(const FeatureBackward& job, int device) {
    const FeatureMap& img = job.img;
    return is_hopper(device) && job.grad_logits != nullptr && img.dtype == Dtype::kBFloat16 &&
           img.c % 8 == 0 && img.p >= kLeastCells &&
           img.p <= (job.m <= kFewSounds ? kMostCellsOfFew : kMostCells) && has_coordinates(img) &&
           is_aligned(img.data) && is_aligned(job.aud) && (job.dimg == nullptr || is_aligned(job.dimg));
}

void image_gradient_hopper(const FeatureBackward& job, const Launch& where) {
    const FeatureMap& img = job.img;
    const ImageGradientHopperArguments arguments{
        make_matrix(job.aud, job.m, img.c, Tile::kDepth),
        static_cast<const BFloat16*>(job.aud),
        job.grad_logits,
        job.argmax,
        job.grad_maps,
        job.mask,
        job.grad_avg,
        job.grad_foreground,
        static_cast<BFloat16*>(job.dimg),
        img.n * img.p,
        static_cast<int>(img.n),
        static_cast<int>(job.m),
        static_cast<int>(img.c),
        static_cast<int>(img.p),
        img.stride_c,
        img.stride_p,
        job.scale,
        static_cast<int>(ceil_div(img.c, Tile::kChannels)),
    };
    // Images that 128 cells in a row may touch.
    const int64_t images = 1 + ceil_div(Tile::kRows - 1, img.p);
    if (images <= 2) return start<2>(arguments, where);
    if (images <= 4) return start<4>(arguments, where);
    return start<9>(arguments, where);
}

}  // namespace fnac::cuda
