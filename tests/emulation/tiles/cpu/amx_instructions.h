// The instructions of csrc/cpu/amx_instructions.h in plain code: the AMX kernels run on any machine with
// AVX512_BF16, and sanitizers see what tiles read and write. Like the processor it refuses tiles that the
// thread has not configured, and nothing is left of them once they are released.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fnac::tiles {
namespace {

constexpr int kTiles = 8;

struct alignas(64) Configuration {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

inline bool usable() { return true; }

struct Tile {
    alignas(64) std::byte rows[16][64];
};

struct Thread {
    Configuration all;
    Tile tile[kTiles];
};
inline thread_local Thread of_thread;

inline void fault(const char* why) {
    std::fprintf(stderr, "emulated tiles: %s\n", why);
    std::abort();
}

template <int kTile>
Tile& configured() {
    static_assert(kTile >= 0 && kTile < kTiles);
    const Configuration& all = of_thread.all;
    if (all.palette != 1 || all.rows[kTile] == 0 || all.row_bytes[kTile] == 0)
        fault("one is used that this thread has not configured");
    return of_thread.tile[kTile];
}

inline void configure(const Configuration& all) {
    for (int tile = 0; tile < kTiles; ++tile)
        if (all.palette != 1 || all.rows[tile] > 16 || all.row_bytes[tile] > 64)
            fault("no such configuration");
    of_thread.all = all;
    std::memset(of_thread.tile, 0, sizeof(of_thread.tile));
}

inline Configuration configuration() { return of_thread.all; }

inline void release() {
    of_thread.all = {};
    std::memset(of_thread.tile, 0xff, sizeof(of_thread.tile));  // NaN
}

template <int kTile>
void zero() {
    std::memset(&configured<kTile>(), 0, sizeof(Tile));
}

template <int kTile>
void load(const void* from, int64_t stride) {
    Tile& tile = configured<kTile>();
    std::memset(&tile, 0, sizeof(tile));
    for (int64_t i = 0; i < of_thread.all.rows[kTile]; ++i)
        std::memcpy(tile.rows[i], static_cast<const std::byte*>(from) + i * stride,
                    of_thread.all.row_bytes[kTile]);
}

template <int kTile>
void stream(const void* from, int64_t stride) {
    load<kTile>(from, stride);
}

template <int kTile>
void store(void* to, int64_t stride) {
    const Tile& tile = configured<kTile>();
    for (int64_t i = 0; i < of_thread.all.rows[kTile]; ++i)
        std::memcpy(static_cast<std::byte*>(to) + i * stride, tile.rows[i], of_thread.all.row_bytes[kTile]);
}

// A bfloat16 is the upper half of a float.
inline float widened(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

// Of whole tiles, as the kernels use them.
template <int kSum, int kA, int kB>
void add_product() {
    float sum[16][16];
    uint16_t a[16][32], b[16][32];
    std::memcpy(sum, &configured<kSum>(), sizeof(sum));
    std::memcpy(a, &configured<kA>(), sizeof(a));
    std::memcpy(b, &configured<kB>(), sizeof(b));
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 32; ++k)
            for (int j = 0; j < 16; ++j) sum[i][j] += widened(a[i][k]) * widened(b[k / 2][2 * j + k % 2]);
    std::memcpy(&configured<kSum>(), sum, sizeof(sum));
}

}  // namespace
}  // namespace fnac::tiles
