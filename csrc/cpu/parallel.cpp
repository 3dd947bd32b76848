// torch's wheel brings a libgomp and loads it globally. Its idle threads spin for a while after a parallel
// region, so a second pool would share the cores with them; running in the same team costs nothing and starts
// at once. The entry point GOMP_parallel (libgomp's ABI since GCC 4.9, also offered by LLVM's libomp) is
// looked up at run time. Without it, and in a forked child, whose OpenMP team has lost its threads, plain
// threads serve.

#include "cpu/parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cfenv>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu/kept_memory.h"

namespace fnac {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> in_fork{false};
// At once: torch may have a team before the first call that wants one.
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, forked);

GompParallel openmp_team() {
    static const auto entry = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return in_fork ? nullptr : entry;
}

// The caller's floating-point mode, which may flush denormals, in a worker: whoever takes a task, its result
// is the same.
class FloatingPointMode {
  public:
    explicit FloatingPointMode(const std::fenv_t& mode) {
        std::fegetenv(&before_);
        std::fesetenv(&mode);
    }
    ~FloatingPointMode() { std::fesetenv(&before_); }
    FloatingPointMode(const FloatingPointMode&) = delete;
    FloatingPointMode& operator=(const FloatingPointMode&) = delete;

  private:
    std::fenv_t before_;
};

struct Region {
    void (*body)(void*, int64_t, int);
    void* context;
    int64_t tasks;
    std::fenv_t mode;
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};

    void work() {
        const FloatingPointMode as_the_callers(mode);
        const int worker = workers.fetch_add(1);
        for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(context, task, worker);
    }
};

}  // namespace

void forked() { in_fork = true; }

void parallel_for(int threads, int64_t tasks, void (*body)(void*, int64_t, int), void* context) {
    const int workers = static_cast<int>(tasks < threads ? tasks : threads);
    if (workers <= 1) {
        for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
        return;
    }
    Region region{body, context, tasks, {}};
    std::fegetenv(&region.mode);
    const auto work = [](void* r) { static_cast<Region*>(r)->work(); };
    if (const GompParallel team = openmp_team()) {
        team(work, &region, static_cast<unsigned>(workers), 0);
        return;
    }
    std::vector<std::thread> helpers;
    helpers.reserve(workers - 1);
    try {
        while (helpers.size() + 1 < static_cast<size_t>(workers))
            helpers.emplace_back([&region] { region.work(); });
    } catch (const std::system_error&) {
        // No more threads are to be had: those that there are do all tasks.
    }
    region.work();
    for (auto& helper : helpers) helper.join();
}

Scratch::Scratch(size_t bytes) {
    // Also because the C library keeps what is freed resident, in holes that the next one need not fit: a
    // step's peak is in its backward, after scratch of two passes.
    if (bytes >= KeptMemory::kFrom) {
        kept_ = new KeptMemory(bytes, KeptMemory::Use::kScratch);
        data_ = kept_->data();
    } else {
        data_ = std::aligned_alloc(64, (bytes + 127) / 64 * 64);
        if (data_ == nullptr) throw std::bad_alloc();
    }
}

Scratch::~Scratch() {
    if (kept_ == nullptr)
        std::free(data_);
    else
        delete kept_;
}

}  // namespace fnac
