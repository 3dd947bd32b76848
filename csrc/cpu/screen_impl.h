// Max-pooled logits through bfloat16 products, for translation units with AVX-512 and AVX512_BF16: over a
// type Products, whose objects hold what a thread needs for them (AMX's tiles) and whose
//
//     static void multiply(const uint16_t* cells, const uint16_t* panel, int64_t depth, bool pair, float*
//     out)
//
// gives out[32 cells][32 sounds] (16 cells where `pair` is false) from row tiles [c / 32][16 cells][32], the
// second tile row after the first, and a panel [c / 32][2][16 pairs of channels][16 sounds][2].
//
// Float32-exact by screening and refining. Let x be a cell, a a sound, x^ and a^ their bfloat16 roundings,
// dx = x - x^, da = a - a^. The products give S~, and with S = <x, a>
//
//     |S~ - S| <= eps = |dx||a| + |x^||da| + g |x^||a^|,     g = (C + 16) 2^-23.
//
// The first two terms are <x, a> - <x^, a^> = <dx, a> + <x^, da> by Cauchy-Schwarz, with the residuals that
// the rounding really left. The third covers the float32 accumulation: a bfloat16 product is exact in
// float32, each of at most C additions rounds by 2^-24 of the partial sum, which sum |x^_i a^_i| <= |x^||a^|
// bounds; twice that leaves room for the rounding of eps, of the norms and of the comparison. If p wins in
// exact arithmetic and q on the screen, S~(p) >= S(p) - eps >= S(q) - eps >= S~(q) - 2 eps: so among the
// cells within 2 eps of the screen's maximum is every exact winner. Those are multiplied again in float32, in
// order of cells, and the first largest wins. Denormals may be flushed to zero: with norms in [2^-40, 2^60]
// (or 0) what that loses is below 2^-40 of the third term; anything else, NaN and infinity included, goes to
// the AVX-512 kernel, as do images whose candidates are so many that the whole product is cheaper (constant
// maps).
#pragma once

#include "cpu/avx512.h"
#include "cpu/kernels_impl.h"

namespace fnac {
namespace {

using V = Avx512;

constexpr int64_t kTileRows = 16, kTileDepth = 32, kTileSize = kTileRows * kTileDepth;  // of bfloat16
constexpr int64_t kWidth = 32;              // sounds of a panel: two tiles
constexpr int64_t kCellBytes = 832 * 1024;  // float32 cells of a group: they stay in L2 while panels pass by
constexpr int64_t kPanelsPerTask = 64;
constexpr float kSmallest = 0x1p-40f, kLargest = 0x1p60f;

// Bounds of a vector or of the largest of several: its norm, and that of what rounding to bfloat16 took.
struct Norms {
    float whole, residual;
};

bool in_range(float norm) { return norm == 0 || (norm >= kSmallest && norm <= kLargest); }  // false for NaN

// What is summed up over a vector while it is rounded.
struct Sums {
    __m512 squares = V::set(0.f), residuals = V::set(0.f);
    __m512i bits = _mm512_setzero_si512();  // of all values

    Norms norms() const {
        const float whole = std::sqrt(V::sum(squares));
        // Squares underflow: a vector that is not 0 must not pass for it.
        const bool zero = (_mm512_reduce_or_epi32(bits) & 0x7fffffff) == 0;
        return {whole == 0 && !zero ? kSmallest / 2 : whole, std::sqrt(V::sum(residuals))};
    }
};

// Rounds the 32 (or fewer: 0 beyond) values at `from`.
inline __m512bh round_32(const float* from, int64_t count, Sums& sums) {
    const __m512 low = V::load_n(from, count),
                 high = count > 16 ? V::load_n(from + 16, count - 16) : V::set(0.f);
    const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
    const auto widen = [](__m256i half) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    };
    const __m512i halves = reinterpret_cast<const __m512i&>(rounded);
    const __m512 lost_low = low - widen(_mm512_castsi512_si256(halves));
    const __m512 lost_high = high - widen(_mm512_extracti64x4_epi64(halves, 1));
    sums.squares = V::fma(low, low, V::fma(high, high, sums.squares));
    sums.residuals = V::fma(lost_low, lost_low, V::fma(lost_high, lost_high, sums.residuals));
    sums.bits = _mm512_or_si512(sums.bits, _mm512_castps_si512(_mm512_or_ps(low, high)));
    return rounded;
}

// A row of c floats into row `row` of tiles [c / 32][16][32].
inline Norms pack_row(const float* from, int64_t c, uint16_t* tiles, int64_t row) {
    Sums sums;
    for (int64_t k = 0; k < c; k += kTileDepth) {
        const __m512bh rounded = round_32(from + k, c - k, sums);
        _mm512_store_si512(tiles + k * kTileRows + row * kTileDepth,
                           reinterpret_cast<const __m512i&>(rounded));
    }
    return sums.norms();
}

// The sounds in panels [m / 32][c / 32][2][16 pairs of channels][16 sounds][2], and their norms.
struct Sounds {
    int64_t m, c, depth;  // depth: tiles over the channels
    const float* rows;
    Scratch tiles, norms, residuals;

    explicit Sounds(const MaxLogits& job)
        : m(job.m),
          c(job.img.c),
          depth(ceil_div(c, kTileDepth)),
          rows(job.aud),
          tiles(sizeof(uint16_t) * panels() * panel_size()),
          norms(sizeof(float) * panels() * kWidth),
          residuals(sizeof(float) * panels() * kWidth) {
        parallel_for(job.threads, 2 * panels(), [&](int64_t half, int) { pack_half(half); });
    }
    int64_t panels() const { return ceil_div(m, kWidth); }
    int64_t panel_size() const { return depth * 2 * kTileSize; }
    const uint16_t* panel(int64_t i) const { return tiles.as<uint16_t>() + i * panel_size(); }

    void pack_half(int64_t half) {
        const int64_t first = half * V::kLanes;
        uint16_t* to = tiles.as<uint16_t>() + half / 2 * panel_size() + half % 2 * kTileSize;
        Sums sums[V::kLanes];
        for (int64_t k = 0; k < depth; ++k) {
            V::F pairs[V::kLanes];
            for (int64_t i = 0; i < V::kLanes; ++i) {
                pairs[i] = V::set(0.f);
                if (first + i >= m) continue;
                const __m512bh rounded =
                    round_32(rows + (first + i) * c + k * kTileDepth, c - k * kTileDepth, sums[i]);
                pairs[i] = reinterpret_cast<const __m512&>(rounded);
            }
            V::transpose(pairs);
            for (int64_t i = 0; i < V::kLanes; ++i)
                V::store(reinterpret_cast<float*>(to + k * 2 * kTileSize) + i * V::kLanes, pairs[i]);
        }
        for (int64_t i = 0; i < V::kLanes; ++i) {
            const Norms found = sums[i].norms();
            norms.as<float>()[first + i] = found.whole;
            residuals.as<float>()[first + i] = found.residual;
        }
    }
    bool all_in_range() const {
        for (int64_t i = 0; i < m; ++i)
            if (!in_range(norms.as<float>()[i])) return false;
        return true;
    }
};

// <x[r], y> of four vectors, whose values do not depend on which r is whose: equal vectors give equal values.
inline __m128 dots(const float* const (&x)[4], const float* y, int64_t c) {
    __m512 even[4], odd[4];
    for (int r = 0; r < 4; ++r) even[r] = odd[r] = V::set(0.f);
    int64_t k = 0;
    for (; k + 32 <= c; k += 32) {
        const __m512 low = V::load(y + k), high = V::load(y + k + 16);
        for (int r = 0; r < 4; ++r) {
            even[r] = V::fma(V::load(x[r] + k), low, even[r]);
            odd[r] = V::fma(V::load(x[r] + k + 16), high, odd[r]);
        }
    }
    for (; k < c; k += 16)
        for (int r = 0; r < 4; ++r)
            even[r] = V::fma(V::load_n(x[r] + k, c - k), V::load_n(y + k, c - k), even[r]);
    // Folded together: after two steps each quarter holds a sum of all four.
    __m512 sums[4];
    for (int r = 0; r < 4; ++r) sums[r] = even[r] + odd[r];
    const __m512 front = _mm512_unpacklo_ps(sums[0], sums[1]) + _mm512_unpackhi_ps(sums[0], sums[1]);
    const __m512 back = _mm512_unpacklo_ps(sums[2], sums[3]) + _mm512_unpackhi_ps(sums[2], sums[3]);
    const __m512 all = V::unpack_low(front, back) + V::unpack_high(front, back);
    const __m256 half = _mm512_castps512_ps256(all) + _mm512_extractf32x8_ps(all, 1);
    return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
}

// A cell that may win: cell `cell` of those of image `image` of the group.
struct Candidate {
    uint16_t image, cell;
};

// One task's cells: whole images, or a piece of one that is too large.
struct Cells {
    int64_t image, images, begin, count;  // count cells from cell `begin` of each image
};

template <class Products>
class Worker {
  public:
    Worker(const MaxLogits& job, const Sounds& sounds, std::byte* memory, uint8_t* dense)
        : job_(job), img_(job.img), sounds_(sounds), dense_(dense) {
        const int64_t cells = capacity(img_) + kTileRows, c = img_.c;
        tiles_ = take<uint16_t>(memory, cells * sounds.depth * kTileDepth);
        products_ = take<float>(memory, (cells + kTileRows) * kWidth);
        highest_ = take<float>(memory, kPanelsPerTask * kWidth);
        candidates_ = take<Candidate>(memory, kWidth * (cells + kSpare));
        stride_ = cells + kSpare;
        rows_ = take<float>(memory, cells * padded(c));
    }
    // Cells that a group may have.
    static int64_t capacity(const FeatureMap& img) {
        const int64_t fit = kCellBytes / static_cast<int64_t>(sizeof(float)) / img.c / kTileRows * kTileRows;
        const int64_t all = ceil_div(img.n * img.p, kTileRows) * kTileRows;
        return smaller(all, fit < 4 * kTileRows ? 4 * kTileRows : fit > 1024 ? 1024 : fit);
    }
    static size_t bytes(const FeatureMap& img, const Sounds& sounds) {
        const int64_t cells = capacity(img) + kTileRows;
        return sizeof(uint16_t) * cells * sounds.depth * kTileDepth +
               sizeof(float) *
                   ((cells + kTileRows) * kWidth + kPanelsPerTask * kWidth + cells * padded(img.c)) +
               sizeof(Candidate) * kWidth * (cells + kSpare) + 5 * 64;
    }

    // Packs the cells, once for all panels.
    void pack(const Cells& cells) {
        cells_ = cells;
        for (int64_t i = 0; i < cells.images; ++i) pack_image(i);
    }
    void panel(int64_t index, int64_t first_panel) {
        bool wanted = false;
        for (int64_t i = 0; i < cells_.images; ++i) wanted |= !is_dense(i);
        if (!wanted) return;
        const int64_t tiles = ceil_div(cells_.images * cells_.count, kTileRows), depth = sounds_.depth;
        for (int64_t t = 0; t < tiles; t += 2)
            Products::multiply(tiles_ + t * depth * kTileSize, sounds_.panel(index), depth, t + 1 < tiles,
                               products_ + t * kTileRows * kWidth);
        std::memset(found_, 0, sizeof(found_));
        for (int64_t i = 0; i < cells_.images; ++i) {
            if (is_dense(i)) continue;
            if (job_.bf16_products)
                keep_largest(i, index);
            else
                screen(i, index, highest_ + (index - first_panel) * kWidth);
        }
        for (int64_t lane = 0; lane < kWidth; ++lane) refine(lane, index * kWidth + lane);
    }

  private:
    static constexpr int64_t kSpare = 1;  // what is written of a candidate that is none

    const MaxLogits& job_;
    const FeatureMap& img_;
    const Sounds& sounds_;
    uint8_t* dense_;         // by image: left to the AVX-512 kernel
    uint16_t* tiles_;        // [cells / 16][c / 32][16][32]
    float* products_;        // [cells][32]
    float* highest_;         // the screen's maximum so far, where an image comes in pieces
    float* rows_;            // [cells][c], where the image itself has no such rows
    Candidate* candidates_;  // [32 sounds][stride_]: cells of the group to multiply again, in order
    int64_t stride_;
    int64_t found_[kWidth];  // how many there are of each sound
    Cells cells_{};
    Norms norms_[1024];  // by image of the group

    template <class T>
    static T* take(std::byte*& memory, int64_t count) {
        T* taken = reinterpret_cast<T*>(memory);
        memory += (count * sizeof(T) + 63) / 64 * 64;
        return taken;
    }
    bool is_dense(int64_t i) const { return __atomic_load_n(&dense_[cells_.image + i], __ATOMIC_RELAXED); }
    void make_dense(int64_t i) { __atomic_store_n(&dense_[cells_.image + i], uint8_t{1}, __ATOMIC_RELAXED); }
    // Whole vectors, because that is what a transposition writes, and one more, because rows a power of two
    // apart would share few sets of the first cache.
    static int64_t padded(int64_t c) { return (ceil_div(c, V::kLanes) + 1) * V::kLanes; }
    int64_t row_stride() const { return rows_in_place() ? img_.c : padded(img_.c); }
    bool rows_in_place() const { return img_.dtype == Dtype::kFloat32 && img_.stride_c == 1; }
    const float* rows_of(int64_t i) const {
        if (!rows_in_place()) return rows_ + i * cells_.count * row_stride();
        return static_cast<const float*>(img_.data) + (cells_.image + i) * img_.image_size() +
               cells_.begin * img_.c;
    }

    void pack_image(int64_t i) {
        const int64_t c = img_.c, count = cells_.count, stride = row_stride();
        if (!rows_in_place()) {
            with_dtype(img_.dtype, [&]<class T>(T) {
                const T* from = static_cast<const T*>(img_.data) + (cells_.image + i) * img_.image_size() +
                                cells_.begin * img_.stride_p;
                float* to = rows_ + i * count * stride;
                if (img_.stride_c == 1)
                    for (int64_t p = 0; p < count; ++p)
                        for (int64_t k = 0; k < c; k += V::kLanes)
                            V::store_n(to + p * stride + k, V::load_n(from + p * img_.stride_p + k, c - k),
                                       c - k);
                else
                    transpose<V>(from, img_.stride_c, c, count, to, stride);
            });
        }
        const float* rows = rows_of(i);
        Norms largest{0, 0};
        bool usable = true;
        for (int64_t p = 0; p < count; ++p) {
            const int64_t at = i * count + p;
            const Norms norms = pack_row(rows + p * stride, c,
                                         tiles_ + at / kTileRows * sounds_.depth * kTileSize, at % kTileRows);
            usable &= in_range(norms.whole);
            largest.whole = norms.whole > largest.whole ? norms.whole : largest.whole;
            largest.residual = norms.residual > largest.residual ? norms.residual : largest.residual;
        }
        if (!usable) make_dense(i);
        norms_[i] = largest;
    }

    // Largest product and its first cell, from this piece's products.
    void keep_largest(int64_t i, int64_t panel) {
        const float* products = products_ + i * cells_.count * kWidth;
        const int64_t row = (cells_.image + i) * sounds_.m;
        for (int64_t half = 0; half < kWidth; half += V::kLanes) {
            const int64_t m0 = panel * kWidth + half, columns = smaller(V::kLanes, sounds_.m - m0);
            if (columns <= 0) return;
            const __mmask16 lanes = V::first(columns);
            __m512 best =
                cells_.begin ? V::load_n(job_.logits + row + m0, columns) : V::load(products + half);
            __m512i index =
                cells_.begin ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, job_.argmax + row + m0))
                             : _mm512_setzero_si512();
            for (int64_t p = 0; p < cells_.count; ++p) {
                const __m512 value = V::load(products + p * kWidth + half);
                const __mmask16 win = _mm512_cmp_ps_mask(value, best, _CMP_GT_OQ);
                best = _mm512_mask_mov_ps(best, win, value);
                index =
                    _mm512_mask_mov_epi32(index, win, _mm512_set1_epi32(static_cast<int>(cells_.begin + p)));
            }
            V::store_n(job_.logits + row + m0, best, columns);
            _mm256_mask_storeu_epi16(job_.argmax + row + m0, lanes, _mm512_cvtepi32_epi16(index));
        }
    }

    // Notes which cells of an image may win: those within 2 eps of the screen's maximum.
    void screen(int64_t i, int64_t panel, float* highest) {
        const float* products = products_ + i * cells_.count * kWidth;
        const int64_t row = (cells_.image + i) * sounds_.m;
        const float gamma = static_cast<float>(img_.c + 16) * 0x1p-23f;
        // The rounded vector's norm is at most the sum of both.
        const float whole = norms_[i].whole + norms_[i].residual;
        int64_t before[kWidth], budget = cells_.count * kWidth / 4 + kWidth;
        std::memcpy(before, found_, sizeof(before));
        for (int64_t half = 0; half < kWidth; half += V::kLanes) {
            const int64_t m0 = panel * kWidth + half, columns = smaller(V::kLanes, sounds_.m - m0);
            if (columns <= 0) return;
            if (cells_.begin == 0)
                V::store_n(job_.logits + row + m0, V::set(-std::numeric_limits<float>::infinity()), columns);
            const __mmask16 lanes = V::first(columns);
            __m512 top = V::load(cells_.begin ? highest + half : products + half);
            for (int64_t p = 0; p < cells_.count; ++p)
                top = V::max(top, V::load(products + p * kWidth + half));
            V::store(highest + half, top);
            const __m512 sound = V::load(sounds_.norms.as<float>() + m0),
                         lost = V::load(sounds_.residuals.as<float>() + m0);
            const __m512 eps =
                V::fma(V::set(norms_[i].residual + gamma * whole), sound + lost, V::set(whole) * lost);
            const __m512 floor = top - V::set(2.f) * eps;
            for (int64_t p = 0; p < cells_.count; p += 64)
                budget -= note(i, p, products + half, floor, lanes, half);
        }
        if (budget >= 0) return;
        std::memcpy(found_, before, sizeof(before));
        make_dense(i);
    }

    // Notes which of up to 64 cells from `first` on reach the floor, and counts them. What varies from pair
    // to pair is not branched on as far as the second candidate of a sound.
    int64_t note(int64_t i, int64_t first, const float* products, __m512 floor, __mmask16 lanes,
                 int64_t half) {
        uint32_t wins[2][V::kLanes];  // by sound, a bit for each cell
        for (int64_t h = 0; h < 2; ++h) {
            __m512i bits = _mm512_setzero_si512(), bit = _mm512_set1_epi32(1);
            const int64_t begin = first + 32 * h, end = smaller(begin + 32, cells_.count);
            for (int64_t p = begin; p < end; ++p, bit = _mm512_add_epi32(bit, bit))
                bits = _mm512_mask_or_epi32(
                    bits, _mm512_mask_cmp_ps_mask(lanes, V::load(products + p * kWidth), floor, _CMP_GE_OQ),
                    bits, bit);
            _mm512_storeu_si512(wins[h], bits);
        }
        int64_t count = 0;
        for (int64_t lane = 0; lane < V::kLanes; ++lane) {
            uint64_t left = wins[0][lane] | static_cast<uint64_t>(wins[1][lane]) << 32;
            count += std::popcount(left);
            Candidate* const to = candidates_ + (half + lane) * stride_;
            int64_t& found = found_[half + lane];
            const auto take_one = [&] {
                to[found] = {static_cast<uint16_t>(i), static_cast<uint16_t>(first + std::countr_zero(left))};
                found += left != 0;
                left &= left - 1;
            };
            take_one();
            take_one();
            while (left) take_one();
        }
        return count;
    }

    // Multiplies a sound's candidates in float32, four at a time while the sound is in L1; the last again
    // where there are not four left.
    void refine(int64_t lane, int64_t m) {
        const Candidate* candidates = candidates_ + lane * stride_;
        const float* sound = sounds_.rows + m * img_.c;
        for (int64_t j = 0, found = found_[lane]; j < found; j += 4) {
            Candidate some[4];
            const float* rows[4];
            for (int r = 0; r < 4; ++r) {
                some[r] = candidates[smaller(j + r, found - 1)];
                rows[r] = rows_of(some[r].image) + some[r].cell * row_stride();
            }
            float values[4];
            _mm_storeu_ps(values, dots(rows, sound, img_.c));
            for (int r = 0; r < 4; ++r) keep(some[r], m, values[r]);
        }
    }

    void keep(Candidate candidate, int64_t m, float value) {
        const int64_t at = (cells_.image + candidate.image) * sounds_.m + m;
        float& best = job_.logits[at];
        uint16_t& index = job_.argmax[at];
        const auto cell = static_cast<uint16_t>(cells_.begin + candidate.cell);
        // Without a branch, which could not be predicted.
        const auto wins = static_cast<uint16_t>(-static_cast<int>(value > best));
        index = static_cast<uint16_t>((cell & wins) | (index & ~wins));
        best = value > best ? value : best;
    }
};

void scale_rows(const MaxLogits& job) {
    parallel_for(job.threads, job.img.n, [&](int64_t n, int) {
        for (int64_t i = 0; i < job.m; i += V::kLanes) {
            float* at = job.logits + n * job.m + i;
            V::store_n(at, V::load_n(at, job.m - i) * V::set(job.scale), job.m - i);
        }
    });
}

// Runs of images that are left to the AVX-512 kernel.
void do_dense(const MaxLogits& job, const uint8_t* dense) {
    for (int64_t n = 0, end; n < job.img.n; n = end) {
        for (end = n; end < job.img.n && dense[end] == dense[n];) ++end;
        if (!dense[n]) continue;
        MaxLogits part = job;
        const int64_t size = job.img.dtype == Dtype::kFloat32 ? 4 : 2;
        part.img.data = static_cast<const std::byte*>(job.img.data) + n * job.img.image_size() * size;
        part.img.n = end - n;
        part.logits += n * job.m;
        part.argmax += n * job.m;
        avx512_kernels().max_logits(part);
    }
}

template <class Products>
void max_logits_screened(const MaxLogits& job) {
    const FeatureMap& img = job.img;
    if (img.p == 1 && !job.bf16_products) return avx512_kernels().max_logits(job);  // nothing to screen
    const Sounds sounds(job);
    if (!sounds.all_in_range()) return avx512_kernels().max_logits(job);
    const int64_t capacity = Worker<Products>::capacity(img),
                  limit = capacity / img.p > 1024 ? 1024 : capacity / img.p;
    const int64_t group = limit < 1 ? 1 : smaller(limit, ceil_div(img.n, job.threads));
    const int64_t pieces = ceil_div(img.p, capacity), groups = ceil_div(img.n, group);
    // Few images and many sounds: the panels are shared out too.
    const int64_t share = ceil_div(sounds.panels(), ceil_div(2 * job.threads, groups));
    const int64_t panels = smaller(smaller(kPanelsPerTask, sounds.panels()), share);
    const int64_t blocks = ceil_div(sounds.panels(), panels);
    const size_t bytes = (Worker<Products>::bytes(img, sounds) + 4095) / 4096 * 4096;
    const Scratch memory(bytes * job.threads), dense(img.n);
    std::memset(dense.as<void>(), 0, img.n);

    parallel_for(job.threads, groups * blocks, [&](int64_t task, int worker) {
        [[maybe_unused]] const Products products;
        Worker<Products> work(job, sounds, memory.as<std::byte>() + worker * bytes, dense.as<uint8_t>());
        const int64_t image = task / blocks * group, first = task % blocks * panels;
        const int64_t last = smaller(first + panels, sounds.panels());
        for (int64_t q = 0; q < pieces; ++q) {
            const int64_t begin = q * img.p / pieces, end = (q + 1) * img.p / pieces;
            work.pack({image, smaller(group, img.n - image), begin, end - begin});
            for (int64_t i = first; i < last; ++i) work.panel(i, first);
        }
    });
    scale_rows(job);
    do_dense(job, dense.as<uint8_t>());
}

}  // namespace
}  // namespace fnac
