#include "fibers.h"

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fnac::emulation {
namespace {

constexpr size_t kStackBytes = 128 * 1024;

// AddressSanitizer follows a program from stack to stack only if it is told.
void before_switch([[maybe_unused]] void** from, [[maybe_unused]] const void* bottom,
                   [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(from, bottom, size);
#endif
}
void after_switch([[maybe_unused]] void* to, [[maybe_unused]] const void** bottom,
                  [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(to, bottom, size);
#endif
}

}  // namespace

#if defined(__x86_64__)

// Saves what a function must preserve (System V ABI) on the current stack, and goes on where `to` was saved.
extern "C" void fnac_switch_stack(void** from, void* to);
asm(R"(
    .text
    .globl fnac_switch_stack
    .hidden fnac_switch_stack
    .type fnac_switch_stack, @function
fnac_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size fnac_switch_stack, .-fnac_switch_stack
)");

struct Fiber::Context {
    void* body = nullptr;
    void* scheduler = nullptr;
    void *fake = nullptr, *scheduler_fake = nullptr;
    const void* scheduler_bottom = nullptr;
    size_t scheduler_size = 0;

    void prepare(char* stack, void (*entry)()) {
        // The return address where switch_stack looks for it, below it the six registers. The ABI wants the
        // stack 8 bytes off a multiple of 16 at a function's entry.
        auto* top = reinterpret_cast<uintptr_t*>(reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~63);
        *--top = 0;
        *--top = reinterpret_cast<uintptr_t>(entry);
        for (int i = 0; i < 6; ++i) *--top = 0;
        body = top;
    }
    void to_body() { fnac_switch_stack(&scheduler, body); }
    void to_scheduler() { fnac_switch_stack(&body, scheduler); }
};

#else

struct Fiber::Context {
    ucontext_t body, scheduler;
    void *fake = nullptr, *scheduler_fake = nullptr;
    const void* scheduler_bottom = nullptr;
    size_t scheduler_size = 0;

    void prepare(char* stack, void (*entry)()) {
        getcontext(&body);
        body.uc_stack.ss_sp = stack;
        body.uc_stack.ss_size = kStackBytes;
        body.uc_link = nullptr;
        makecontext(&body, entry, 0);
    }
    void to_body() { swapcontext(&scheduler, &body); }
    void to_scheduler() { swapcontext(&body, &scheduler); }
};

#endif

namespace {
thread_local Fiber* starting = nullptr;  // a new stack's entry takes no argument
}

Fiber::Fiber() : context_(std::make_unique<Context>()), stack_(new char[kStackBytes]) {}
Fiber::~Fiber() = default;

void Fiber::enter(Fiber* self) {
    after_switch(nullptr, &self->context_->scheduler_bottom, &self->context_->scheduler_size);
    self->body_();
    self->ended_ = true;
    before_switch(nullptr, self->context_->scheduler_bottom, self->context_->scheduler_size);
    self->context_->to_scheduler();
}

void Fiber::start(std::function<void()> body) {
    body_ = std::move(body);
    ended_ = false;
    context_->prepare(stack_.get(), [] { enter(starting); });
}

void Fiber::resume() {
    starting = this;
    before_switch(&context_->scheduler_fake, stack_.get(), kStackBytes);
    context_->to_body();
    after_switch(context_->scheduler_fake, nullptr, nullptr);
}

void Fiber::pause() {
    before_switch(&context_->fake, context_->scheduler_bottom, context_->scheduler_size);
    context_->to_scheduler();
    after_switch(context_->fake, &context_->scheduler_bottom, &context_->scheduler_size);
}

}  // namespace fnac::emulation
