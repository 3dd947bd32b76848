// What the kernels for Hopper (sm_90a) use of it: barriers in shared memory that count bytes, copies of boxes
// of a matrix by the copy engine, and products of a warpgroup (four warps) on the tensor cores. Two
// implementations, as of primitives.cuh: this file for the device, tests/emulation/hopper_emulation.h for the
// host.
//
// Every operand lies in shared memory as rows of 128 bytes (64 elements of 16 bits), in groups of eight rows
// whose 16-byte chunks are permuted by the row's number (the engine's and the tensor cores' 128-byte
// swizzle); a block of rows begins at a multiple of 1024 bytes.
#pragma once

#include "cuda/launch.cuh"

namespace fnac::cuda {

constexpr int kBoxColumns = 64;  // elements of a row of a box: 128 bytes
constexpr int kBoxRowBytes = 128;
constexpr int kGroupSize = 128;  // threads of a warpgroup
constexpr int kGroupRows = 64;   // of a warpgroup's product
constexpr int kStepBytes = 32;   // of a row: the 16 elements that one product goes along

// Whether a device has what these kernels need.
bool is_hopper(int device);

// Whether the cells of all images, as rows of a matrix, have coordinates that the copy engine takes, a box
// beyond the last one included.
inline bool has_coordinates(const FeatureMap& img) { return img.n * img.p < (int64_t{1} << 31) - 1024; }

// Copies features of 16 bits in NCHW to channels_last, (n, p, c). With weights (n, p), the features being
// bfloat16, also writes sums (n, c) of weight times feature over the cells.
void copy_channels_last(const FeatureMap& img, void* copy, const float* weights, float* sums,
                        const Launch& where);

// Of that copy, which features in channels_last do without.
inline int64_t channels_last_bytes(const FeatureMap& img) {
    return img.stride_c == 1 ? 0 : ceil_div(img.n * img.c * img.p * 2, 256) * 256;
}

}  // namespace fnac::cuda

#ifdef FNAC_CUDA_EMULATION
#include "hopper_emulation.h"
#else

#include <cuda.h>

#define FNAC_HOPPER_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define FNAC_CONSTANT __grid_constant__

namespace fnac::cuda {

// A row-major matrix of 16-bit elements as the copy engine knows it.
using Matrix = CUtensorMap;

// Of `rows` rows of `columns` elements, copied in boxes of kBoxColumns by `box_rows`.
Matrix make_matrix(const void* data, int64_t rows, int64_t columns, int box_rows);

FNAC_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Of `threads` threads of the block; id is one of 1 to 15.
template <int kThreads>
FNAC_DEVICE void group_barrier(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}
FNAC_DEVICE int64_t grid_x() { return gridDim.x; }
// Whether any lane of the warp says so.
FNAC_DEVICE bool any(bool own) { return __any_sync(~0u, own); }

// A phase of a barrier ends when `count` arrivals have come and all bytes that were announced.
using Barrier = uint64_t;

FNAC_DEVICE void barrier_init(Barrier& barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count)
                 : "memory");
}
// Makes the initial barriers visible to the copy engine; a block barrier must follow.
FNAC_DEVICE void barriers_are_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
FNAC_DEVICE void barrier_arrive(Barrier& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Arrives and announces bytes that the copy engine will bring.
FNAC_DEVICE void barrier_expect(Barrier& barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
                 "r"(bytes)
                 : "memory");
}
// Waits for the end of the phase of this parity: phases are 0, 1, 0, ...
FNAC_DEVICE void barrier_wait(Barrier& barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "waiting:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra waiting;\n"
        "}" ::"r"(shared_address(&barrier)),
        "r"(parity)
        : "memory");
}

// Starts the copy of a box to shared memory; zeros beyond the matrix.
FNAC_DEVICE void copy_box(void* to, const Matrix& matrix, int64_t column, int64_t row, Barrier& barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(shared_address(to)),
        "l"(&matrix), "r"(shared_address(&barrier)), "r"(static_cast<int>(column)), "r"(static_cast<int>(row))
        : "memory");
}

// Registers of each of the warpgroup's threads from here on.
template <int kRegisters>
FNAC_DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FNAC_DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// How a product finds an operand: rows of channels, of which it takes kStepBytes ...
FNAC_DEVICE uint64_t along_rows(const void* first) {
    return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 |
           (shared_address(first) >> 4 & 0x3fff);
}
// ... or 16 rows, of which it takes all columns: boxes of columns lie `box_bytes` apart.
FNAC_DEVICE uint64_t across_rows(const void* first, int box_bytes) {
    return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | static_cast<uint64_t>(box_bytes >> 4) << 16 |
           (shared_address(first) >> 4 & 0x3fff);
}

// Products are asynchronous: products_begin() before the first of a batch, products_end() behind the last,
// and products_wait<n>() until all but the last n batches are done.
FNAC_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FNAC_DEVICE void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
FNAC_DEVICE void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define FNAC_R0 "%0, %1, %2, %3, %4, %5, %6, %7, "
#define FNAC_R1 "%8, %9, %10, %11, %12, %13, %14, %15, "
#define FNAC_R2 "%16, %17, %18, %19, %20, %21, %22, %23, "
#define FNAC_R3 "%24, %25, %26, %27, %28, %29, %30, %31, "
#define FNAC_R4 "%32, %33, %34, %35, %36, %37, %38, %39, "
#define FNAC_R5 "%40, %41, %42, %43, %44, %45, %46, %47, "
#define FNAC_R6 "%48, %49, %50, %51, %52, %53, %54, %55, "
#define FNAC_R7 "%56, %57, %58, %59, %60, %61, %62, %63, "
#define FNAC_R8 "%64, %65, %66, %67, %68, %69, %70, %71, "
#define FNAC_R9 "%72, %73, %74, %75, %76, %77, %78, %79, "
#define FNAC_R10 "%80, %81, %82, %83, %84, %85, %86, %87, "
#define FNAC_R11 "%88, %89, %90, %91, %92, %93, %94, %95, "
#define FNAC_R12 "%96, %97, %98, %99"
#define FNAC_R12_MORE ", %100, %101, %102, %103, "
#define FNAC_R13 "%104, %105, %106, %107, %108, %109, %110, %111, "
#define FNAC_R14 "%112, %113, %114, %115, %116, %117, %118, %119, "
#define FNAC_R15 "%120, %121, %122, %123"
#define FNAC_R15_MORE ", %124, %125, %126, %127"
#define FNAC_R_100 \
    FNAC_R0 FNAC_R1 FNAC_R2 FNAC_R3 FNAC_R4 FNAC_R5 FNAC_R6 FNAC_R7 FNAC_R8 FNAC_R9 FNAC_R10 FNAC_R11 FNAC_R12
#define FNAC_R_124 FNAC_R_100 FNAC_R12_MORE FNAC_R13 FNAC_R14 FNAC_R15
#define FNAC_R_128 FNAC_R_124 FNAC_R15_MORE
#define FNAC_D4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define FNAC_D20(i) FNAC_D4(i), FNAC_D4((i) + 4), FNAC_D4((i) + 8), FNAC_D4((i) + 12), FNAC_D4((i) + 16)
#define FNAC_D100 FNAC_D20(0), FNAC_D20(20), FNAC_D20(40), FNAC_D20(60), FNAC_D20(80)
#define FNAC_D124 FNAC_D100, FNAC_D20(100), FNAC_D4(120)
#define FNAC_D128 FNAC_D124, FNAC_D4(124)

// d (+)= a b, of 64 rows of a (sounds) and the columns of d; both operands along rows. Lane l of warp w of
// the warpgroup holds of d the rows 16 w + l / 4 (elements 4 j, 4 j + 1) and that + 8 (4 j + 2, 4 j + 3), of
// each eight columns the two from 2 (l % 4) on.
#define FNAC_PRODUCT(type, name, columns, count, left, right, keeps)                       \
    FNAC_DEVICE void product(type, float (&d)[count], uint64_t a, uint64_t b, bool keep) { \
        asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, " keeps                       \
                     ", 0;\n"                                                              \
                     "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." name "." name  \
                     " {" FNAC_R_##count "}, " left ", " right ", keep, 1, 1, 0, 0;\n}"    \
                     : FNAC_D##count                                                       \
                     : "l"(a), "l"(b), "r"(static_cast<int>(keep)));                       \
    }
// clang-format off
FNAC_PRODUCT(BFloat16, "bf16", "256", 128, "%128", "%129", "%130")
FNAC_PRODUCT(BFloat16, "bf16", "248", 124, "%124", "%125", "%126")
FNAC_PRODUCT(BFloat16, "bf16", "200", 100, "%100", "%101", "%102")
FNAC_PRODUCT(Float16, "f16", "256", 128, "%128", "%129", "%130")
FNAC_PRODUCT(Float16, "f16", "248", 124, "%124", "%125", "%126")
FNAC_PRODUCT(Float16, "f16", "200", 100, "%100", "%101", "%102")

// d (+)= a b, of a in registers: lane l of warp w holds, two elements to a word, of its rows as above the columns
// 2 (l % 4).. (words 0 and 1) and 8 + 2 (l % 4).. (words 2 and 3); b across rows.
FNAC_DEVICE void product(float (&d)[128], const uint32_t (&a)[4], uint64_t b, bool keep) {
    asm volatile(
        "{\n.reg .pred keep;\nsetp.ne.b32 keep, %133, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" FNAC_R_128
        "}, {%128, %129, %130, %131}, %132, keep, 1, 1, 1;\n}"
        : FNAC_D128
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(keep)));
}

// All bits of the halves that are equal. Halves are numbers below 2048, whose bits compare as those of float16 do, or
// kNoCell, which equals nothing.
constexpr uint32_t kNoCell = 0x7fff;
FNAC_DEVICE uint32_t equal_halves(uint32_t x, uint32_t y) {
    uint32_t mask;
    asm("set.eq.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(x), "r"(y));
    return mask;
}

FNAC_DEVICE float nan_maximum(float x, float y) {
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(y));
    return larger;
}

}  // namespace fnac::cuda

#endif  // FNAC_CUDA_EMULATION
