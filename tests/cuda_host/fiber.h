// A fiber: a stack that can be entered and left. Switching is annotated for AddressSanitizer.
#pragma once

#include <cstddef>
#include <memory>

namespace lkconv::shim {

class Fiber {
 public:
  using Entry = void (*)(void* argument);

  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void start(Entry entry,
             void* argument);  // the first resume() calls entry(argument), which must end in finish()
  void resume();               // from the scheduler
  void yield();                // from the fiber
  [[noreturn]] void finish();  // from the fiber, for the last time

 private:
  static void enter();
  void leave(bool last);

  struct Context;
  std::unique_ptr<Context> context_;
};

}  // namespace lkconv::shim
