// Register loops with enough independent accumulators to hide the latency of a multiply-add (4 cycles, 2 a
// cycle). Each is compiled for its instruction set by attribute and entered only where the processor has it.

#include "cpu/peak.h"

#include <atomic>
#include <chrono>
#include <cstdint>

#include "cpu/parallel.h"

#if defined(FNAC_BF16)
#include "cpu/amx_tiles.h"
#endif

namespace fnac {
namespace {

constexpr int kSteps = 1 << 14;
std::atomic<float> sink;  // results go here, so that no loop can be dropped

// Each loop makes kSteps steps on its accumulators and returns the number of operations.
using Loop = double (*)();

using Float4 [[gnu::vector_size(16)]] = float;
using Float8 [[gnu::vector_size(32)]] = float;
using Float16 [[gnu::vector_size(64)]] = float;

template <class Vector>
[[gnu::always_inline]] inline double multiply_adds() {
    constexpr int kChains = 12;
    Vector sums[kChains];
    for (Vector& sum : sums)
        sum = Vector{} + sink.load(std::memory_order_relaxed);  // unknown, so all are kept
    for (int step = 0; step < kSteps; ++step)
        for (Vector& sum : sums) sum = sum * 0.5f + 1.f;  // contracted to one instruction where there is one
    for (Vector& sum : sums) sink.store(sum[0], std::memory_order_relaxed);
    return 2.0 * kSteps * kChains * (sizeof(Vector) / sizeof(float));
}

double fma_portable() { return multiply_adds<Float4>(); }
#if defined(__x86_64__)
[[gnu::target("avx2,fma")]] double fma_avx2() { return multiply_adds<Float8>(); }
[[gnu::target("avx512f")]] double fma_avx512() { return multiply_adds<Float16>(); }
#endif

double run(Loop loop, int threads, int milliseconds) {
    using Clock = std::chrono::steady_clock;
    std::atomic<double> rate{0};
    parallel_for(threads, threads, [&](int64_t, int) {
        const auto start = Clock::now();
        const auto end = start + std::chrono::milliseconds(milliseconds);
        double operations = 0;
        auto now = start;
        for (; now < end; now = Clock::now()) operations += loop();
        rate.fetch_add(operations / std::chrono::duration<double>(now - start).count());
    });
    return rate;
}

#if defined(FNAC_BF16)

double amx_bfloat16() {
    const tiles::Configured configured;
    tiles::zero<4>();
    tiles::zero<5>();
    tiles::zero<6>();
    tiles::zero<7>();
    for (int step = 0; step < kSteps / 16; ++step) {
        tiles::add_product<0, 4, 5>();
        tiles::add_product<1, 4, 5>();
        tiles::add_product<2, 6, 7>();
        tiles::add_product<3, 6, 7>();
    }
    return 2.0 * (kSteps / 16) * 4 * 16 * 16 * 32;
}

#endif

}  // namespace

double peak_fma(int threads, int milliseconds) {
    Loop loop = fma_portable;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) loop = fma_avx2;
    if (__builtin_cpu_supports("avx512f")) loop = fma_avx512;
#endif
    return run(loop, threads, milliseconds);
}

double peak_amx(int threads, int milliseconds) {
#if defined(FNAC_BF16)
    if (tiles::usable()) return run(amx_bfloat16, threads, milliseconds);
#endif
    (void)threads, (void)milliseconds;
    return 0;
}

}  // namespace fnac
