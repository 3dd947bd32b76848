// Max-pooled logits through products of 16-bit values, float32-exact by screening and refining. Over a traits
// type V and a type Products (Bf16Products, Int16Products, AmxProducts), whose objects hold what a thread
// needs for them (AMX's tiles) and which narrows features to 16 bits and multiplies them:
//
//     static void multiply(const uint16_t* cells, const uint16_t* panel, int64_t depth, int64_t rows,
//                          float* out)
//
// gives out[rows][2 kLanes sounds], and anything in the next rows up to a multiple of kTileRows, from tiles
// [rows / kTileRows][c / 32][kTileRows cells][32] and a panel [c / 32][2][16 pairs of channels][kLanes
// sounds][2].
//
// Let x be a cell, a a sound, x^ and a^ what narrowing makes of them, dx = x - x^, da = a - a^. The products
// give S~, and with S = <x, a>
//
//     |S~ - S| <= eps = |dx||a| + |x^||da| + g |x^||a^|,     g = (C + 16) 2^-23.
//
// The first two terms are <x, a> - <x^, a^> = <dx, a> + <x^, da> by Cauchy-Schwarz, with the residuals that
// the narrowing really left. The third covers the products' own rounding. Of bfloat16 values: a product is
// exact in float32, each of at most C additions rounds by 2^-24 of the partial sum, which sum |x^_i a^_i| <=
// |x^||a^| bounds; twice that leaves room for the rounding of eps, of the norms and of the comparison. Of
// int16 values (int16_impl.h): sums are exact in int32, and making a float32 of one, in units of two scales,
// rounds three times by 2^-24. S~(q) - eps(q) of any cell q bounds the maximum from below, so a cell p with
// S~(p) + eps(p) less than that is no winner. The bounds of a vector are the largest of its image's cells, or
// of the piece's where an image comes in pieces, each of which then has an eps of its own. The cells that may
// win are multiplied again in float32, in order of cells, and the first largest wins. Denormals may be
// flushed to zero: with norms in [2^-40, 2^60] (or 0) what that takes from products, and from the squares of
// residuals, fits in the third term's room; anything else, NaN and infinity included, goes to the float32
// kernel, as do images whose candidates are so many that the whole product is cheaper (constant maps).
#pragma once

#include "cpu/kernels_impl.h"

namespace fnac {
namespace {

constexpr int64_t kTileDepth = 32;                                           // channels
constexpr int64_t kMinCells = 64, kMaxCells = 1024, kMaxImages = kMaxCells;  // of a group
constexpr int64_t kSoundsPerTask = 2048;
constexpr float kSmallest = 0x1p-40f, kLargest = 0x1p60f;

// Bounds of a vector or of the largest of several: its norm, and that of what narrowing took.
struct Norms {
    float whole, residual;
};

bool in_range(float norm) { return norm == 0 || (norm >= kSmallest && norm <= kLargest); }  // false for NaN

// What is summed up over a vector while it is narrowed, two registers of values at a time: each has sums of
// its own, because a sum waits for the one before.
template <class V>
struct Sums {
    using F = typename V::F;
    F squares[2] = {V::set(0.f), V::set(0.f)}, residuals[2] = {V::set(0.f), V::set(0.f)}, bits = V::set(0.f);

    // Of the values, and what narrowing takes from them.
    void add(F low, F high, F low_lost, F high_lost) {
        squares[0] = V::fma(low, low, squares[0]);
        squares[1] = V::fma(high, high, squares[1]);
        residuals[0] = V::fma(low_lost, low_lost, residuals[0]);
        residuals[1] = V::fma(high_lost, high_lost, residuals[1]);
        bits = V::bits_or(bits, V::bits_or(low, high));
    }
    Norms norms() const {
        const float whole = std::sqrt(V::sum(V::add(squares[0], squares[1])));
        // Squares underflow: a vector that is not 0 must not pass for it.
        return {whole == 0 && !V::all_zero(bits) ? kSmallest / 2 : whole,
                std::sqrt(V::sum(V::add(residuals[0], residuals[1])))};
    }
};

// The next 2 kLanes values (0 beyond `count`), as two vectors.
template <class V>
void load_two(const float* from, int64_t count, typename V::F& low, typename V::F& high) {
    low = V::load_n(from, count);
    high = count > V::kLanes ? V::load_n(from + V::kLanes, count - V::kLanes) : V::set(0.f);
}

// A row of c floats into row `row` of tiles [c / 32][kTileRows][32].
template <class V, class Products>
Norms pack_row(const float* from, int64_t c, float scale, uint16_t* tiles, int64_t row) {
    Sums<V> sums;
    for (int64_t tile = 0; tile < c; tile += kTileDepth) {
        uint16_t* to = tiles + tile * Products::kTileRows + row * kTileDepth;
        for (int64_t k = 0; k < kTileDepth; k += 2 * V::kLanes)
            V::store(
                reinterpret_cast<float*>(to + k),
                tile + k < c ? Products::narrow(from + tile + k, c - tile - k, scale, sums) : V::set(0.f));
    }
    return sums.norms();
}

// The sounds in panels [m / width][c / 32][2][16 pairs of channels][kLanes sounds][2], and their norms and
// scales.
template <class V, class Products>
struct Sounds {
    static constexpr int64_t kWidth = 2 * V::kLanes, kHalf = kTileDepth * V::kLanes;

    int64_t m, c, depth;  // depth: tiles over the channels
    const float* rows;
    Scratch tiles, norms, residuals, scales;

    explicit Sounds(const MaxLogits& job)
        : m(job.m),
          c(job.img.c),
          depth(ceil_div(c, kTileDepth)),
          rows(job.aud),
          tiles(sizeof(uint16_t) * panels() * panel_size()),
          norms(sizeof(float) * panels() * kWidth),
          residuals(sizeof(float) * panels() * kWidth),
          scales(sizeof(float) * panels() * kWidth) {
        parallel_for(job.threads, 2 * panels(), [&](int64_t half, int) { pack_half(half); });
    }
    int64_t panels() const { return ceil_div(m, kWidth); }
    int64_t panel_size() const { return depth * 2 * kHalf; }
    const uint16_t* panel(int64_t i) const { return tiles.as<uint16_t>() + i * panel_size(); }

    void pack_half(int64_t half) {
        const int64_t first = half * V::kLanes;
        uint16_t* to = tiles.as<uint16_t>() + half / 2 * panel_size() + half % 2 * kHalf;
        Sums<V> sums[V::kLanes];
        float* scale = scales.as<float>() + first;
        for (int64_t i = 0; i < V::kLanes; ++i)
            scale[i] = first + i < m ? Products::scale(rows + (first + i) * c, c, 1, c) : 1;
        // A block is as many pairs of channels as a vector has lanes.
        for (int64_t pair = 0; pair < depth * kTileDepth / 2; pair += V::kLanes) {
            typename V::F block[V::kLanes];
            for (int64_t i = 0; i < V::kLanes; ++i)
                block[i] = first + i < m && 2 * pair < c ? Products::narrow(rows + (first + i) * c + 2 * pair,
                                                                            c - 2 * pair, scale[i], sums[i])
                                                         : V::set(0.f);
            V::transpose(block);
            uint16_t* at = to + pair / kPairs * 2 * kHalf + pair % kPairs * 2 * V::kLanes;
            for (int64_t i = 0; i < V::kLanes; ++i)
                V::store(reinterpret_cast<float*>(at) + i * V::kLanes, block[i]);
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

  private:
    static constexpr int64_t kPairs = kTileDepth / 2;
};

// <x[r], y> of four vectors, whose values do not depend on which r is whose: equal vectors give equal values.
template <class V>
void dots(const float* const (&x)[4], const float* y, int64_t c, float (&out)[4]) {
    typename V::F even[4], odd[4];
    for (int r = 0; r < 4; ++r) even[r] = odd[r] = V::set(0.f);
    int64_t k = 0;
    for (; k + 2 * V::kLanes <= c; k += 2 * V::kLanes) {
        const typename V::F low = V::load(y + k), high = V::load(y + k + V::kLanes);
        for (int r = 0; r < 4; ++r) {
            even[r] = V::fma(V::load(x[r] + k), low, even[r]);
            odd[r] = V::fma(V::load(x[r] + k + V::kLanes), high, odd[r]);
        }
    }
    for (; k < c; k += V::kLanes) {
        const typename V::F last = V::load_n(y + k, c - k);
        for (int r = 0; r < 4; ++r) even[r] = V::fma(V::load_n(x[r] + k, c - k), last, even[r]);
    }
    for (int r = 0; r < 4; ++r) even[r] = V::add(even[r], odd[r]);
    V::sums(even, out);
}

// A cell that may win: cell `cell` of those of image `image` of the group.
struct Candidate {
    uint16_t image, cell;
};

// One task's cells: whole images, or a piece of one that is too large.
struct Cells {
    int64_t image, images, begin, count;  // count cells from cell `begin` of each image
};

template <class V, class Products>
class Worker {
    static constexpr int64_t kWidth = Sounds<V, Products>::kWidth, kTileRows = Products::kTileRows;

  public:
    static constexpr int64_t kPanelsPerTask = kSoundsPerTask / kWidth;

    Worker(const MaxLogits& job, const Sounds<V, Products>& sounds, std::byte* memory, uint8_t* dense)
        : job_(job), img_(job.img), sounds_(sounds), dense_(dense) {
        const int64_t cells = capacity(img_) + kTileRows, c = img_.c;
        tiles_ = take<uint16_t>(memory, cells * sounds.depth * kTileDepth);
        products_ = take<float>(memory, (cells + kTileRows) * kWidth);
        least_ = take<float>(memory, kPanelsPerTask * kWidth);
        candidates_ = take<Candidate>(memory, kWidth * (cells + kSpare));
        stride_ = cells + kSpare;
        rows_ = take<float>(memory, cells * padded(c));
    }
    // Cells that a group may have.
    static int64_t capacity(const FeatureMap& img) {
        const int64_t fit =
            V::kCellBytes / static_cast<int64_t>(sizeof(float)) / img.c / kTileRows * kTileRows;
        const int64_t all = ceil_div(img.n * img.p, kTileRows) * kTileRows;
        return smaller(all, fit < kMinCells ? kMinCells : fit > kMaxCells ? kMaxCells : fit);
    }
    static size_t bytes(const FeatureMap& img, const Sounds<V, Products>& sounds) {
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
        Products::multiply(tiles_, sounds_.panel(index), sounds_.depth, cells_.images * cells_.count,
                           products_);
        std::memset(found_, 0, sizeof(found_));
        for (int64_t i = 0; i < cells_.images; ++i) {
            if (is_dense(i)) continue;
            if constexpr (Products::kRounds) {
                if (job_.bf16_products) {
                    keep_largest(i, index);
                    continue;
                }
            }
            screen(i, index, least_ + (index - first_panel) * kWidth);
        }
        for (int64_t lane = 0; lane < kWidth; ++lane) refine(lane, index * kWidth + lane);
    }

  private:
    using F = typename V::F;
    static constexpr int64_t kSpare = 1;  // what is written of a candidate that is none

    const MaxLogits& job_;
    const FeatureMap& img_;
    const Sounds<V, Products>& sounds_;
    uint8_t* dense_;         // by image: left to the float32 kernel
    uint16_t* tiles_;        // [cells / kTileRows][c / 32][kTileRows][32]
    float* products_;        // [cells][kWidth]
    float* least_;           // what the maximum is at least, where an image comes in pieces
    float* rows_;            // [cells][c], where the image itself has no such rows
    Candidate* candidates_;  // [kWidth sounds][stride_]: cells of the group to multiply again, in order
    int64_t stride_;
    int64_t found_[kWidth];  // how many there are of each sound
    Cells cells_{};
    Norms norms_[kMaxImages];   // by image of the group
    float scales_[kMaxImages];  // likewise

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

    // The cells [begin, end) of an image as rows of float32; kept where candidates will be read again.
    const float* rows_of(int64_t i, int64_t begin, int64_t end) {
        if (rows_in_place()) return rows_of(i) + begin * img_.c;
        const int64_t c = img_.c, stride = row_stride();
        const bool kept = !Products::kRounds || !job_.bf16_products;
        float* const to = rows_ + (kept ? (i * cells_.count + begin) * stride : 0);
        with_dtype(img_.dtype, [&]<class T>(T) {
            const T* from = static_cast<const T*>(img_.data) + (cells_.image + i) * img_.image_size() +
                            (cells_.begin + begin) * img_.stride_p;
            if (img_.stride_c != 1) return transpose_cells(from, begin, end, to);
            for (int64_t p = 0; p < end - begin; ++p)
                for (int64_t k = 0; k < c; k += V::kLanes)
                    V::store_n(to + p * stride + k, V::load_n(from + p * img_.stride_p + k, c - k), c - k);
        });
        return to;
    }

    // The cells [begin, end), of which `from` is the first. Of a whole image, lines of memory far ahead, at
    // last the next image's, are fetched as fast as they are used up, into the second cache: DRAM takes
    // longer than the next rows leave it.
    template <class T>
    void transpose_cells(const T* from, int64_t begin, int64_t end, float* to) const {
        constexpr int64_t kAhead = 32 * 1024, kLine = 64;
        const int64_t c = img_.c, stride = img_.stride_c, cells = end - begin, p = img_.p;
        if (cells_.count < p) return transpose<V>(from, stride, c, cells, to, row_stride());
        const int64_t bytes = static_cast<int64_t>(sizeof(T)) * img_.image_size();
        const int64_t blocks = ceil_div(c, V::kLanes) * ceil_div(p, V::kLanes);
        const int64_t lines = ceil_div(bytes, kLine * blocks);
        const auto* line = reinterpret_cast<const std::byte*>(from - begin) + bytes * begin / p + kAhead;
        transpose<V>(from, stride, c, cells, to, row_stride(), [&](int64_t, int64_t) {
            for (int64_t i = 0; i < lines; ++i, line += kLine) __builtin_prefetch(line, 0, 2);
        });
    }

    void pack_image(int64_t i) {
        const int64_t c = img_.c, count = cells_.count, stride = row_stride();
        Norms largest{0, 0};
        bool usable = true;
        float scale = 1;
        // A few rows, which are then still in L1, unless the scale needs them all first.
        const int64_t step = Products::kScaled ? count : V::kLanes;
        for (int64_t begin = 0; begin < count; begin += step) {
            const int64_t end = smaller(begin + step, count);
            const float* rows = rows_of(i, begin, end);
            if constexpr (Products::kScaled) scale = Products::scale(rows, c, count, stride);
            for (int64_t p = begin; p < end; ++p, rows += stride) {
                const int64_t at = i * count + p;
                uint16_t* const tiles = tiles_ + at / kTileRows * sounds_.depth * kTileRows * kTileDepth;
                const Norms norms = pack_row<V, Products>(rows, c, scale, tiles, at % kTileRows);
                usable &= in_range(norms.whole);
                largest.whole = norms.whole > largest.whole ? norms.whole : largest.whole;
                largest.residual = norms.residual > largest.residual ? norms.residual : largest.residual;
            }
        }
        if (!usable) make_dense(i);
        norms_[i] = largest;
        scales_[i] = scale;
    }

    // Largest product and its first cell, from this piece's products.
    void keep_largest(int64_t i, int64_t panel) {
        const float* products = products_ + i * cells_.count * kWidth;
        const int64_t row = (cells_.image + i) * sounds_.m;
        for (int64_t half = 0; half < kWidth; half += V::kLanes) {
            const int64_t m0 = panel * kWidth + half, columns = smaller(V::kLanes, sounds_.m - m0);
            if (columns <= 0) return;
            Products::keep_largest(products + half, kWidth, cells_.begin, cells_.count, columns,
                                   job_.logits + row + m0, job_.argmax + row + m0);
        }
    }

    static F similarity(const float* products, F unit) {
        if constexpr (Products::kScaled) return V::mul(V::load(products), unit);
        return V::load(products);
    }

    // Notes which cells of an image may win, by `least` of the pieces before.
    void screen(int64_t i, int64_t panel, float* least) {
        const float* products = products_ + i * cells_.count * kWidth;
        const int64_t row = (cells_.image + i) * sounds_.m;
        const float gamma = static_cast<float>(img_.c + 16) * 0x1p-23f;
        // The rounded vector's norm is at most the sum of both.
        const float whole = norms_[i].whole + norms_[i].residual;
        int64_t before[kWidth], budget = cells_.count * kWidth / 4 + kWidth;
        std::memcpy(before, found_, sizeof(before));
        for (int64_t half = 0; half < kWidth; half += V::kLanes) {
            const int64_t m0 = panel * kWidth + half, columns = smaller(V::kLanes, sounds_.m - m0);
            if (columns <= 0) break;
            if (cells_.begin == 0)
                V::store_n(job_.logits + row + m0, V::set(-std::numeric_limits<float>::infinity()), columns);
            const F unit = V::mul(V::set(scales_[i]), V::load(sounds_.scales.template as<float>() + m0));
            F top = similarity(products + half, unit);
            for (int64_t p = 1; p < cells_.count; ++p)
                top = V::max(top, similarity(products + p * kWidth + half, unit));
            const F sound = V::load(sounds_.norms.template as<float>() + m0),
                    lost = V::load(sounds_.residuals.template as<float>() + m0);
            const F eps = V::fma(V::set(norms_[i].residual + gamma * whole), V::add(sound, lost),
                                 V::mul(V::set(whole), lost));
            top = V::sub(top, eps);
            if (cells_.begin > 0) top = V::max(top, V::load(least + half));
            V::store(least + half, top);
            const F floor = V::sub(top, eps);
            for (int64_t p = 0; p < cells_.count; p += 64)
                budget -= note(i, p, half, columns, products + half, unit, floor);
        }
        if (budget >= 0) return;
        std::memcpy(found_, before, sizeof(before));
        make_dense(i);
    }

    // Notes which of up to 64 cells from `first` on reach the floor, and counts them. What varies from pair
    // to pair is not branched on as far as the second candidate of a sound.
    int64_t note(int64_t i, int64_t first, int64_t half, int64_t columns, const float* products, F unit,
                 F floor) {
        uint32_t wins[2][V::kLanes];  // by sound, a bit for each cell
        for (int64_t h = 0; h < 2; ++h) {
            typename V::Bits bits = V::all_bits(0), bit = V::all_bits(1);
            const int64_t begin = first + 32 * h, end = smaller(begin + 32, cells_.count);
            for (int64_t p = begin; p < end; ++p, bit = V::twice(bit))
                bits = V::set_where_at_least(similarity(products + p * kWidth, unit), floor, bit, bits);
            V::store(wins[h], bits);
        }
        int64_t count = 0;
        for (int64_t lane = 0; lane < columns; ++lane) {
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
            dots<V>(rows, sound, img_.c, values);
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

template <class V>
void scale_rows(const MaxLogits& job) {
    parallel_for(job.threads, job.img.n, [&](int64_t n, int) {
        for (int64_t i = 0; i < job.m; i += V::kLanes) {
            float* at = job.logits + n * job.m + i;
            V::store_n(at, V::mul(V::load_n(at, job.m - i), V::set(job.scale)), job.m - i);
        }
    });
}

// `exact` is the float32 kernel.
template <class V, class Products>
void max_logits_screened(const MaxLogits& job, void (*exact)(const MaxLogits&)) {
    using Work = Worker<V, Products>;
    const FeatureMap& img = job.img;
    if (img.p < Products::kFewestCells && !(Products::kRounds && job.bf16_products)) return exact(job);
    const Sounds<V, Products> sounds(job);
    if (!sounds.all_in_range()) return exact(job);
    const int64_t capacity = Work::capacity(img), limit = smaller(capacity / img.p, kMaxImages);
    const int64_t group = limit < 1 ? 1 : smaller(limit, ceil_div(img.n, job.threads));
    const int64_t pieces = ceil_div(img.p, capacity), groups = ceil_div(img.n, group);
    // Few images and many sounds: the panels are shared out too.
    const int64_t share = ceil_div(sounds.panels(), ceil_div(2 * job.threads, groups));
    const int64_t panels = smaller(smaller(Work::kPanelsPerTask, sounds.panels()), share);
    const int64_t blocks = ceil_div(sounds.panels(), panels);
    const size_t bytes = (Work::bytes(img, sounds) + 4095) / 4096 * 4096;
    const Scratch memory(bytes * job.threads), dense(img.n);
    std::memset(dense.as<void>(), 0, img.n);

    parallel_for(job.threads, groups * blocks, [&](int64_t task, int worker) {
        [[maybe_unused]] const Products products;
        Work work(job, sounds, memory.as<std::byte>() + worker * bytes, dense.as<uint8_t>());
        const int64_t image = task / blocks * group, first = task % blocks * panels;
        const int64_t last = smaller(first + panels, sounds.panels());
        for (int64_t q = 0; q < pieces; ++q) {
            const int64_t begin = q * img.p / pieces, end = (q + 1) * img.p / pieces;
            work.pack({image, smaller(group, img.n - image), begin, end - begin});
            for (int64_t i = first; i < last; ++i) work.panel(i, first);
        }
    });
    scale_rows<V>(job);
    if (std::memchr(dense.as<void>(), 1, img.n) == nullptr) return;
    MaxLogits left = job;
    left.only = dense.as<uint8_t>();
    exact(left);
}

// The kernels of `plain` with these products for the max-pooled logits.
template <class V, class Products, const Kernels& (*plain)()>
Kernels screened(const char* name) {
    Kernels kernels = plain();
    kernels.name = name;
    kernels.max_logits = [](const MaxLogits& job) {
        max_logits_screened<V, Products>(job, plain().max_logits);
    };
    return kernels;
}

}  // namespace
}  // namespace fnac
