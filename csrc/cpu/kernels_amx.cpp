// AMX: the AVX-512 kernels with max-pooled logits on bfloat16 tile products. Entered only where the processor
// has AMX and the operating system grants its use.
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu/screen_impl.h"

namespace fnac {
namespace {

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// The thread's tiles, for as long as the object lives. Inline assembly, because the intrinsics of GCC 12
// declare only 8 bytes of the configuration as read.
class AmxProducts {
  public:
    AmxProducts() {
        TileConfig config;
        for (int tile = 0; tile < 8; ++tile) {
            config.row_bytes[tile] = 64;
            config.rows[tile] = kTileRows;
        }
        asm volatile("ldtilecfg %0" : : "m"(config));
    }
    ~AmxProducts() { asm volatile("tilerelease"); }
    AmxProducts(const AmxProducts&) = delete;
    AmxProducts& operator=(const AmxProducts&) = delete;

    static void multiply(const uint16_t* cells, const uint16_t* panel, int64_t depth, bool pair, float* out) {
        constexpr int64_t kRowBytes = 64, kOutBytes = kWidth * sizeof(float);
        asm volatile("" ::: "memory");  // the tile loads do not say that they read memory
        _tile_zero(0);
        _tile_zero(1);
        if (!pair) {
            for (int64_t k = 0; k < depth; ++k) {
                _tile_loadd(4, cells + k * kTileSize, kRowBytes);
                _tile_loadd(6, panel + k * 2 * kTileSize, kRowBytes);
                _tile_loadd(7, panel + (k * 2 + 1) * kTileSize, kRowBytes);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
            }
        } else {
            _tile_zero(2);
            _tile_zero(3);
            const uint16_t* below = cells + depth * kTileSize;
            for (int64_t k = 0; k < depth; ++k) {
                _tile_loadd(4, cells + k * kTileSize, kRowBytes);
                _tile_loadd(6, panel + k * 2 * kTileSize, kRowBytes);
                _tile_loadd(7, panel + (k * 2 + 1) * kTileSize, kRowBytes);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(5, below + k * kTileSize, kRowBytes);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(2, out + kTileRows * kWidth, kOutBytes);
            _tile_stored(3, out + kTileRows * kWidth + V::kLanes, kOutBytes);
        }
        _tile_stored(0, out, kOutBytes);
        _tile_stored(1, out + V::kLanes, kOutBytes);
    }
};

}  // namespace

bool amx_usable() {
    __builtin_cpu_init();
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM)
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           __builtin_cpu_supports("avx512bf16") &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const Kernels& amx_kernels() {
    static const Kernels table = [] {
        Kernels kernels = avx512_kernels();
        kernels.name = "amx";
        kernels.max_logits = max_logits_screened<AmxProducts>;
        return kernels;
    }();
    return table;
}

}  // namespace fnac
