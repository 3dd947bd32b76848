// A block owns a tile of 64 x 64 or 128 x 128 elements.
//
// Of float32, a thread owns 4 x 4 or 8 x 8 of them. The depth passes in steps of 16 or 8, turned on the way
// to shared memory so that a thread reads its rows and columns 16 bytes at a time. Fused multiply-adds: the
// features are float32, and the softmaxes of trained ones show every bit.
//
// Products of 16-bit sounds with each other are exact on the tensor cores, and so are those of bfloat16 with
// float32 in three parts of eight bits. Tensor cores cut off what does not fit below a sum, so a sum there is
// short, and the short ones are added up with rounding.
#include "cuda/products.cuh"
#include "cuda/stage.cuh"

namespace fnac::cuda {
namespace {

constexpr int kThreads = 256;

// The depth passes in steps, of which so many are in flight.
template <int kSide>
constexpr int kStep = 64 / kSide;
template <int kSide>
constexpr int kStages = kSide == 8 ? 4 : 3;
// Of an operand's tile in shared memory.
template <int kSide>
constexpr int kPitch = 16 * kSide + 4;
template <int kSide>
constexpr int kFloats = kStep<kSide> * kPitch<kSide>;

// Elements (k, row) of a tile of rows, of a matrix (size, depth): turned on the way. Eight lanes copy a row's
// neighbours in memory, to different banks.
template <int kSide>
class Rows {
  public:
    FNAC_DEVICE Rows(const float* matrix, int first, int64_t size, int depth, int begin)
        : stride_(32 * depth), rest_(static_cast<int>(size) - first - row()) {
        next_ = matrix + static_cast<int64_t>(first + row()) * depth + begin + column();
    }

    // Starts the copy of the next step of the depth, of which there are `left`.
    FNAC_DEVICE void start(float* tile, int left) {
        float* to = tile + column() * kPitch<kSide> + row();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int k = i % kGroups * 8, r = i / kGroups;
            copy_async<4>(to + k * kPitch<kSide> + 32 * r, next_ + k + static_cast<int64_t>(r) * stride_,
                          column() + k < left && 32 * r < rest_);
        }
        next_ += kStep<kSide>;
    }

  private:
    static constexpr int kGroups = kStep<kSide> / 8;
    FNAC_DEVICE static int column() { return thread_index() % 8; }
    FNAC_DEVICE static int row() { return thread_index() / 8; }

    const int stride_, rest_;
    const float* next_;
};

// The same of a tile of columns, of a matrix (depth, size); in large tiles 16 bytes at a time.
template <int kSide>
class Columns {
  public:
    FNAC_DEVICE Columns(const float* matrix, int first, int64_t size)
        : size_(static_cast<int>(size)), there_(first + column() < size_) {
        next_ = matrix + static_cast<int64_t>(row()) * size_ + first + column();
    }

    FNAC_DEVICE void start(float* tile, int left) {
        float* to = tile + row() * kPitch<kSide> + column();
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
            const int k = i * kRowsAtOnce;
            copy_async<4 * kWidth>(to + k * kPitch<kSide>, next_ + static_cast<int64_t>(k) * size_,
                                   there_ && row() + k < left);
        }
        next_ += static_cast<int64_t>(kStep<kSide>) * size_;
    }

  private:
    static constexpr int kWidth = kSide == 8 ? 4 : 1, kCopies = 4 / kWidth;
    static constexpr int kLanes = 16 * kSide / kWidth, kRowsAtOnce = kThreads / kLanes;
    FNAC_DEVICE static int column() { return thread_index() % kLanes * kWidth; }
    FNAC_DEVICE static int row() { return thread_index() / kLanes; }

    const int size_;
    const bool there_;
    const float* next_;
};

// A thread's elements of a tile: fours of rows y + 64 i by fours of columns x + 64 j. A warp is 4 x 8
// threads, numbered so that lanes that differ in the lowest bit read the same columns, in the next the same
// rows: only then a read of 16 bytes by all takes two passes and not four.
template <int kSide>
struct PlainTile {
    float sums[kSide][kSide] = {};

    FNAC_DEVICE static int y() {
        const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
        return (warp / 2 * 4 + lane / 16 * 2 + lane % 2) * 4;
    }
    FNAC_DEVICE static int x() {
        const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
        return (warp % 2 * 8 + lane / 2 % 8) * 4;
    }

    static constexpr int64_t kBytes = kStages<kSide> * 2 * kFloats<kSide> * sizeof(float);

    // Every element is summed in the order of the depth.
    template <class Left, class Right>
    FNAC_DEVICE void add(Left& left, Right& right, int depth) {
        constexpr int kSteps = kStages<kSide>;
        float* memory = reinterpret_cast<float*>(shared_memory());
        const auto start = [&](int step) {
            float* tile = memory + step % kSteps * 2 * kFloats<kSide>;
            if (step * kStep<kSide> < depth) {
                left.start(tile, depth - step * kStep<kSide>);
                right.start(tile + kFloats<kSide>, depth - step * kStep<kSide>);
            }
            copy_commit();
        };
        for (int step = 0; step < kSteps - 1; ++step) start(step);
        const int y = PlainTile::y(), x = PlainTile::x() + kFloats<kSide>;
#pragma unroll 1
        for (int step = 0; step * kStep<kSide> < depth; ++step) {
            copy_wait<kSteps - 2>();
            block_barrier();
            // The step that is filled now was read before the barrier.
            start(step + kSteps - 1);
            const float* tile = memory + step % kSteps * 2 * kFloats<kSide>;
#pragma unroll
            for (int k = 0; k < kStep<kSide>; ++k) {
                float a[kSide], b[kSide];
#pragma unroll
                for (int i = 0; i < kSide; i += 4) {
                    const Float4 l = *reinterpret_cast<const Float4*>(tile + k * kPitch<kSide> + i * 16 + y);
                    const Float4 r = *reinterpret_cast<const Float4*>(tile + k * kPitch<kSide> + i * 16 + x);
                    a[i] = l.x, a[i + 1] = l.y, a[i + 2] = l.z, a[i + 3] = l.w;
                    b[i] = r.x, b[i + 1] = r.y, b[i + 2] = r.z, b[i + 3] = r.w;
                }
#pragma unroll
                for (int i = 0; i < kSide; ++i)
#pragma unroll
                    for (int j = 0; j < kSide; ++j) sums[i][j] = multiply_add(a[i], b[j], sums[i][j]);
            }
        }
    }

    // Elements (i, j..j + 3) and (i..i + 3, j), where i and j are multiples of four.
    FNAC_DEVICE Float4 row(int i, int j, float scale) const {
        return {sums[i][j] * scale, sums[i][j + 1] * scale, sums[i][j + 2] * scale, sums[i][j + 3] * scale};
    }
    FNAC_DEVICE Float4 column(int i, int j, float scale) const {
        return {sums[i][j] * scale, sums[i + 1][j] * scale, sums[i + 2][j] * scale, sums[i + 3][j] * scale};
    }
};

// Where elements of a symmetric product go: those of the rows from `row0` up to `end`. A panel's places fit
// 32 bits.
struct Mirror {
    float* out;
    int row0, end, n;
    float scale;
    bool upper, lower;  // which of an element and its mirror image are in the panel
    bool diagonal;      // the tile is its own mirror image: half of it is written, twice

    FNAC_DEVICE float* at(int row, int column) const {
        return out + (static_cast<uint32_t>(row - row0) * static_cast<uint32_t>(n) + column);
    }
    FNAC_DEVICE void write(int row, int column, float sum) const {
        if (row >= n || column >= n || (diagonal && row > column)) return;
        if (upper && row < end) *at(row, column) = sum * scale;
        if (lower && column < end) *at(column, row) = sum * scale;
    }
};

template <int kSide>
FNAC_DEVICE void write(const PlainTile<kSide>& tile, const Mirror& to, int row0, int column0) {
    row0 += tile.y(), column0 += tile.x();
    if (to.diagonal || to.n % 4 != 0) {
#pragma unroll
        for (int i = 0; i < kSide; ++i)
#pragma unroll
            for (int j = 0; j < kSide; ++j)
                to.write(row0 + i / 4 * 64 + i % 4, column0 + j / 4 * 64 + j % 4, tile.sums[i][j]);
        return;
    }
#pragma unroll
    for (int i = 0; i < kSide; ++i)
#pragma unroll
        for (int j = 0; j < kSide; j += 4) {
            const int row = row0 + i / 4 * 64 + i % 4, column = column0 + j / 4 * 64;
            if (to.upper && row < to.end && column < to.n)
                *reinterpret_cast<Float4*>(to.at(row, column)) = tile.row(i, j, to.scale);
        }
#pragma unroll
    for (int i = 0; i < kSide; i += 4)
#pragma unroll
        for (int j = 0; j < kSide; ++j) {
            const int row = row0 + i / 4 * 64, column = column0 + j / 4 * 64 + j % 4;
            if (to.lower && column < to.end && row < to.n)
                *reinterpret_cast<Float4*>(to.at(column, row)) = tile.column(i, j, to.scale);
        }
}

// A block's products of 16-bit rows with 64 others: a warp owns a quarter of its rows and half of its
// columns. Twice that many columns at a time would need all of a thread's registers.
constexpr int kTensorColumns = 64;

template <int kSide, class T>
struct TensorTile {
    static constexpr int kTile = 16 * kSide, kStages = 4;
    static constexpr int kStageBytes = (kTile + kTensorColumns) * kRowBytes;
    static constexpr int kRowBlocks = kTile / 64, kColumnPairs = kTensorColumns / 32;  // of 16
    static constexpr int64_t kBytes = kStages * kStageBytes;
    float sums[kRowBlocks][2 * kColumnPairs][4] = {};

    FNAC_DEVICE static int place(int row, int chunk) {
        return static_cast<int>(chunk_of(shared_memory(), row, chunk) - shared_memory());
    }
    FNAC_DEVICE static int warp_row() { return thread_index() / kWarpSize / 2 * (kTile / 4); }
    FNAC_DEVICE static int warp_column() { return thread_index() / kWarpSize % 2 * (kTensorColumns / 2); }

    // `channels` from `begin` on of the rows from row0 and from column0. Of large tiles, rows are multiples
    // of 16 bytes.
    FNAC_DEVICE void add(const T* features, int n, int depth, int row0, int column0, int begin, int channels,
                         bool aligned) {
        constexpr int kChannels = kRowBytes / sizeof(T), kRowsAtOnce = kThreads / kChunks;
        const int stages = (channels + kChannels - 1) / kChannels;
        const int row = thread_index() / kChunks, chunk = thread_index() % kChunks;
        const int rest[2] = {n - row0 - row, n - column0 - row};
        const T* next[2] = {
            features + static_cast<int64_t>(row0 + row) * depth + begin + chunk * kVector<T>,
            features + static_cast<int64_t>(column0 + row) * depth + begin + chunk * kVector<T>};
        const auto start = [&](int stage) {
            char* to = chunk_of(shared_memory() + stage % kStages * kStageBytes, row, chunk);
            const int left = channels - stage * kChannels - chunk * kVector<T>;
#pragma unroll
            for (int operand = 0; operand < 2; ++operand) {
#pragma unroll
                for (int i = 0; i < (operand == 0 ? kTile : kTensorColumns); i += kRowsAtOnce)
                    copy_chunk(to + (operand * kTile + i) * kRowBytes,
                               i < rest[operand] ? next[operand] + static_cast<int64_t>(i) * depth : features,
                               i < rest[operand], 0, left, kSide == 8 || aligned);
                next[operand] += kChannels;
            }
        };
        for (int stage = 0; stage < kStages - 1; ++stage) {
            if (stage < stages) start(stage);
            copy_commit();
        }
        // Where a lane's parts of the warp's fragments lie; those of the other half some bits away.
        const int lane = thread_index() % kWarpSize;
        const int from_rows = place(warp_row() + lane % 16, lane / 16);
        const int from_columns = place(kTile + warp_column() + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll 1
        for (int stage = 0; stage < stages; ++stage) {
            copy_wait<kStages - 2>();
            block_barrier();
            // The stage that is filled now was read before the barrier.
            if (stage + kStages - 1 < stages) start(stage + kStages - 1);
            copy_commit();
            const char* tile = shared_memory() + stage % kStages * kStageBytes;
#pragma unroll
            for (int i = 0; i < kRowBlocks; ++i) {
                uint32_t a[2][4];
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    load_matrices(a[half], tile + (from_rows ^ half * 32) + i * 16 * kRowBytes);
#pragma unroll
                for (int pair = 0; pair < kColumnPairs; ++pair) {
                    uint32_t b[2][4];
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        load_matrices(b[half], tile + (from_columns ^ half * 32) + pair * 16 * kRowBytes);
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        float few[4] = {};
#pragma unroll
                        for (int half = 0; half < 2; ++half)
                            multiply(T{}, few, a[half], b[half][2 * j], b[half][2 * j + 1]);
#pragma unroll
                        for (int k = 0; k < 4; ++k) sums[i][2 * pair + j][k] += few[k];
                    }
                }
            }
        }
    }

    FNAC_DEVICE void write(const Mirror& to, int row0, int column0) const {
        const int lane = thread_index() % kWarpSize;
#pragma unroll
        for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
            for (int j = 0; j < 2 * kColumnPairs; ++j)
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    to.write(row0 + warp_row() + i * 16 + k / 2 * 8 + lane / 4,
                             column0 + warp_column() + j * 8 + lane % 4 * 2 + k % 2, sums[i][j][k]);
    }
};

// A block's tile of a product of float32 and bfloat16: warps as in TensorTile, in stages of 16 of the depth.
// Rows are multiples of 16 bytes.
struct SplitTile {
    static constexpr int kTile = 128, kStages = 4, kDepth = 16;
    static constexpr int kRightRow = kTensorColumns * 2;
    static constexpr int kLeftBytes = kTile * kDepth * 4, kRightBytes = kDepth * kRightRow;
    static constexpr int64_t kBytes = kStages * (kLeftBytes + kRightBytes);
    float sums[2][4][4] = {};

    // Where a chunk of 16 bytes lies: as fragments read them, they are in different banks.
    FNAC_DEVICE static int left_chunk(int row, int chunk) {
        return row * kDepth * 4 + ((chunk ^ (row & 2)) << 4);
    }
    FNAC_DEVICE static int right_chunk(int k, int chunk) {
        return kLeftBytes + k * kRightRow + ((chunk ^ (k & 7)) << 4);
    }
    FNAC_DEVICE static int warp_row() { return thread_index() / kWarpSize / 2 * 32; }
    FNAC_DEVICE static int warp_column() { return thread_index() / kWarpSize % 2 * (kTensorColumns / 2); }

    FNAC_DEVICE void add(const float* left, const BFloat16* right, int rows, int columns, int depth, int row0,
                         int column0) {
        const int row = thread_index() / 4, chunk = thread_index() % 4;
        const int k_row = thread_index() / 8, k_chunk = thread_index() % 8;  // of half of the threads
        const int rest = rows - row0 - row;
        const int first = column0 + k_chunk * 8 < columns ? k_row : depth;
        // Places of elements: in 32 bits, for want of registers.
        uint32_t next_left = static_cast<uint32_t>(row0 + row) * depth + chunk * 4;
        uint32_t next_right = static_cast<uint32_t>(k_row) * columns + column0 + k_chunk * 8;
        const auto start = [&](int stage) {
            char* tile = shared_memory() + stage % kStages * (kLeftBytes + kRightBytes);
            const int left_over = depth - stage * kDepth;
            if (left_over > 0) {
#pragma unroll
                for (int i = 0; i < kTile; i += 64)
                    copy_async(tile + left_chunk(row, chunk) + i * kDepth * 4,
                               left + (next_left + static_cast<uint32_t>(i) * depth),
                               i < rest && chunk * 4 < left_over);
                if (k_row < kDepth)
                    copy_async(tile + right_chunk(k_row, k_chunk), right + next_right, first < left_over);
                next_left += kDepth;
                next_right += static_cast<uint32_t>(kDepth) * columns;
            }
            copy_commit();
        };
        for (int stage = 0; stage < kStages - 1; ++stage) start(stage);
        // Where a lane's parts of the warp's fragments lie. Their other chunks are some bits away.
        const int lane = thread_index() % kWarpSize;
        const int from_left = left_chunk(warp_row() + lane / 4, lane % 4 / 2) + lane % 2 * 8;
        const int from_right = right_chunk(lane % 16, warp_column() / 8 + lane / 16);
#pragma unroll 1
        for (int stage = 0; stage * kDepth < depth; ++stage) {
            copy_wait<kStages - 2>();
            block_barrier();
            // The stage that is filled now was read before the barrier.
            start(stage + kStages - 1);
            char* tile = shared_memory() + stage % kStages * (kLeftBytes + kRightBytes);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                uint32_t a[3][4];  // by parts, in the layout of multiply()
#pragma unroll
                for (int word = 0; word < 4; ++word) {
                    const Float2 x = *reinterpret_cast<const Float2*>(tile + (from_left ^ word / 2 * 32) +
                                                                      (i * 16 + word % 2 * 8) * kDepth * 4);
                    uint32_t low[3], high[3];
                    split(x.x, low);
                    split(x.y, high);
#pragma unroll
                    for (int part = 0; part < 3; ++part) a[part][word] = upper_halves(low[part], high[part]);
                }
#pragma unroll
                for (int pair = 0; pair < 2; ++pair) {
                    uint32_t b[4];
                    load_matrices_turned(b, tile + (from_right ^ pair * 32));
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        float few[4] = {};
#pragma unroll
                        for (int part = 2; part >= 0; --part)
                            multiply(BFloat16{}, few, a[part], b[2 * j], b[2 * j + 1]);
#pragma unroll
                        for (int k = 0; k < 4; ++k) sums[i][2 * pair + j][k] += few[k];
                    }
                }
            }
        }
    }

    FNAC_DEVICE void write(float* out, int rows, int columns, int row0, int column0, float scale) const {
        const int lane = thread_index() % kWarpSize;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = row0 + warp_row() + i * 8 + lane / 4;
            if (row >= rows) continue;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int column = column0 + warp_column() + j * 8 + lane % 4 * 2;
                const float* sum = sums[i / 2][j] + i % 2 * 2;
                if (column < columns)
                    *reinterpret_cast<Float2*>(out + static_cast<int64_t>(row) * columns + column) = {
                        sum[0] * scale, sum[1] * scale};
            }
        }
    }
};

struct GramsArguments {
    Grams grams;
    Gram last;     // of them
    int part;      // of the depth
    bool aligned;  // 16-bit rows are multiples of 16 bytes
};

// T is the type of the last product's features. Its blocks come last because they are the shortest.
template <int kSide, class T>
FNAC_KERNEL(kThreads, 2)
grams_kernel(const GramsArguments arguments) {
    constexpr int kTile = 16 * kSide;
    const Grams& job = arguments.grams;
    const int first = static_cast<int>(job.row0 / kTile);
    const int tile = first + block_y(), other = static_cast<int>(block_x());
    if (other >= first && other < tile) return;  // another block writes it with its mirror image
    const int parts = static_cast<int>(job.parts);
    const int z = (block_z() >= parts) + (block_z() >= 2 * parts), part = block_z() - z * parts;
    // The earlier rows are always the left operand: a product has one order of its sums in every panel.
    const int row0 = (other < tile ? other : tile) * kTile, column0 = (other < tile ? tile : other) * kTile;
    const int begin = part * arguments.part, depth = static_cast<int>(job.depth);
    const int rest = depth - begin < arguments.part ? depth - begin : arguments.part;
    // Not an index: parameters that are indexed end up in local memory.
    const auto gram = [&] { return z == 0 ? job.each[0] : z == 1 ? job.each[1] : job.each[2]; };
    const auto mirror = [&](float* out) -> Mirror {
        const int end = static_cast<int>(job.row0 + job.rows);
        return {out + part * job.part_stride,
                static_cast<int>(job.row0),
                end,
                static_cast<int>(job.n),
                job.scale,
                row0 >= job.row0,
                column0 < end,
                row0 == column0};
    };
    if constexpr (sizeof(T) == 2) {
        if (z == job.count - 1) {
            const int n = static_cast<int>(job.n);
#pragma unroll 1
            for (int column = column0; column < column0 + kTile && column < n; column += kTensorColumns) {
                if (column != column0) block_barrier();  // the columns before are done with the stages
                TensorTile<kSide, T> products;
                products.add(static_cast<const T*>(arguments.last.features), n, depth, row0, column, begin,
                             rest, arguments.aligned);
                products.write(mirror(arguments.last.out), row0, column);
            }
            return;
        }
    }
    const float* features = static_cast<const float*>(gram().features);
    Rows<kSide> left(features, row0, job.n, depth, begin), right(features, column0, job.n, depth, begin);
    PlainTile<kSide> products;
    products.add(left, right, rest);
    write(products, mirror(gram().out), row0, column0);
}

template <int kSide, class T>
void start(const Grams& job, bool aligned, const Launch& where) {
    constexpr int kTile = 16 * kSide;
    int64_t bytes = PlainTile<kSide>::kBytes;
    if constexpr (sizeof(T) == 2) bytes = larger(bytes, TensorTile<kSide, T>::kBytes);
    const int64_t steps = ceil_div(job.depth, kPartStep);
    launch(grams_kernel<kSide, T>, {"grams_kernel", job.rows, job.n, job.depth, 1},
           {ceil_div(job.n, kTile), ceil_div(job.rows, kTile), job.count * job.parts}, kThreads, bytes, where,
           GramsArguments{job, job.each[job.count - 1],
                          static_cast<int>(ceil_div(steps, job.parts) * kPartStep), aligned});
}

struct ProductsArguments {
    Products products;
    Product last;  // of them
};

template <int kSide, bool kNarrow>
FNAC_KERNEL(kThreads, 2)
products_kernel(const ProductsArguments arguments) {
    constexpr int kTile = 16 * kSide;
    const Products& job = arguments.products;
    const int row0 = block_y() * kTile, column0 = static_cast<int>(block_x()) * kTile;
    const int z = block_z(), depth = static_cast<int>(job.depth);
    const auto product = [&] { return z == 0 ? job.each[0] : z == 1 ? job.each[1] : job.each[2]; };
    if constexpr (kNarrow) {
        if (z == job.count - 1) {
            const int rows = static_cast<int>(job.rows), columns = static_cast<int>(job.columns);
#pragma unroll 1
            for (int column = column0; column < column0 + kTile && column < columns;
                 column += kTensorColumns) {
                if (column != column0) block_barrier();
                SplitTile products;
                products.add(arguments.last.left, job.narrow, rows, columns, depth, row0, column);
                products.write(arguments.last.out, rows, columns, row0, column, job.scale);
            }
            return;
        }
    }
    Rows<kSide> left(product().left, row0, job.rows, depth, 0);
    Columns<kSide> right(product().right, column0, job.columns);
    PlainTile<kSide> tile;
    tile.add(left, right, depth);
    float* out = product().out;
    const int y = tile.y(), x = tile.x();
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
        const int row = row0 + i / 4 * 64 + y + i % 4;
        if (row >= job.rows) continue;
#pragma unroll
        for (int j = 0; j < kSide; j += 4) {
            const int64_t column = column0 + j / 4 * 64 + x, rest = job.columns - column;
            float* to = out + row * job.columns + column;
            const Float4 four = tile.row(i, j, job.scale);
            if (kSide == 8) {
                if (rest > 0) *reinterpret_cast<Float4*>(to) = four;
                continue;
            }
            if (rest > 0) to[0] = four.x;
            if (rest > 1) to[1] = four.y;
            if (rest > 2) to[2] = four.z;
            if (rest > 3) to[3] = four.w;
        }
    }
}

template <int kSide, bool kNarrow>
void start(const Products& job, const Launch& where) {
    constexpr int kTile = 16 * kSide;
    const int64_t bytes =
        kNarrow ? larger(PlainTile<kSide>::kBytes, SplitTile::kBytes) : PlainTile<kSide>::kBytes;
    launch(products_kernel<kSide, kNarrow>, {"products_kernel", job.rows, job.columns, job.depth, 1},
           {ceil_div(job.columns, kTile), ceil_div(job.rows, kTile), job.count}, kThreads, bytes, where,
           ProductsArguments{job, job.each[job.count - 1]});
}

}  // namespace

void multiply(const Grams& job, const Launch& where) {
    with_dtype(job.last, [&](auto type) {
        using T = decltype(type);
        const bool aligned = job.depth % 8 == 0 && is_aligned(job.each[job.count - 1].features);
        if (job.tile == kLargeTile && (aligned || sizeof(T) == 4)) return start<8, T>(job, aligned, where);
        return start<4, T>(job, aligned, where);
    });
}

void multiply(const Products& job, const Launch& where) {
    const int64_t tiles = ceil_div(job.rows, kLargeTile) * ceil_div(job.columns, kLargeTile) * job.count;
    bool aligned = job.columns % 4 == 0;
    for (const Product& product : job.each)
        aligned = aligned && is_aligned(product.right) && is_aligned(product.out);
    if (tiles < kManyProductTiles || !aligned) return start<4, false>(job, where);
    bool narrow =
        job.narrow != nullptr && is_aligned(job.narrow) && job.columns % 8 == 0 && job.depth % 4 == 0;
    for (const Product& product : job.each) narrow = narrow && is_aligned(product.left);
    constexpr int64_t kMost = 0xffff0000;  // of SplitTile's places
    narrow = narrow && larger(job.rows, job.columns) * job.depth <= kMost;
    return narrow ? start<8, true>(job, where) : start<8, false>(job, where);
}

}  // namespace fnac::cuda
