// Memory for results and scratch: what one frees is kept for the next.
//
// The C library gives blocks of more than 32 MB back to the system as soon as they are freed. Where a freed
// block makes 64 KB and more with what is free beside it, it looks at the heap's end, and gives that back
// where it has grown beyond a limit, also what others left there: a small call pays for the memory of the
// large ones around it, which then fill fresh pages again. The two cost up to a third of the whole loss
// (csrc/README.md). A training step frees its results and scratch, and the next step wants the same sizes.
#pragma once

#include <cstddef>

namespace fnac {

// A block of memory, of whole huge pages from 1 MB on, left for the next one on destruction. A block of 8 MB
// and more that none of those kept fits frees them all before it is allocated: blocks of other sizes do not
// add up. Throws std::bad_alloc.
class KeptMemory {
  public:
    // Bytes from which memory should be kept. AddressSanitizer sees who writes beyond the C library's blocks.
#if defined(__SANITIZE_ADDRESS__)
    static constexpr size_t kFrom = size_t{4} << 20;
#else
    static constexpr size_t kFrom = size_t{64} << 10;
#endif
    static constexpr size_t kMost = size_t{512} << 20;  // bytes kept altogether; what is beyond is freed
    // What is soon given back may lie in a block of any larger size, a result in one of up to a quarter more.
    enum class Use { kResult, kScratch };

    explicit KeptMemory(size_t bytes, Use use = Use::kResult);
    ~KeptMemory();
    KeptMemory(const KeptMemory&) = delete;
    KeptMemory& operator=(const KeptMemory&) = delete;

    void* data() const { return data_; }

    // Gives back to the system all that no one uses.
    static void release();

  private:
    void* data_;
    size_t capacity_;
};

}  // namespace fnac
