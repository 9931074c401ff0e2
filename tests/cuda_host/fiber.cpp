#include "fiber.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define LK_ASAN 1
#else
#define LK_ASAN 0
#endif

#if defined(__x86_64__)
#define LK_ASM_SWITCH 1
#else
#define LK_ASM_SWITCH 0
#include <ucontext.h>
#endif

#if LK_ASM_SWITCH
// Saves the callee-saved registers on the current stack, stores its pointer in *from and continues at `to`.
extern "C" void lk_switch_stack(void** from, void* to);
asm(R"(
.text
.type lk_switch_stack, @function
lk_switch_stack:
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
.size lk_switch_stack, .-lk_switch_stack
)");
#endif

namespace lkconv::shim {
namespace {

constexpr size_t kStackBytes = 256 << 10;  // sanitized frames are large

Fiber* entering = nullptr;  // the fiber whose entry function is about to start

}  // namespace

struct Fiber::Context {
  unsigned char* stack = nullptr;
  Entry entry = nullptr;
  void* argument = nullptr;
#if LK_ASM_SWITCH
  void* fiber_sp = nullptr;
  void* scheduler_sp = nullptr;
#else
  ucontext_t fiber, scheduler;
#endif
  void* fiber_fake_stack = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
};

Fiber::Fiber() : context_(new Context) {
  void* p =
      mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  context_->stack = static_cast<unsigned char*>(p);
}

Fiber::~Fiber() { munmap(context_->stack, kStackBytes); }

void Fiber::start(Entry entry, void* argument) {
  Context& c = *context_;
  c.entry = entry, c.argument = argument, c.fiber_fake_stack = nullptr;
#if LK_ASM_SWITCH
  void** top = reinterpret_cast<void**>(c.stack + kStackBytes) - 2;  // 16-byte aligned at the call of enter()
  *--top = nullptr;                                                  // return address of enter(): never used
  *--top = reinterpret_cast<void*>(&Fiber::enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  c.fiber_sp = top;
#else
  getcontext(&c.fiber);
  c.fiber.uc_stack.ss_sp = c.stack;
  c.fiber.uc_stack.ss_size = kStackBytes;
  c.fiber.uc_link = nullptr;
  makecontext(&c.fiber, &Fiber::enter, 0);
#endif
}

void Fiber::enter() {
  Fiber* self = entering;
  Context& c = *self->context_;
#if LK_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &c.scheduler_bottom, &c.scheduler_size);
#endif
  c.entry(c.argument);
  std::abort();  // the entry function ends in finish()
}

void Fiber::resume() {
  Context& c = *context_;
  entering = this;
#if LK_ASAN
  __sanitizer_start_switch_fiber(&c.scheduler_fake_stack, c.stack, kStackBytes);
#endif
#if LK_ASM_SWITCH
  lk_switch_stack(&c.scheduler_sp, c.fiber_sp);
#else
  swapcontext(&c.scheduler, &c.fiber);
#endif
#if LK_ASAN
  __sanitizer_finish_switch_fiber(c.scheduler_fake_stack, nullptr, nullptr);
#endif
}

void Fiber::leave(bool last) {
  Context& c = *context_;
#if LK_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &c.fiber_fake_stack, c.scheduler_bottom, c.scheduler_size);
#else
  (void)last;
#endif
#if LK_ASM_SWITCH
  lk_switch_stack(&c.fiber_sp, c.scheduler_sp);
#else
  swapcontext(&c.fiber, &c.scheduler);
#endif
#if LK_ASAN
  __sanitizer_finish_switch_fiber(c.fiber_fake_stack, &c.scheduler_bottom, &c.scheduler_size);
#endif
}

void Fiber::yield() { leave(false); }

void Fiber::finish() {
  leave(true);
  std::abort();
}

}  // namespace lkconv::shim
