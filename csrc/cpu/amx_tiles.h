// The thread's tiles for as long as they are needed, and the caller's again afterwards.
#pragma once

#include <cstddef>
#include <utility>

#include "cpu/amx_instructions.h"

namespace fnac::tiles {
namespace {

constexpr int64_t kRows = 16, kRowBytes = 64;

// All tiles with kRows rows of kRowBytes, for as long as the object lives. Threads are torch's: if it has
// tiles in use, they are saved and come back with their contents.
class Configured {
  public:
    Configured() : before_(configuration()) {
        if (before_.palette != 0) each([this]<int kTile> { store<kTile>(contents_[kTile], kRowBytes); });
        Configuration all{1};
        for (int tile = 0; tile < kTiles; ++tile) {
            all.row_bytes[tile] = kRowBytes;
            all.rows[tile] = kRows;
        }
        configure(all);
    }
    ~Configured() {
        if (before_.palette == 0) {
            release();
        } else {
            configure(before_);
            each([this]<int kTile> { load<kTile>(contents_[kTile], kRowBytes); });
        }
    }
    Configured(const Configured&) = delete;
    Configured& operator=(const Configured&) = delete;

  private:
    Configuration before_;
    std::byte contents_[kTiles][kRows * kRowBytes];

    // Calls `visit` for every tile that had rows before: the others cannot be touched.
    template <class Visit>
    void each(Visit visit) {
        [&]<int... kTile>(std::integer_sequence<int, kTile...>) {
            ((before_.rows[kTile] > 0 && before_.row_bytes[kTile] > 0 ? visit.template operator()<kTile>()
                                                                      : void()),
             ...);
        }(std::make_integer_sequence<int, kTiles>{});
    }
};

}  // namespace
}  // namespace fnac::tiles
