// Fibers: stacks to switch between within one thread of the operating system.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__x86_64__) && !defined(HYPERCONV_HOST_UCONTEXT)
#define HYPERCONV_HOST_ASSEMBLY
#else
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef HYPERCONV_HOST_ASSEMBLY
// Saves the registers that a call preserves and the stack pointer, and takes on another fiber's. It ends
// with a jump, not a return: where it goes is where it went last time, which a processor predicts. Weak, for
// every file that includes this has it.
extern "C" __attribute__((visibility("hidden"))) void hyperconv_host_switch(void** from, void* to);
asm(R"(
  .pushsection .text
  .p2align 4
  .hidden hyperconv_host_switch
  .weak hyperconv_host_switch
  .type hyperconv_host_switch, @function
hyperconv_host_switch:
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
  popq %rcx
  jmpq *%rcx
  .size hyperconv_host_switch, . - hyperconv_host_switch
  .popsection
)");
#endif

namespace hyperconv_host {

class Fiber {
 public:
  Fiber() = default;  // the calling thread, on its own stack
  Fiber(const Fiber&) = delete;
  ~Fiber() {
    if (mapping_ != nullptr) munmap(mapping_, kGuard + kStack);
  }

  // The first switch to this fiber calls `entry`, which calls `entered` first and never returns. Stacks
  // start at different offsets, for neighbours not to share the few cache lines of one page offset.
  void prepare(void (*entry)(), int number) {
    if (mapping_ == nullptr) {
      void* mapping = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (mapping == MAP_FAILED) throw std::bad_alloc();
      mapping_ = mapping;
      mprotect(mapping, kGuard, PROT_NONE);
      bottom_ = static_cast<unsigned char*>(mapping) + kGuard;
      size_ = kStack;
    }
    const size_t used = kStack - number % 32 * 128;
#ifdef HYPERCONV_HOST_ASSEMBLY
    void** top = reinterpret_cast<void**>(const_cast<unsigned char*>(bottom_) + used) - 1;
    *top = nullptr;  // what `entry` would return to
    *--top = reinterpret_cast<void*>(entry);
    for (int preserved = 0; preserved < 6; ++preserved) *--top = nullptr;
    stack_pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = const_cast<unsigned char*>(bottom_);
    context_.uc_stack.ss_size = used;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // What sanitizers remember of frames that were left without returning.
  void forget_frames() {
#ifdef __SANITIZE_ADDRESS__
    if (mapping_ != nullptr) __asan_unpoison_memory_region(bottom_, size_);
#endif
  }

  static void entered() {
#ifdef __SANITIZE_ADDRESS__
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    last_->bottom_ = static_cast<const unsigned char*>(bottom);
    last_->size_ = size;
#endif
  }

  // From the running fiber, which is this one. `forever`: it will not be switched to again.
  void switch_to(Fiber& to, [[maybe_unused]] bool forever = false) {
#ifdef __SANITIZE_ADDRESS__
    void* frames = nullptr;
    last_ = this;
    __sanitizer_start_switch_fiber(forever ? nullptr : &frames, to.bottom_, to.size_);
#endif
#ifdef HYPERCONV_HOST_ASSEMBLY
    hyperconv_host_switch(&stack_pointer_, to.stack_pointer_);
#else
    swapcontext(&context_, &to.context_);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
#endif
  }

 private:
  static constexpr size_t kStack = 256 * 1024, kGuard = 4096;

  void* mapping_ = nullptr;
  const unsigned char* bottom_ = nullptr;
  size_t size_ = 0;
#ifdef HYPERCONV_HOST_ASSEMBLY
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_ = {};
#endif
#ifdef __SANITIZE_ADDRESS__
  static inline Fiber* last_ = nullptr;  // which was left last
#endif
};

}  // namespace hyperconv_host
