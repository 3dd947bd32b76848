// Threads for the CPU kernels: torch's own OpenMP team where there is one, so that two pools never fight for
// the cores.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fnac {

// Calls body(context, task, worker) for every task in [0, tasks), on at most `threads` workers. Tasks are
// handed out in order to whoever is free; worker is in [0, threads). Returns when all are done.
void parallel_for(int threads, int64_t tasks, void (*body)(void*, int64_t, int), void* context);

template <class F>
void parallel_for(int threads, int64_t tasks, F&& body) {
    parallel_for(
        threads, tasks, [](void* f, int64_t task, int worker) { (*static_cast<F*>(f))(task, worker); },
        &body);
}

// Says that this is a child process, whose OpenMP team has no threads. Of forks after this module was loaded
// it knows.
void forked();

class KeptMemory;

// Scratch memory, 64-byte aligned, freed on destruction; all but small ones lie in kept memory. Throws
// std::bad_alloc (translated to MemoryError).
class Scratch {
  public:
    explicit Scratch(size_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    template <class T>
    T* as() const {
        return static_cast<T*>(data_);
    }

  private:
    KeptMemory* kept_ = nullptr;
    void* data_;
};

}  // namespace fnac
