// Max-pooled logits: a block multiplies some sounds with a tile of 64 cells of each of two images, and its
// lanes keep maximum and first argmax of their columns in registers; nothing of the similarities leaves the
// chip.
//
// Cells are cut into equal tiles of at most 64, 196 = 4 x 49, of which the tensor cores compute whole groups
// of eight: 49 cells cost 56. The channels pass in stages, three in flight, across the tiles without a pause.
// Sounds and channels_last cells come by asynchronous copies; cells of NCHW are loaded into registers a stage
// ahead and stored transposed, because an odd number of cells leaves no alignment to copy by.
#include "cuda/max_logits_hopper.cuh"
#include "cuda/tile.cuh"

namespace fnac::cuda {
namespace {

// Chips before sm_80 copy nothing ahead, and a block has 64 KB of shared memory there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kStages = 2;
#else
constexpr int kStages = 3;
#endif
constexpr int kImages = 2;  // of a block

struct MaxLogitsArguments {
    const void* img;
    const void* aud;
    float* logits;
    uint16_t* argmax;
    int64_t n, m;
    int c, p;
    int64_t stride_c, stride_p;
    float scale;
    int tile_cells, tiles;  // cells of a tile, tiles of an image
    int sound_blocks;
    bool aligned;  // rows of channels are multiples of 16 bytes
};

// A NaN is larger than everything, the first one.
FNAC_DEVICE bool wins(float x, float best) { return !(x <= best) && best == best; }

template <class T, bool kPlanes, int kWarps>
class Operands {
  public:
    static constexpr int kThreads = kWarps * kImages * kWarpSize;
    static constexpr int kSounds = kWarps * kTile;
    static constexpr int kStageBytes = (kSounds + kImages * kTile) * kRowBytes;

    FNAC_DEVICE Operands(const MaxLogitsArguments& job, int64_t n0, int64_t m0)
        : job_(job), n0_(n0), m0_(m0) {}

    FNAC_DEVICE static char* sounds(int stage) { return shared_memory() + stage % kStages * kStageBytes; }
    FNAC_DEVICE static char* cells(int stage) { return sounds(stage) + kSounds * kRowBytes; }

    // A stage's operands are on their way in two halves, each during half of the products of an earlier
    // stage: all cells at once would take too many registers.
    static constexpr int kHalves = 2;

    // Starts half of a stage of a tile, its channels from c on.
    FNAC_DEVICE void begin(int half, int stage, int tile, int c) {
        const T* aud = static_cast<const T*>(job_.aud);
        for (int i = half * kThreads + thread_index(); i < kSounds * kChunks; i += kHalves * kThreads) {
            const int row = i / kChunks, chunk = i % kChunks;
            const bool read = m0_ + row < job_.m;
            copy_chunk(chunk_of(sounds(stage), row, chunk), aud + (read ? m0_ + row : 0) * job_.c, read,
                       c + chunk * kVector<T>, job_.c, job_.aligned);
        }
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
            const Part part = part_of(half, k);
            bool read;
            const T* cell = find(tile, part.row, read);
            if constexpr (kPlanes) {
                chunks_[k].load(cell, job_.stride_c, read, c + part.chunk * kVector<T>, job_.c);
            } else {
                copy_chunk(chunk_of(cells(stage), part.row, part.chunk), cell, read,
                           c + part.chunk * kVector<T>, job_.c, job_.aligned);
            }
        }
    }

    FNAC_DEVICE void finish(int half, int stage) const {
        if constexpr (kPlanes) {
#pragma unroll
            for (int k = 0; k < kParts; ++k) {
                const Part part = part_of(half, k);
                chunks_[k].store(chunk_of(cells(stage), part.row, part.chunk));
            }
        }
    }

  private:
    static constexpr int kParts = kImages * kTile * kChunks / kThreads / kHalves;
    struct Part {
        int row, chunk;
    };
    // A thread's k-th chunk: neighbouring lanes take neighbouring addresses of memory.
    FNAC_DEVICE static Part part_of(int half, int k) {
        const int i = (half * kParts + k) * kThreads + thread_index();
        if constexpr (kPlanes) return {i % (kImages * kTile), i / (kImages * kTile)};
        return {i / kChunks, i % kChunks};
    }
    FNAC_DEVICE const T* find(int tile, int row, bool& read) const {
        const int64_t n = n0_ + row / kTile;
        const int cell = row % kTile, p = tile * job_.tile_cells + cell;
        read = n < job_.n && cell < job_.tile_cells && p < job_.p;
        const T* img = static_cast<const T*>(job_.img);
        return read ? img + n * job_.c * job_.p + p * job_.stride_p : img;
    }

    const MaxLogitsArguments& job_;
    const int64_t n0_, m0_;
    PlaneChunk<T> chunks_[kPlanes ? kParts : 1];
};

// Maximum and first argmax of a lane's rows.
template <class Tile>
struct Best {
    float value[Tile::kRows];
    int cell[Tile::kRows];

    FNAC_DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < Tile::kRows; ++i) {
            value[i] = kNegInf;
            cell[i] = 0;
        }
    }
    FNAC_DEVICE void add(const Tile& tile, int first, int count, int lane) {
#pragma unroll
        for (int j = 0; j < Tile::kColumns; ++j) {
            const int column = Tile::column(lane, j);
            if (column >= count) continue;
#pragma unroll
            for (int i = 0; i < Tile::kRows; ++i) {
                if (wins(tile.at(i, j), value[i])) {
                    value[i] = tile.at(i, j);
                    cell[i] = first + column;
                }
            }
        }
    }
    // Of the lanes that share rows.
    FNAC_DEVICE void merge() {
#pragma unroll
        for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
            for (int mask = 1; mask < Tile::kLanes; mask *= 2) {
                const float other = shuffle_xor(value[i], mask);
                const int at = shuffle_xor(cell[i], mask);
                const bool equal = other == value[i] || (other != other && value[i] != value[i]);
                if (equal ? at < cell[i] : wins(other, value[i])) {
                    value[i] = other;
                    cell[i] = at;
                }
            }
        }
    }
};

template <class Tile, class T, bool kPlanes, int kWarps>
FNAC_KERNEL(kWarps * kImages * kWarpSize, 4 / kWarps)
max_logits_kernel(const MaxLogitsArguments job) {
    const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
    const int64_t n0 = block_x() / job.sound_blocks * kImages;
    const int64_t m0 = block_x() % job.sound_blocks * kWarps * kTile;
    const int64_t n = n0 + warp % kImages, m = m0 + warp / kImages * kTile;
    const bool busy = n < job.n && m < job.m;  // whether any of the warp's products are wanted

    Operands<T, kPlanes, kWarps> operands(job, n0, m0);
    const int depth = (job.c + kDepth<T> - 1) / kDepth<T>, stages = depth * job.tiles;
    for (int stage = 0; stage < kStages - 1; ++stage) {
        for (int half = 0; half < operands.kHalves && stage < stages; ++half) {
            operands.begin(half, stage, stage / depth, stage % depth * kDepth<T>);
            operands.finish(half, stage);
        }
        copy_commit();
    }
    Tile tile;
    Best<Tile> best;
    best.clear();
    int stage = 0;
    for (int at = 0; at < job.tiles; ++at) {
        const int first = at * job.tile_cells;
        const int cells = job.p - first < job.tile_cells ? job.p - first : job.tile_cells;
        tile.clear();
        for (int k = 0; k < depth; ++k, ++stage) {
            copy_wait<kStages - 2>();
            block_barrier();
            // The stage that is filled now was read before the barrier.
            const int next = stage + kStages - 1;
#pragma unroll
            for (int half = 0; half < operands.kHalves; ++half) {
                if (next < stages) operands.begin(half, next, next / depth, next % depth * kDepth<T>);
                if (busy)
                    tile.add(operands.sounds(stage) + warp / kImages * kTile * kRowBytes,
                             operands.cells(stage) + warp % kImages * kTile * kRowBytes, half, cells, lane);
                if (next < stages) operands.finish(half, next);
            }
            copy_commit();
        }
        if (busy) best.add(tile, first, cells, lane);
    }
    if (!busy) return;
    best.merge();
    if (lane % Tile::kLanes != 0) return;
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
        const int64_t sound = m + Tile::row(lane, i);
        if (sound >= job.m) continue;
        job.logits[n * job.m + sound] = best.value[i] * job.scale;
        job.argmax[n * job.m + sound] = static_cast<uint16_t>(best.cell[i]);
    }
}

template <class Tile, class T, bool kPlanes, int kWarps>
void start(MaxLogitsArguments arguments, const Launch& where) {
    using Block = Operands<T, kPlanes, kWarps>;
    arguments.sound_blocks = static_cast<int>(ceil_div(arguments.m, Block::kSounds));
    static_assert(2 * Block::kStageBytes <= 64 * 1024);
    launch(max_logits_kernel<Tile, T, kPlanes, kWarps>,
           {"max_logits_kernel", arguments.n, arguments.m, arguments.c, arguments.p},
           {ceil_div(arguments.n, kImages) * arguments.sound_blocks}, Block::kThreads,
           smaller(kStages * Block::kStageBytes, most_shared(where.device)), where, arguments);
}

template <class Tile, class T>
void start(const MaxLogitsArguments& arguments, const Launch& where) {
    // With few sounds smaller blocks, two of them on a multiprocessor; where the registers allow it, which
    // they do not for float32 cells of NCHW.
    constexpr bool kHasSmallPlanes = sizeof(T) == 2;
    const bool planes = arguments.stride_p == 1, many = arguments.m > 2 * kTile;
    if constexpr (kHasSmallPlanes)
        if (planes && !many) return start<Tile, T, true, 2>(arguments, where);
    if (planes) return start<Tile, T, true, 4>(arguments, where);
    if (many) return start<Tile, T, false, 4>(arguments, where);
    return start<Tile, T, false, 2>(arguments, where);
}

}  // namespace

int64_t workspace_bytes(const MaxLogits& job, int device) {
    return max_logits_hopper_serves(job, device) ? channels_last_bytes(job.img) : 0;
}

void run(const MaxLogits& job, const Launch& where) {
    if (max_logits_hopper_serves(job, where.device)) return max_logits_hopper(job, where);
    const FeatureMap& img = job.img;
    const int64_t tiles = ceil_div(img.p, kTile), row_bytes = img.c * (img.dtype == Dtype::kFloat32 ? 4 : 2);
    const MaxLogitsArguments arguments{
        img.data,
        job.aud,
        job.logits,
        job.argmax,
        img.n,
        job.m,
        static_cast<int>(img.c),
        static_cast<int>(img.p),
        img.stride_c,
        img.stride_p,
        job.scale,
        static_cast<int>(ceil_div(img.p, tiles)),
        static_cast<int>(tiles),
        0,
        row_bytes % 16 == 0 && is_aligned(img.data) && is_aligned(job.aud),
    };
    if (img.dtype == Dtype::kBFloat16) return start<TensorTile<BFloat16>, BFloat16>(arguments, where);
    if (img.dtype == Dtype::kFloat16) return start<TensorTile<Float16>, Float16>(arguments, where);
    if (job.precision == Precision::kTensorFloat32)
        return start<TensorTile<TensorFloat32>, float>(arguments, where);
    return start<PlainTile, float>(arguments, where);
}

}  // namespace fnac::cuda
