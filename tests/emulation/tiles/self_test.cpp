// Tiles that a thread has in use come back, shapes and contents, when the kernels' are done; a thread without
// any has none afterwards. Built on the real instructions it needs AMX (exit status 77 without).
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/amx_tiles.h"

namespace {

using namespace fnac::tiles;

void check(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
}

bool same(const Configuration& a, const Configuration& b) { return std::memcmp(&a, &b, sizeof(a)) == 0; }

void overwrite_all() {
    std::byte ones[kRows * kRowBytes];
    std::memset(ones, 0x3f, sizeof(ones));
    load<0>(ones, kRowBytes);
    load<2>(ones, kRowBytes);
    load<7>(ones, kRowBytes);
}

}  // namespace

int main() {
    if (!usable()) return 77;
    check(configuration().palette == 0, "a thread starts with tiles");
    {
        const Configured tiles;
        check(configuration().palette == 1 && configuration().rows[7] == kRows, "no tiles were configured");
        overwrite_all();
    }
    check(configuration().palette == 0, "tiles are left behind");

    Configuration callers{1};
    callers.rows[0] = 16, callers.row_bytes[0] = 64;
    callers.rows[2] = 3, callers.row_bytes[2] = 20;
    configure(callers);
    std::byte whole[16][64], part[3][20], got[16][64];
    std::memset(whole, 17, sizeof(whole));
    std::memset(part, 42, sizeof(part));
    load<0>(whole, 64);
    load<2>(part, 20);
    {
        const Configured tiles;
        overwrite_all();
    }
    check(same(configuration(), callers), "the caller's configuration is lost");
    store<0>(got, 64);
    check(std::memcmp(got, whole, sizeof(whole)) == 0, "the contents of a whole tile are lost");
    store<2>(got, 20);
    check(std::memcmp(got, part, sizeof(part)) == 0, "the contents of a part of a tile are lost");
    release();
}
