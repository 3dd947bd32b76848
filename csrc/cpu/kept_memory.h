// Memory for large results and scratch: what one frees is kept for the next.
//
// The C library gives blocks of more than 32 MB back to the system as soon as they are freed, smaller ones
// when they happen to lie at the heap's end, and filling fresh pages again costs as much as a fifth of the
// whole loss (csrc/README.md). A training step frees its gradient of the image features and the next step
// wants one of the same size.
#pragma once

#include <cstddef>

namespace fnac {

// A block of memory, of whole huge pages, left for the next one on destruction. A block of 8 MB and more that
// none of those kept fits frees them all before it is allocated: blocks of other sizes do not add up. Throws
// std::bad_alloc.
class KeptMemory {
  public:
    static constexpr size_t kMost = size_t{512} << 20;  // bytes kept altogether; what is beyond is freed
    // What is soon given back may lie in a block of any larger size, a result in one of up to a quarter more.
    enum class Use { kResult, kScratch };

    explicit KeptMemory(size_t bytes, Use use = Use::kResult);
    ~KeptMemory();
    KeptMemory(const KeptMemory&) = delete;
    KeptMemory& operator=(const KeptMemory&) = delete;

    void* data() const { return data_; }
    size_t size() const { return size_; }

    // Gives back to the system all that no one uses.
    static void release();

  private:
    void* data_;
    size_t size_;      // what was asked for
    size_t capacity_;  // what there is
};

}  // namespace fnac
