// Fibers: the threads of an emulated block. A fiber runs until it calls pause() and goes on at the next
// resume(). On x86-64 a switch is a dozen instructions; elsewhere ucontext does it.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

namespace fnac::emulation {

class Fiber {
  public:
    Fiber();
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    void start(std::function<void()> body);
    void resume();  // from the scheduler: until the body pauses or ends
    void pause();   // from the body
    bool ended() const { return ended_; }

  private:
    struct Context;
    static void enter(Fiber* self);

    std::unique_ptr<Context> context_;
    std::unique_ptr<char[]> stack_;
    std::function<void()> body_;
    bool ended_ = true;
};

}  // namespace fnac::emulation
