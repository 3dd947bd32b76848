// dAud: a block owns 64 channels of 128 sounds and lets the images pass by, a slab of at most 64 cells at a
// time.
//
// A sound needs one cell of each image, and of NCHW features a cell's channels lie a plane apart. So slabs
// are read as they lie, contiguous either way, and widened and turned in shared memory; there every warp
// picks, for each of its sounds, the chosen cell's channels and adds them to its registers, in the order
// of the images. The next slab is loaded into registers meanwhile.
//
// Few sounds would leave most of the machine idle: the images are then split into shares, whose sums go to
// workspace and are added in order by finish_kernel. The shares depend on the sizes alone.
#include "cuda/cell_sums.cuh"
#include "cuda/feature_backward.cuh"
#include "cuda/gradients_hopper.cuh"

namespace fnac::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kSounds = 128;
constexpr int kOwn = kSounds / kWarps;  // sounds of a warp
constexpr int kChannels = 64;
constexpr int kCells = 64;
constexpr int kPitch = kChannels + 2;
constexpr int64_t kBlocks = 384;    // aimed at by shares
constexpr int64_t kLeastShare = 4;  // images

struct AudioGradientArguments {
    const void* img;
    const float* grad_logits;
    const uint16_t* argmax;
    float* sums;  // (shares, m, c)
    int n, m, c, p;
    int64_t stride_c, stride_p;
    int tile_cells, tiles;  // cells of a slab, slabs of an image
    int sound_blocks, slices;
    int share;  // images of a share
};

// Where a sound's cell lies in the slab; -1 where it is not in it.
struct Pick {
    float gradient;
    int offset;
};

struct Shared {
    float slab[2][kCells * kPitch];
    Pick picks[2][kSounds];
};

// Slabs and the picks of their sounds on their way to shared memory, in two halves to save registers. Of a
// slab's two dimensions a thread keeps its place in the contiguous one, cells of NCHW and channels of
// channels_last, and strides along the other.
template <class T>
class Slabs {
  public:
    static constexpr int kHalves = 2;

    FNAC_DEVICE Slabs(const AudioGradientArguments& job, int n0, int m0, int c0)
        : job_(job), n_(n0), m0_(m0), c0_(c0) {}

    FNAC_DEVICE void load(int half) {
        const int64_t n = n_;
        const int rest = job_.p - p0_, cells = rest < job_.tile_cells ? rest : job_.tile_cells;
        const int channels = job_.c - c0_;
        const int first = moving() + half * kPart * kStep;
        const T* from = static_cast<const T*>(job_.img) + n * job_.c * job_.p + p0_ * job_.stride_p +
                        c0_ * job_.stride_c + still() + static_cast<int64_t>(first) * stride();
        const int end = still() < (planes() ? cells : channels) ? (planes() ? channels : cells) : 0;
#pragma unroll
        for (int k = 0; k < kPart; ++k)
            values_[k] = first + k * kStep < end ? from[k * kStep * stride()] : T{};
        if (half != 0) return;
        pick_ = {0.f, -1};
        const int m = m0_ + thread_index();
        if (thread_index() < kSounds && m < job_.m) {
            const int cell = job_.argmax[n * job_.m + m] - p0_;
            if (cell >= 0 && cell < cells) pick_ = {job_.grad_logits[n * job_.m + m], cell * kPitch};
        }
    }
    FNAC_DEVICE void store(int half, Shared& shared, int buffer) {
        const int first = moving() + half * kPart * kStep;
        float* to = shared.slab[buffer] + (planes() ? still() * kPitch + first : first * kPitch + still());
#pragma unroll
        for (int k = 0; k < kPart; ++k) {
            *to = widen(values_[k]);
            to += planes() ? kStep : kStep * kPitch;
        }
        if (half == 0) {
            if (thread_index() < kSounds) shared.picks[buffer][thread_index()] = pick_;
            return;
        }
        p0_ += job_.tile_cells;
        if (p0_ >= job_.p) {
            p0_ = 0;
            ++n_;
        }
    }

  private:
    static_assert(kCells == kChannels);
    static constexpr int kPart = kCells * kChannels / kThreads / kHalves;
    static constexpr int kStep = kThreads / kCells;
    FNAC_DEVICE bool planes() const { return job_.stride_p == 1; }
    FNAC_DEVICE static int still() { return thread_index() % kCells; }
    FNAC_DEVICE static int moving() { return thread_index() / kCells; }
    FNAC_DEVICE int stride() const { return static_cast<int>(planes() ? job_.stride_c : job_.stride_p); }

    const AudioGradientArguments& job_;
    int n_, p0_ = 0;  // image and first cell of the next slab
    const int m0_, c0_;
    T values_[kPart];
    Pick pick_;
};

template <class T>
FNAC_KERNEL(kThreads, 2)
audio_gradient_kernel(const AudioGradientArguments job) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
    // Blocks that run at the same time are at the same images, so that these stay in L2.
    const int block = static_cast<int>(block_x());
    const int m0 = block % job.sound_blocks * kSounds;
    const int c0 = block / job.sound_blocks % job.slices * kChannels;
    const int share = block / job.sound_blocks / job.slices, n0 = share * job.share;
    const int images = job.n - n0 < job.share ? job.n - n0 : job.share;

    Slabs<T> slabs(job, n0, m0, c0);
    int left = images * job.tiles;
    for (int half = 0; half < slabs.kHalves; ++half) {
        slabs.load(half);
        slabs.store(half, shared, left % 2);
    }
    Float2 sums[kOwn] = {};
    for (; left > 0; --left) {
        block_barrier();
        const int buffer = left % 2;
#pragma unroll
        for (int half = 0; half < slabs.kHalves; ++half) {
            // The other buffer was read before the barrier.
            if (left > 1) slabs.load(half);
#pragma unroll
            for (int i = half * kOwn / 2; i < (half + 1) * kOwn / 2; ++i) {
                const Pick pick = shared.picks[buffer][warp * kOwn + i];
                if (pick.offset < 0) continue;
                const Float2 x =
                    *reinterpret_cast<const Float2*>(&shared.slab[buffer][pick.offset + lane * 2]);
                sums[i].x = multiply_add(pick.gradient, x.x, sums[i].x);
                sums[i].y = multiply_add(pick.gradient, x.y, sums[i].y);
            }
            if (left > 1) slabs.store(half, shared, buffer ^ 1);
        }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const int m = m0 + warp * kOwn + i;
        const int c = c0 + lane * 2;
        if (m >= job.m) continue;
        float* to = job.sums + (share * static_cast<int64_t>(job.m) + m) * job.c;
        if (c < job.c) to[c] = sums[i].x;
        if (c + 1 < job.c) to[c + 1] = sums[i].y;
    }
}

struct FinishArguments {
    const float* sums;      // (count, size)
    const float* grad_aud;  // (size), or null
    void* daud;
    int64_t size;
    int count;
    float scale;
};

template <class T>
FNAC_KERNEL(kThreads, 2)
finish_kernel(const FinishArguments job) {
    const int64_t i = block_x() * kThreads + thread_index();
    if (i >= job.size) return;
    float sum = 0.f;
#pragma unroll 8
    for (int k = 0; k < job.count; ++k) sum += job.sums[k * job.size + i];
    sum *= job.scale;
    if (job.grad_aud != nullptr) sum += job.grad_aud[i];
    static_cast<T*>(job.daud)[i] = narrow<T>(sum);
}

struct Shares {
    int64_t blocks, count, images;  // blocks of a share; shares; images of each
    explicit Shares(const FeatureBackward& job) {
        const int64_t n = job.img.n;
        blocks = ceil_div(job.m, kSounds) * ceil_div(job.img.c, kChannels);
        const int64_t wanted = smaller(ceil_div(kBlocks, blocks), ceil_div(n, kLeastShare));
        images = ceil_div(n, wanted);
        count = ceil_div(n, images);
    }
};

int64_t logits_shares(const FeatureBackward& job, int device) {
    if (job.grad_logits == nullptr) return 0;
    return gradients_hopper_serve(job, device) ? audio_shares_hopper(job) : Shares(job).count;
}

// Of all shares, which a copy of the features may follow.
int64_t shares_bytes(const FeatureBackward& job, int device) {
    const int64_t count = logits_shares(job, device) + (job.grad_maps != nullptr);
    return ceil_div(count * job.m * job.img.c * static_cast<int64_t>(sizeof(float)), 256) * 256;
}

void sum_maps(const FeatureBackward& job, float* sums, const Launch& where) {
    sum_cells({job.img, job.grad_maps, false, 0.f, 1.f, nullptr, nullptr, sums}, where);
}

// What comes through the logits, and through the maps as one more share.
void add_shares_on_hopper(const FeatureBackward& job, float* sums, const Launch& where) {
    const FeatureMap& img = job.img;
    float* of_maps = sums + audio_shares_hopper(job) * job.m * img.c;
    if (img.stride_c == 1) {
        audio_gradient_hopper(job, img.data, sums, where);
        if (job.grad_maps != nullptr) sum_maps(job, of_maps, where);
        return;
    }
    void* copy = job.dimg != nullptr ? job.dimg
                                     : static_cast<char*>(where.workspace) + shares_bytes(job, where.device);
    copy_channels_last(img, copy, job.grad_maps, of_maps, where);
    audio_gradient_hopper(job, copy, sums, where);
}

void add_shares(const FeatureBackward& job, float* sums, const Launch& where) {
    const FeatureMap& img = job.img;
    const Shares shares(job);
    const int64_t tiles = ceil_div(img.p, kCells);
    const AudioGradientArguments arguments{img.data,
                                           job.grad_logits,
                                           job.argmax,
                                           sums,
                                           static_cast<int>(img.n),
                                           static_cast<int>(job.m),
                                           static_cast<int>(img.c),
                                           static_cast<int>(img.p),
                                           img.stride_c,
                                           img.stride_p,
                                           static_cast<int>(ceil_div(img.p, tiles)),
                                           static_cast<int>(tiles),
                                           static_cast<int>(ceil_div(job.m, kSounds)),
                                           static_cast<int>(ceil_div(img.c, kChannels)),
                                           static_cast<int>(shares.images)};
    with_dtype(img.dtype, [&]<class T>(T) {
        launch(audio_gradient_kernel<T>, {"audio_gradient_kernel", img.n, job.m, img.c, img.p},
               {shares.blocks * shares.count}, kThreads, sizeof(Shared), where, arguments);
    });
}

}  // namespace

int64_t audio_gradient_workspace(const FeatureBackward& job, int device) {
    const bool copies = gradients_hopper_serve(job, device) && job.dimg == nullptr;
    return shares_bytes(job, device) + (copies ? channels_last_bytes(job.img) : 0);
}

void audio_gradient(const FeatureBackward& job, const Launch& where) {
    const FeatureMap& img = job.img;
    float* sums = static_cast<float*>(where.workspace);
    const int64_t size = job.m * img.c;
    const int count = static_cast<int>(logits_shares(job, where.device));
    if (gradients_hopper_serve(job, where.device)) {
        add_shares_on_hopper(job, sums, where);
    } else {
        if (job.grad_logits != nullptr) add_shares(job, sums, where);
        if (job.grad_maps != nullptr) sum_maps(job, sums + count * size, where);  // one more share
    }
    with_dtype(img.dtype, [&]<class T>(T) {
        launch(finish_kernel<T>, {"finish_kernel", img.n, job.m, img.c, img.p}, {ceil_div(size, kThreads)},
               kThreads, 0, where,
               FinishArguments{sums, job.grad_aud, job.daud, size, count + (job.grad_maps != nullptr),
                               job.scale});
    });
}

}  // namespace fnac::cuda
