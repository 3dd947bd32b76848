// AMX: the AVX-512 kernels with max-pooled logits on bfloat16 tile products. Entered only where the processor
// has AMX and the operating system grants its use.
#include "cpu/amx_tiles.h"
#include "cpu/bfloat16_impl.h"

namespace fnac {
namespace {

// A panel is as large as the tiles of 32 cells, and both are more than L1 holds: cells are read past it, so
// that the panel, which all cells need, stays.
class AmxProducts : public BFloat16Values {
  public:
    static constexpr int64_t kTileRows = tiles::kRows;

    static void multiply(const uint16_t* cells, const uint16_t* panel, int64_t depth, int64_t rows,
                         float* out) {
        for (int64_t row = 0; row < rows; row += 2 * kTileRows)
            multiply_two(cells + row * depth * kTileDepth, panel, depth, rows - row, out + row * kWidth);
    }

  private:
    static constexpr int64_t kTileSize = kTileRows * kTileDepth, kWidth = 2 * V::kLanes;
    tiles::Configured tiles_;

    // Of two rows of tiles, or one where there are no more cells.
    static void multiply_two(const uint16_t* cells, const uint16_t* panel, int64_t depth, int64_t rows,
                             float* out) {
        constexpr int64_t kOutBytes = kWidth * sizeof(float);
        tiles::zero<0>();
        tiles::zero<1>();
        if (rows <= kTileRows) {
            for (int64_t k = 0; k < depth; ++k) {
                tiles::stream<4>(cells + k * kTileSize, tiles::kRowBytes);
                tiles::load<6>(panel + k * 2 * kTileSize, tiles::kRowBytes);
                tiles::load<7>(panel + (k * 2 + 1) * kTileSize, tiles::kRowBytes);
                tiles::add_product<0, 4, 6>();
                tiles::add_product<1, 4, 7>();
            }
        } else {
            tiles::zero<2>();
            tiles::zero<3>();
            const uint16_t* below = cells + depth * kTileSize;
            for (int64_t k = 0; k < depth; ++k) {
                tiles::stream<4>(cells + k * kTileSize, tiles::kRowBytes);
                tiles::load<6>(panel + k * 2 * kTileSize, tiles::kRowBytes);
                tiles::load<7>(panel + (k * 2 + 1) * kTileSize, tiles::kRowBytes);
                tiles::add_product<0, 4, 6>();
                tiles::stream<5>(below + k * kTileSize, tiles::kRowBytes);
                tiles::add_product<1, 4, 7>();
                tiles::add_product<2, 5, 6>();
                tiles::add_product<3, 5, 7>();
            }
            tiles::store<2>(out + kTileRows * kWidth, kOutBytes);
            tiles::store<3>(out + kTileRows * kWidth + V::kLanes, kOutBytes);
        }
        tiles::store<0>(out, kOutBytes);
        tiles::store<1>(out + V::kLanes, kOutBytes);
    }
};

}  // namespace

const Kernels& amx_kernels() {
    static const Kernels table = screened<Avx512, AmxProducts, avx512_kernels>("amx");
    return table;
}

}  // namespace fnac
