// The instructions of AMX that the kernels use, one function each. Inline assembly, because the intrinsics of
// GCC 12 declare only 8 bytes of a configuration as read, and no memory as read by a load. Tests build the
// kernels against the header of the same name in tests/emulation/tiles, which is plain code.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace fnac::tiles {
namespace {

constexpr int kTiles = 8;

// Palette 0: no tiles, as a thread starts. Palette 1: kTiles of up to 16 rows of 64 bytes.
struct alignas(64) Configuration {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Whether the processor has tiles and the operating system grants this process their use.
inline bool usable() {
    __builtin_cpu_init();
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM)
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Makes all tiles 0.
inline void configure(const Configuration& all) { asm volatile("ldtilecfg %0" : : "m"(all)); }

inline Configuration configuration() {
    Configuration all;
    asm volatile("sttilecfg %0" : "=m"(all));
    return all;
}

inline void release() { asm volatile("tilerelease"); }

template <int kTile>
void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// A tile's rows from memory, where they lie `stride` bytes apart.
template <int kTile>
void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(kTile), "r"(from), "r"(stride) : "memory");
}

// The same, with the hint that L1 need not keep them.
template <int kTile>
void stream(const void* from, int64_t stride) {
    asm volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" : : "i"(kTile), "r"(from), "r"(stride) : "memory");
}

template <int kTile>
void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(kTile), "r"(to), "r"(stride) : "memory");
}

// sum[i][j] += sum over k of a[i][k] b[k / 2][2 j + k % 2]: products of bfloat16 added up in float32.
template <int kSum, int kA, int kB>
void add_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}

}  // namespace
}  // namespace fnac::tiles
