#include "cpu/kept_memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <mutex>
#include <new>
#include <utility>

namespace fnac {
namespace {

constexpr size_t kHugePage = size_t{2} << 20, kSmallPages = size_t{64} << 10;
constexpr size_t kLarge = size_t{8} << 20;

struct Block {
    void* data = nullptr;
    size_t bytes = 0;
};

// Whole huge pages, unless half of them would be waste. A block that is kept is worth them: a channel's slice
// of all images touches every small page.
size_t whole_pages(size_t bytes) {
    const size_t unit = bytes < kHugePage / 2 ? kSmallPages : kHugePage;
    return (bytes + unit - 1) / unit * unit;
}

void* fresh(size_t bytes) {
    void* const mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    return mapped;
}

Block map(size_t bytes) {
    const size_t size = whole_pages(bytes);
    if (size < kHugePage) return {fresh(size), size};
    void* const mapped = fresh(size + kHugePage);
    const auto start = reinterpret_cast<uintptr_t>(mapped);
    const auto aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
    const Block block{reinterpret_cast<void*>(aligned), size};
    if (aligned > start) munmap(mapped, aligned - start);
    munmap(static_cast<char*>(block.data) + size, start + kHugePage - aligned);
#ifdef MADV_HUGEPAGE
    if (size <= KeptMemory::kMost) madvise(block.data, size, MADV_HUGEPAGE);
#endif
    return block;
}

void unmap(const Block& block) {
    if (block.data != nullptr) munmap(block.data, block.bytes);
}

// The free blocks, in no order.
class Pool {
  public:
    // The smallest block of `bytes` to `most`; empty where there is none.
    Block take(size_t bytes, size_t most) {
        const std::lock_guard lock(mutex_);
        Block* best = nullptr;
        for (Block& block : blocks_)
            if (block.data != nullptr && block.bytes >= bytes && block.bytes <= most &&
                (best == nullptr || block.bytes < best->bytes))
                best = &block;
        if (best == nullptr) return {};
        kept_ -= best->bytes;
        return std::exchange(*best, {});
    }

    // Keeps it, where there are no more places in that of the smallest; returns what there is no room for.
    Block keep(const Block& block) {
        const std::lock_guard lock(mutex_);
        Block& smallest = *std::min_element(blocks_.begin(), blocks_.end(),
                                            [](const Block& a, const Block& b) { return a.bytes < b.bytes; });
        if (smallest.bytes >= block.bytes || block.bytes > KeptMemory::kMost - kept_ + smallest.bytes)
            return block;
        kept_ += block.bytes - smallest.bytes;
        return std::exchange(smallest, block);
    }

    void clear() {
        std::array<Block, kBlocks> freed{};
        {
            const std::lock_guard lock(mutex_);
            freed.swap(blocks_);
            kept_ = 0;
        }
        for (const Block& block : freed) unmap(block);
    }

    std::mutex& mutex() { return mutex_; }

  private:
    static constexpr size_t kBlocks = 16;

    std::mutex mutex_;
    std::array<Block, kBlocks> blocks_{};
    size_t kept_ = 0;
};

// Never destroyed, because tensors may outlive static objects. A forked child gives its copies of the pages
// up: the parent, which goes on writing to them, would have to copy each.
Pool& pool() {
    static Pool* const one = [] {
        pthread_atfork([] { pool().mutex().lock(); }, [] { pool().mutex().unlock(); },
                       [] {
                           pool().mutex().unlock();
                           KeptMemory::release();
                       });
        return new Pool;
    }();
    return *one;
}

}  // namespace

KeptMemory::KeptMemory(size_t bytes, Use use) {
    Block block = pool().take(bytes, use == Use::kScratch ? kMost : whole_pages(bytes + bytes / 4));
    if (block.data == nullptr) {
        if (bytes >= kLarge) pool().clear();
        block = map(bytes);
    }
    data_ = block.data;
    capacity_ = block.bytes;
}

KeptMemory::~KeptMemory() { unmap(pool().keep({data_, capacity_})); }

void KeptMemory::release() { pool().clear(); }

}  // namespace fnac
