// Small kernels with the mistakes that the emulation is there to find, and without them. Prints what came
// out: "right", "wrong", or the error.
#include <cstdio>
#include <string>

#include "cuda/hopper.cuh"

namespace fnac::cuda {
namespace {

constexpr int kThreads = 2 * kWarpSize;

struct Arguments {
    float* out;
    bool correct;  // or with the mistake
};

FNAC_DEVICE float* shared_floats() { return reinterpret_cast<float*>(shared_memory()); }

// The second warp's values are read before they are written.
FNAC_KERNEL(kThreads, 1) read_early(const Arguments job) {
    const int t = thread_index();
    shared_floats()[t] = static_cast<float>(t);
    if (job.correct) block_barrier();
    job.out[t] = shared_floats()[kThreads - 1 - t] == static_cast<float>(kThreads - 1 - t);
}

// The second warp overwrites what the first has yet to read: seen only where the second runs ahead.
FNAC_KERNEL(kThreads, 1) overwritten_early(const Arguments job) {
    const int t = thread_index();
    job.out[t] = 1.f;
    for (int round = 0; round < 2; ++round) {
        shared_floats()[t] = static_cast<float>(round);
        block_barrier();
        if (t < kWarpSize && shared_floats()[t + kWarpSize] != static_cast<float>(round)) job.out[t] = 0.f;
        if (job.correct) block_barrier();
    }
}

// The same between the lanes of a warp.
FNAC_KERNEL(kThreads, 1) lanes_read_early(const Arguments job) {
    const int t = thread_index();
    shared_floats()[t] = static_cast<float>(t);
    if (job.correct) warp_barrier();
    job.out[t] = shared_floats()[t ^ 1] == static_cast<float>(t ^ 1);
}

FNAC_KERNEL(kThreads, 1) unwaited_copy(const Arguments job) {
    alignas(16) static const float source[4] = {1, 2, 3, 4};
    float* mine = shared_floats() + 4 * thread_index();
    copy_async(mine, source, true);
    copy_commit();
    if (job.correct) copy_wait<0>();
    job.out[thread_index()] = mine[2] == 3.f;
}

FNAC_KERNEL(kThreads, 1) unwaited_box(const Arguments job) {
    alignas(16) static const uint16_t source[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    static Barrier barrier;
    if (thread_index() == 0) {
        barrier_init(barrier, 1);
        barrier_expect(barrier, kBoxRowBytes);
        copy_box(shared_memory(), make_matrix(source, 1, 8, 1), 0, 0, barrier);
    }
    block_barrier();
    if (job.correct) barrier_wait(barrier, 0);
    const auto* row = reinterpret_cast<const uint16_t*>(shared_memory());
    job.out[thread_index()] = row[7] == 8 && row[8] == 0;
}

FNAC_KERNEL(kThreads, 1) skipped_barrier(const Arguments job) {
    job.out[thread_index()] = 1.f;
    if (!job.correct && thread_index() == 5) return;
    block_barrier();
}

FNAC_KERNEL(kThreads, 1) diverged_warp(const Arguments job) {
    const int lane = thread_index() % kWarpSize;
    job.out[thread_index()] = 1.f;
    if (!job.correct && lane < 7)
        match(lane);
    else
        shuffle_xor(lane, 1);
}

// Shared memory has room for a float a thread, four for unwaited_copy.
FNAC_KERNEL(kThreads, 1) out_of_bounds(const Arguments job) {
    const int t = thread_index();
    shared_floats()[job.correct ? t : 4 * kThreads + t] = 1.f;
    job.out[t] = 1.f;
}

int test(const std::string& name, bool correct) {
    const struct {
        const char* name;
        void (*kernel)(Arguments);
    } kernels[] = {
        {"read_early", read_early},
        {"overwritten_early", overwritten_early},
        {"lanes_read_early", lanes_read_early},
        {"unwaited_copy", unwaited_copy},
        {"unwaited_box", unwaited_box},
        {"skipped_barrier", skipped_barrier},
        {"diverged_warp", diverged_warp},
        {"out_of_bounds", out_of_bounds},
    };
    for (const auto& entry : kernels) {
        if (name != entry.name) continue;
        float out[kThreads] = {};
        launch(entry.kernel, {entry.name, 0, 0, 0, 0}, {1}, kThreads, 4 * kThreads * sizeof(float), Launch{},
               Arguments{out, correct});
        bool right = true;
        for (const float x : out) right = right && x == 1.f;
        std::puts(right ? "right" : "wrong");
        return 0;
    }
    std::fprintf(stderr, "no kernel is called %s\n", name.c_str());
    return 2;
}

}  // namespace
}  // namespace fnac::cuda

// self_test <kernel> correct|broken
int main(int count, char** arguments) {
    if (count != 3) return 2;
    try {
        return fnac::cuda::test(arguments[1], arguments[2] == std::string("correct"));
    } catch (const std::runtime_error& error) {
        std::puts(error.what());
        return 0;
    }
}
