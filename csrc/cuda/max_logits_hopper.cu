// Max-pooled logits of 16-bit features on Hopper: a block keeps 128 sounds in shared memory, all their
// channels, and lets the images stream by, as many whole images at a time as make 256 cells (49 cells: five,
// which cost 248). A warp starts the copies, two warpgroups multiply 64 sounds each and keep their maxima in
// registers.
//
// Traffic at B = 4096, 7x7, 512 channels: 32 blocks of sounds read 205 MB of features each, from L2; that is
// 128 multiply-adds for a byte, where tiles that come and go in both directions have 84.
#include "cuda/max_logits_hopper.cuh"

namespace fnac::cuda {
namespace {

constexpr int kStages = 3;
constexpr int kSounds = 2 * kGroupRows;
constexpr int kThreads = 3 * kGroupSize;
constexpr int kWarps = 2 * kGroupSize / kWarpSize;  // that multiply
constexpr int kMostBoxes = 8;                       // of a sound's channels
constexpr int kSoundBoxBytes = kSounds * kBoxRowBytes;
constexpr int kMostColumns = 256;
constexpr int64_t kBlocks = 132;  // of the grid: multiprocessors

struct MaxLogitsHopperArguments {
    Matrix cells;   // (n * p, c), in boxes of a tile's columns
    Matrix sounds;  // (m, c)
    float* logits;
    uint16_t* argmax;
    int64_t m;
    int n, p, boxes;
    int images;        // of a tile
    int sound_blocks;  // blocks of sounds
    int share, items;  // tiles that a block of sounds meets in a row; times that one does
    float scale;
};

struct Barriers {
    Barrier full[kStages], empty[kStages], sounds_full, sounds_empty;
};

// What a block does one after the other: tiles first..last of the images with sounds m0...
struct Item {
    int m0, first, last;
    FNAC_DEVICE Item(const MaxLogitsHopperArguments& job, int item) {
        m0 = item % job.sound_blocks * kSounds;
        first = item / job.sound_blocks * job.share;
        const int tiles = (job.n + job.images - 1) / job.images;
        last = first + job.share < tiles ? first + job.share : tiles;
    }
};

template <int kColumns>
struct Memory {
    static constexpr int kStageBytes = kColumns * kBoxRowBytes;
    FNAC_DEVICE static char* sounds(int box) { return shared_memory() + box * kSoundBoxBytes; }
    FNAC_DEVICE static char* cells(const MaxLogitsHopperArguments& job, int stage) {
        return sounds(job.boxes) + stage * kStageBytes;
    }
    FNAC_DEVICE static Barriers& barriers(const MaxLogitsHopperArguments& job) {
        return *reinterpret_cast<Barriers*>(cells(job, kStages));
    }
    static int bytes(int boxes) {
        return boxes * kSoundBoxBytes + kStages * kStageBytes + static_cast<int>(sizeof(Barriers));
    }
};

// Which stage comes next, and the parity of its phase.
struct Stage {
    int index = 0, parity = 0;
    FNAC_DEVICE void advance() {
        if (++index == kStages) index = 0, parity ^= 1;
    }
};

template <int kColumns>
FNAC_DEVICE void start_copies(const MaxLogitsHopperArguments& job) {
    using At = Memory<kColumns>;
    Barriers& barriers = At::barriers(job);
    Stage stage;
    int parity = 0;
    for (int i = static_cast<int>(block_x()); i < job.items; i += static_cast<int>(grid_x()), parity ^= 1) {
        const Item item(job, i);
        barrier_wait(barriers.sounds_empty, parity ^ 1);
        barrier_expect(barriers.sounds_full, job.boxes * kSoundBoxBytes);
        for (int box = 0; box < job.boxes; ++box)
            copy_box(At::sounds(box), job.sounds, box * kBoxColumns, item.m0, barriers.sounds_full);
        for (int tile = item.first; tile < item.last; ++tile)
            for (int box = 0; box < job.boxes; ++box, stage.advance()) {
                barrier_wait(barriers.empty[stage.index], stage.parity ^ 1);
                barrier_expect(barriers.full[stage.index], At::kStageBytes);
                copy_box(At::cells(job, stage.index), job.cells, box * kBoxColumns,
                         static_cast<int64_t>(tile) * job.images * job.p, barriers.full[stage.index]);
            }
    }
}

// Maximum and first argmax of a lane's two rows, over an image's cells.
struct Best {
    float value[2];
    int column[2];
    FNAC_DEVICE void clear(int first) {
        value[0] = value[1] = kNegInf;
        column[0] = column[1] = first;
    }
    FNAC_DEVICE void add(int row, float x, int at) {
        column[row] = x > value[row] ? at : column[row];
        value[row] = nan_maximum(value[row], x);
    }
    // Of the four lanes that share rows.
    FNAC_DEVICE void merge() {
#pragma unroll
        for (int row = 0; row < 2; ++row)
#pragma unroll
            for (int mask = 1; mask < 4; mask *= 2) {
                const float other = shuffle_xor(value[row], mask);
                const int at = shuffle_xor(column[row], mask);
                if (other > value[row] || (other == value[row] && at < column[row])) column[row] = at;
                value[row] = nan_maximum(value[row], other);
            }
    }
};

// The maxima of a tile's images. kCells is the number of cells of an image, or 0 for any.
template <int kColumns, int kCells>
class Maxima {
  public:
    static constexpr int kProducts = kColumns / 2;

    FNAC_DEVICE Maxima(const MaxLogitsHopperArguments& job, int tile, int m0, int lane)
        : job_(job), first_(tile * job.images), sound_(m0 + lane / 4), lane_(lane) {}

    FNAC_DEVICE void write(const float (&products)[kProducts]) {
        const int cells = kCells != 0 ? kCells : job_.p;
        Best best;
        best.clear(0);
        int image = 0, end = cells;
        bool has_nan = false;
#pragma unroll
        for (int group = 0; group < kColumns / 8; ++group) {
            const int first = group * 8, own = first + lane_ % 4 * 2;
            if (end >= first + 8) {
#pragma unroll
                for (int i = 0; i < 4; ++i) best.add(i / 2, products[group * 4 + i], own + i % 2);
            } else {  // an image ends within the eight columns
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (own + i % 2 < end) best.add(i / 2, products[group * 4 + i], own + i % 2);
            }
            if (end <= first + 8) {
                has_nan |= write_image(best, image, end - cells);
                best.clear(end);
                ++image;
                const int begin = end;
                end += cells;
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (own + i % 2 >= begin) best.add(i / 2, products[group * 4 + i], own + i % 2);
            }
        }
        if (any(has_nan)) find_nans(products, cells);
    }

  private:
    // Whether one of the maxima is a NaN, whose cell is not known.
    FNAC_DEVICE bool write_image(Best best, int image, int begin) const {
        best.merge();
        const int n = first_ + image;
        if (lane_ % 4 == 0 && image < job_.images && n < job_.n) {
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const int64_t m = sound_ + row * 8;
                if (m >= job_.m) continue;
                job_.logits[n * job_.m + m] = best.value[row] * job_.scale;
                job_.argmax[n * job_.m + m] = static_cast<uint16_t>(best.column[row] - begin);
            }
        }
        return best.value[0] != best.value[0] || best.value[1] != best.value[1];
    }
    // The first NaN of each image that has one.
    FNAC_DEVICE void find_nans(const float (&products)[kProducts], int cells) const {
        for (int image = 0; image < job_.images; ++image) {
            const int begin = image * cells;
            int found[2] = {kMostColumns, kMostColumns};
#pragma unroll
            for (int i = 0; i < kProducts; ++i) {
                const int column = i / 4 * 8 + lane_ % 4 * 2 + i % 2, row = i / 2 % 2;
                if (products[i] != products[i] && column >= begin && column < begin + cells &&
                    column < found[row])
                    found[row] = column;
            }
#pragma unroll
            for (int row = 0; row < 2; ++row) {
#pragma unroll
                for (int mask = 1; mask < 4; mask *= 2) {
                    const int other = shuffle_xor(found[row], mask);
                    found[row] = other < found[row] ? other : found[row];
                }
                const int64_t n = first_ + image, m = sound_ + row * 8;
                if (lane_ % 4 == 0 && found[row] < kMostColumns && n < job_.n && m < job_.m)
                    job_.argmax[n * job_.m + m] = static_cast<uint16_t>(found[row] - begin);
            }
        }
    }

    const MaxLogitsHopperArguments& job_;
    const int first_, sound_, lane_;
};

template <class T, int kColumns, int kCells>
FNAC_DEVICE void multiply_tiles(const MaxLogitsHopperArguments& job, int group) {
    using At = Memory<kColumns>;
    using Tile = Maxima<kColumns, kCells>;
    Barriers& barriers = At::barriers(job);
    const int thread = thread_index() % kGroupSize, lane = thread % kWarpSize;
    Stage stage;
    int parity = 0;
    float products[Tile::kProducts];
    for (int i = static_cast<int>(block_x()); i < job.items; i += static_cast<int>(grid_x()), parity ^= 1) {
        const Item item(job, i);
        barrier_wait(barriers.sounds_full, parity);
        for (int tile = item.first; tile < item.last; ++tile) {
            int before = -1;  // stage of the batch of products before
            for (int box = 0; box < job.boxes; ++box, stage.advance()) {
                barrier_wait(barriers.full[stage.index], stage.parity);
                const char* sounds = At::sounds(box) + group * kGroupRows * kBoxRowBytes;
                const char* cells = At::cells(job, stage.index);
                products_begin();
#pragma unroll
                for (int step = 0; step < kBoxRowBytes; step += kStepBytes)
                    product(T{}, products, along_rows(sounds + step), along_rows(cells + step),
                            box + step > 0);
                products_end();
                if (before >= 0) {
                    products_wait<1>();
                    if (lane == 0) barrier_arrive(barriers.empty[before]);
                }
                before = stage.index;
            }
            products_wait<0>();
            if (lane == 0) barrier_arrive(barriers.empty[before]);
            Tile(job, tile, item.m0 + group * kGroupRows + thread / kWarpSize * 16, lane).write(products);
        }
        if (lane == 0) barrier_arrive(barriers.sounds_empty);
    }
}

template <class T, int kColumns, int kCells>
FNAC_HOPPER_KERNEL(kThreads)
max_logits_hopper_kernel(const FNAC_CONSTANT MaxLogitsHopperArguments job) {
    Barriers& barriers = Memory<kColumns>::barriers(job);
    if (thread_index() == 0) {
        for (int i = 0; i < kStages; ++i) {
            barrier_init(barriers.full[i], 1);
            barrier_init(barriers.empty[i], kWarps);
        }
        barrier_init(barriers.sounds_full, 1);
        barrier_init(barriers.sounds_empty, kWarps);
        barriers_are_ready();
    }
    block_barrier();
    const int group = thread_index() / kGroupSize;
    if (group == 2) {
        give_registers<40>();
        if (thread_index() == 2 * kGroupSize) start_copies<kColumns>(job);
    } else {
        take_registers<232>();
        multiply_tiles<T, kColumns, kCells>(job, group);
    }
}

template <class T, int kColumns, int kCells>
void start(MaxLogitsHopperArguments arguments, const void* cells, const MaxLogits& job, const Launch& where) {
    const FeatureMap& img = job.img;
    arguments.cells = make_matrix(cells, img.n * img.p, img.c, kColumns);
    launch(max_logits_hopper_kernel<T, kColumns, kCells>,
           {"max_logits_hopper_kernel", img.n, job.m, img.c, img.p}, {smaller(kBlocks, arguments.items)},
           kThreads, Memory<kColumns>::bytes(arguments.boxes), where, arguments);
}

template <class T>
void start(const MaxLogitsHopperArguments& arguments, const void* cells, const MaxLogits& job,
           const Launch& where) {
    const int columns = arguments.images * arguments.p;
    if (arguments.p == 49) return start<T, 248, 49>(arguments, cells, job, where);
    if (columns <= 200) return start<T, 200, 0>(arguments, cells, job, where);
    if (columns <= 248) return start<T, 248, 0>(arguments, cells, job, where);
    return start<T, 256, 0>(arguments, cells, job, where);
}

}  // namespace

bool max_logits_hopper_serves(const MaxLogits& job, int device) {
    const FeatureMap& img = job.img;
    return is_hopper(device) && img.dtype != Dtype::kFloat32 && img.c % 8 == 0 &&
           img.c <= kMostBoxes * kBoxColumns && img.p >= 16 && img.p <= kMostColumns &&
           has_coordinates(img) && is_aligned(img.data) && is_aligned(job.aud);
}

void max_logits_hopper(const MaxLogits& job, const Launch& where) {
    const FeatureMap& img = job.img;
    const int images = static_cast<int>(kMostColumns / img.p);
    const int64_t tiles = ceil_div(img.n, images), sound_blocks = ceil_div(job.m, kSounds);
    const int64_t share = ceil_div(tiles, larger(kBlocks / sound_blocks, 1));
    const void* cells = img.data;
    if (img.stride_c != 1) {
        copy_channels_last(img, where.workspace, nullptr, nullptr, where);
        cells = where.workspace;
    }
    const MaxLogitsHopperArguments arguments{{},
                                             make_matrix(job.aud, job.m, img.c, kSounds),
                                             job.logits,
                                             job.argmax,
                                             job.m,
                                             static_cast<int>(img.n),
                                             static_cast<int>(img.p),
                                             static_cast<int>(ceil_div(img.c, kBoxColumns)),
                                             images,
                                             static_cast<int>(sound_blocks),
                                             static_cast<int>(share),
                                             static_cast<int>(sound_blocks * ceil_div(tiles, share)),
                                             job.scale};
    if (img.dtype == Dtype::kBFloat16) return start<BFloat16>(arguments, cells, job, where);
    return start<Float16>(arguments, cells, job, where);
}

}  // namespace fnac::cuda
