// A block owns a tile of 64 x 64 or 128 x 128 elements, a thread 4 x 4 or 8 x 8 of them. The depth passes in
// steps of 16, turned in shared memory so that a thread reads its rows and columns 16 bytes at a time; the
// next step is loaded into registers during the products. Fused multiply-adds: the features are float32, and
// the softmaxes of trained ones show every bit.
#include "cuda/products.cuh"

namespace fnac::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kDepth = 16;
constexpr int64_t kManyRows = 1024;  // from here on the larger tiles fill the machine

// Of an operand's tile in shared memory.
template <int kSide>
constexpr int kPitch = 16 * kSide + 4;
template <int kSide>
constexpr int kFloats = kDepth * kPitch<kSide>;

// Elements (k, row) of an operand's tile, of a matrix (size, depth) or, if not kRowsOfDepth, (depth, size). A
// thread keeps its place in the contiguous dimension and strides along the other.
template <int kSide, bool kRowsOfDepth>
class Operand {
  public:
    FNAC_DEVICE Operand(const float* matrix, int64_t first, int64_t size, int64_t depth, int k0)
        : stride_(static_cast<int>(kRowsOfDepth ? depth : size)) {
        const int64_t rest = size - first;
        rows_ = rest < kTile ? static_cast<int>(rest) : kTile;
        next_ = matrix + (kRowsOfDepth ? (first + moving()) * depth + k0 + still()
                                       : (k0 + moving()) * size + first + still());
    }

    // The next kDepth of the depth, of which there are `depth` left.
    FNAC_DEVICE void load(int depth) {
        const int end = still() < (kRowsOfDepth ? depth : rows_) ? (kRowsOfDepth ? rows_ : depth) : 0;
#pragma unroll
        for (int i = 0; i < kSide; ++i)
            values_[i] = moving() + i * kStep < end ? next_[static_cast<int64_t>(i * kStep) * stride_] : 0.f;
        next_ += kRowsOfDepth ? kDepth : static_cast<int64_t>(kDepth) * stride_;
    }
    FNAC_DEVICE void store(float* tile) const {
#pragma unroll
        for (int i = 0; i < kSide; ++i) {
            const int other = moving() + i * kStep;
            tile[(kRowsOfDepth ? still() : other) * kPitch<kSide> + (kRowsOfDepth ? other : still())] =
                values_[i];
        }
    }

  private:
    static constexpr int kTile = 16 * kSide;
    static constexpr int kWidth = kRowsOfDepth ? kDepth : kTile;
    static constexpr int kStep = kThreads / kWidth;
    FNAC_DEVICE static int still() { return thread_index() % kWidth; }
    FNAC_DEVICE static int moving() { return thread_index() / kWidth; }

    const int stride_;
    int rows_;
    const float* next_;
    float values_[kSide];
};

struct ProductsArguments {
    Products products;
    int column_blocks;
    int part;  // of the depth
};

template <int kSide, bool kTransposed>
FNAC_KERNEL(kThreads, kSide == 4 ? 2 : 1)
products_kernel(const ProductsArguments arguments) {
    using Left = Operand<kSide, true>;
    using Right = Operand<kSide, kTransposed>;
    constexpr int kTile = 16 * kSide, kFours = kSide / 4;
    const Products& job = arguments.products;
    const int z = block_z() % job.count, part = block_z() / job.count;
    // Not an index: parameters that are indexed end up in local memory.
    const Product product = z == 0 ? job.each[0] : z == 1 ? job.each[1] : job.each[2];
    const int64_t row0 = block_x() / arguments.column_blocks * kTile;
    const int64_t column0 = block_x() % arguments.column_blocks * kTile;
    // A warp is 4 x 8 threads: what its lanes read of both operands at a time lies in different banks.
    const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
    const int y = (warp / 2 * 4 + lane / 8) * 4, x = (warp % 2 * 8 + lane % 8) * 4;

    float* memory = reinterpret_cast<float*>(shared_memory());
    const int begin = part * arguments.part, depth = static_cast<int>(job.depth);
    const int end = depth - begin < arguments.part ? depth : begin + arguments.part;
    Left left(product.left, row0, job.rows, depth, begin);
    Right right(product.right, column0, job.columns, depth, begin);
    float sums[kSide][kSide] = {};
    left.load(end - begin);
    right.load(end - begin);
    float* buffer = memory;
    for (int k0 = begin; k0 < end; k0 += kDepth) {
        left.store(buffer);
        right.store(buffer + kFloats<kSide>);
        block_barrier();
        if (k0 + kDepth < end) {
            left.load(end - k0 - kDepth);
            right.load(end - k0 - kDepth);
        }
#pragma unroll
        for (int k = 0; k < kDepth; ++k) {
            const float* row = buffer + k * kPitch<kSide>;
            float a[kSide], b[kSide];
#pragma unroll
            for (int i = 0; i < kFours; ++i) {
                const Float4 l = *reinterpret_cast<const Float4*>(row + i * 64 + y);
                const Float4 r = *reinterpret_cast<const Float4*>(row + kFloats<kSide> + i * 64 + x);
                a[4 * i] = l.x, a[4 * i + 1] = l.y, a[4 * i + 2] = l.z, a[4 * i + 3] = l.w;
                b[4 * i] = r.x, b[4 * i + 1] = r.y, b[4 * i + 2] = r.z, b[4 * i + 3] = r.w;
            }
#pragma unroll
            for (int i = 0; i < kSide; ++i)
#pragma unroll
                for (int j = 0; j < kSide; ++j) sums[i][j] = multiply_add(a[i], b[j], sums[i][j]);
        }
        // The other buffer was read before the barrier.
        buffer = buffer == memory ? memory + 2 * kFloats<kSide> : memory;
    }
    float* out = product.out + part * job.part_stride;
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
        const int64_t row = row0 + i / 4 * 64 + y + i % 4;
        if (row >= job.rows) continue;
#pragma unroll
        for (int j = 0; j < kSide; ++j) {
            const int64_t column = column0 + j / 4 * 64 + x + j % 4;
            if (column < job.columns) out[row * job.columns + column] = sums[i][j] * job.scale;
        }
    }
}

template <int kSide, bool kTransposed>
void start(const Products& job, const Launch& where) {
    constexpr int kTile = 16 * kSide;
    const int64_t column_blocks = ceil_div(job.columns, kTile);
    launch(products_kernel<kSide, kTransposed>, {"products_kernel", job.rows, job.columns, job.depth, 1},
           {ceil_div(job.rows, kTile) * column_blocks, 1, job.count * job.parts}, kThreads,
           4 * kFloats<kSide> * sizeof(float), where,
           ProductsArguments{job, static_cast<int>(column_blocks),
                             static_cast<int>(ceil_div(ceil_div(job.depth, kDepth), job.parts) * kDepth)});
}

}  // namespace

void multiply(const Products& job, const Launch& where) {
    const bool many = smaller(job.rows, job.columns) * larger(job.rows, job.columns) >= kManyRows * kManyRows;
    if (job.transposed) return many ? start<8, true>(job, where) : start<4, true>(job, where);
    return many ? start<8, false>(job, where) : start<4, false>(job, where);
}

}  // namespace fnac::cuda
