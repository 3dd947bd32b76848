#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "cuda/hopper.cuh"
#include "fibers.h"

namespace fnac::emulation {
namespace {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
// Of a block: what the smallest of the chips aimed at has (sm_86, sm_89, sm_120), and Hopper.
constexpr int64_t kMaxShared = 99 * 1024, kMaxSharedHopper = 227 * 1024;

// FNAC_CUDA_EMULATION_CHIP.
bool is_hopper() {
    const char* chip = std::getenv("FNAC_CUDA_EMULATION_CHIP");
    const std::string name = chip == nullptr ? "sm_80" : chip;
    if (name != "sm_80" && name != "sm_90a")
        throw std::runtime_error("FNAC_CUDA_EMULATION_CHIP is '" + name + "', it should be sm_80 or sm_90a");
    return name == "sm_90a";
}

struct Copy {
    void* to;
    const void* from;
    bool read;
    size_t bytes;
};

struct Thread {
    Fiber fiber;
    int index = 0;
    const uint64_t* gate = nullptr;  // the thread waits while *gate is `seen`
    uint64_t seen = 0;
    std::deque<std::vector<Copy>> groups;  // of asynchronous copies; the last one is open

    void wait_at(const uint64_t& passed) {
        gate = &passed;
        seen = passed;
        fiber.pause();
        gate = nullptr;
    }
    bool can_run() const { return !fiber.ended() && (gate == nullptr || *gate != seen); }
};

// Threads that meet: `passed` counts the times that all have come.
struct Meeting {
    uint64_t passed = 0;
    int come = 0;
};

struct Warp {
    Meeting meeting;
    Operation operation{};
    // Two sets: the next operation may begin while some lane has not yet read the results of this one.
    alignas(64) char slots[2][kWarpSize * kSlot];
};

struct Block {
    Index index{};
    int threads = 0;
    char* shared = nullptr;
    int64_t grid = 0;
    Meeting meeting;
    Meeting groups[16];      // of some of the threads, by id
    std::vector<Box> boxes;  // on their way
    std::vector<std::unique_ptr<Thread>> thread;
    std::vector<Warp> warps;
    std::string error;
};

thread_local Block block;
thread_local Thread* current = nullptr;

// Ends the block: the scheduler throws on its own stack, for an exception cannot leave a fiber.
[[noreturn]] void fail(const std::string& error) {
    block.error = error;
    for (;;) current->fiber.pause();
}

class Order {
  public:
    Order() {
        const char* chosen = std::getenv("FNAC_CUDA_EMULATION_ORDER");
        name_ = chosen == nullptr ? "forward" : chosen;
        if (name_ != "forward" && name_ != "reverse" && name_ != "random")
            throw std::runtime_error("FNAC_CUDA_EMULATION_ORDER is '" + name_ +
                                     "', it should be forward, reverse or random");
    }
    void apply(std::vector<int>& indices) {
        for (size_t i = 0; i < indices.size(); ++i) indices[i] = static_cast<int>(i);
        if (name_ == "reverse") std::reverse(indices.begin(), indices.end());
        if (name_ == "random") std::shuffle(indices.begin(), indices.end(), random_);
    }
    bool is_random() const { return name_ == "random"; }

  private:
    std::string name_;
    std::mt19937 random_{1};
};

// Runs the lanes of a warp that can run, each as far as its next operation; whether there was one.
bool step(int warp, const std::vector<int>& lanes) {
    bool any = false;
    for (const int lane : lanes) {
        current = block.thread[warp * kWarpSize + lane].get();
        if (!current->can_run()) continue;
        current->fiber.resume();
        any = true;
        if (!block.error.empty()) throw std::runtime_error(block.error);
    }
    return any;
}

void run_block(const std::function<void()>& body, Order& order) {
    block.meeting = {};
    for (Meeting& meeting : block.groups) meeting = {};
    block.boxes.clear();
    for (Warp& warp : block.warps) warp.meeting = {};
    for (int t = 0; t < block.threads; ++t) {
        Thread& thread = *block.thread[t];
        thread.index = t;
        thread.gate = nullptr;
        thread.groups.assign(1, {});
        thread.fiber.start(body);
    }
    std::vector<int> warps(block.threads / kWarpSize), lanes(kWarpSize);
    const auto is_running = [](const auto& thread) { return !thread->fiber.ended(); };
    const auto end = block.thread.begin() + block.threads;
    order.apply(lanes);
    for (bool any = true; any;) {
        any = false;
        order.apply(warps);
        for (const int warp : warps) {
            while (step(warp, lanes)) {
                any = true;
                if (order.is_random()) order.apply(lanes);
            }
        }
    }
    if (std::any_of(block.thread.begin(), end, is_running))
        throw std::runtime_error(
            "threads wait at a barrier or an operation of their warp that others never reach");
}

void meet(Meeting& meeting, int threads) {
    if (++meeting.come == threads) {
        meeting.come = 0;
        ++meeting.passed;
        return;
    }
    current->wait_at(meeting.passed);
}

// Ends the phase if all has come.
void check(Barrier& barrier) {
    if (barrier.arrived > barrier.count) fail("more arrivals at a barrier than it was made for");
    if (barrier.arrived < barrier.count || barrier.bytes != 0) return;
    barrier.arrived = 0;
    ++barrier.passed;
}

void land(const Box& box) {
    constexpr int kRowBytes = 128, kColumns = 64;
    for (int row = 0; row < box.box_rows; ++row)
        for (int column = 0; column < kColumns; ++column) {
            const int64_t y = box.row + row, x = box.column + column;
            const bool inside = y < box.rows && x < box.columns;
            auto* to = const_cast<char*>(permuted(box.to + row * kRowBytes + column * 2));
            if (inside)
                std::memcpy(to, box.from + (y * box.columns + x) * 2, 2);
            else
                std::memset(to, 0, 2);
        }
    box.barrier->bytes -= box.box_rows * kRowBytes;
    check(*box.barrier);
}

}  // namespace

int64_t grid_x() { return block.grid; }

void group_barrier(int id, int threads) { meet(block.groups[id], threads); }

void arrive(Barrier& barrier, int64_t bytes) {
    barrier.bytes += bytes;
    ++barrier.arrived;
    check(barrier);
}

void wait(Barrier& barrier, int parity) {
    std::vector<Box> landing;
    std::erase_if(block.boxes, [&](const Box& box) {
        if (box.barrier == &barrier) landing.push_back(box);
        return box.barrier == &barrier;
    });
    for (const Box& box : landing) land(box);
    ++barrier.waiting;
    while (static_cast<int>(barrier.passed % 2) == parity) current->wait_at(barrier.passed);
    --barrier.waiting;
}

void start(const Box& box) {
    if (reinterpret_cast<uintptr_t>(box.to) % 1024 != 0) fail("a box is not aligned to 1024 bytes");
    std::memset(box.to, 0xff, static_cast<size_t>(box.box_rows) * 128);
    if (box.barrier->waiting > 0)
        land(box);
    else
        block.boxes.push_back(box);
}

int thread_index() { return current->index; }
const Index& block_index() { return block.index; }
char* shared_memory() { return block.shared; }

void block_barrier() { meet(block.meeting, block.threads); }

void collective(Operation operation, void* mine, size_t bytes, void (*complete)(char* slots)) {
    Thread& self = *current;
    Warp& warp = block.warps[self.index / kWarpSize];
    Meeting& meeting = warp.meeting;
    char* slots = warp.slots[meeting.passed % 2];
    char* own = slots + self.index % kWarpSize * kSlot;
    if (meeting.come != 0 && warp.operation != operation)
        fail("the lanes of a warp are at different operations");
    warp.operation = operation;
    std::memcpy(own, mine, bytes);
    if (++meeting.come == kWarpSize) {
        complete(slots);
        meeting.come = 0;
        ++meeting.passed;
    } else {
        self.wait_at(meeting.passed);
    }
    std::memcpy(mine, own, bytes);
}

void copy_async(void* to, const void* from, bool read, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(to) % bytes != 0 ||
        (read && reinterpret_cast<uintptr_t>(from) % bytes != 0))
        fail("an asynchronous copy is not aligned to its size");
    std::memset(to, 0xff, bytes);
    current->groups.back().push_back({to, from, read, bytes});
}

void copy_commit() { current->groups.emplace_back(); }

void copy_wait(int pending) {
    while (static_cast<int>(current->groups.size()) - 1 > pending) {
        for (const Copy& copy : current->groups.front()) {
            if (copy.read)
                std::memcpy(copy.to, copy.from, copy.bytes);
            else
                std::memset(copy.to, 0, copy.bytes);
        }
        current->groups.pop_front();
    }
}

void run_grid(const std::string& name, const Index& grid, int threads, int64_t shared,
              const std::function<void()>& body) {
    if (threads < kWarpSize || threads > kMaxThreads || threads % kWarpSize != 0 ||
        shared > (is_hopper() ? kMaxSharedHopper : kMaxShared) || grid.x < 1 || grid.y < 1 || grid.z < 1 ||
        grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
        throw std::runtime_error(name + ": its launch is beyond the device's limits");
    if (std::getenv("FNAC_CUDA_EMULATION_TRACE") != nullptr)
        std::fprintf(stderr, "launch %s\n", name.c_str());
    Order order;
    block.threads = threads;
    block.grid = grid.x;
    block.warps.resize(threads / kWarpSize);
    while (static_cast<int>(block.thread.size()) < threads)
        block.thread.push_back(std::make_unique<Thread>());
    for (block.index.z = 0; block.index.z < grid.z; ++block.index.z)
        for (block.index.y = 0; block.index.y < grid.y; ++block.index.y)
            for (block.index.x = 0; block.index.x < grid.x; ++block.index.x) {
                void* memory = nullptr;
                if (shared > 0 && posix_memalign(&memory, 1024, static_cast<size_t>(shared)) != 0)
                    throw std::bad_alloc();
                const std::unique_ptr<void, void (*)(void*)> owner(memory, std::free);
                if (shared > 0) std::memset(memory, 0xff, static_cast<size_t>(shared));
                block.shared = static_cast<char*>(memory);
                block.error.clear();
                try {
                    run_block(body, order);
                } catch (const std::runtime_error& error) {
                    const std::string message = error.what();
                    block.thread.clear();  // their fibers are in the middle of something
                    throw std::runtime_error(name + ": " + message);
                }
            }
}

}  // namespace fnac::emulation

bool fnac::cuda::is_hopper(int) { return emulation::is_hopper(); }
