// Misuses the machine on purpose, in kernels written like those of csrc/cuda: the emulator must end every
// named misuse with an error or show it in the result. `faults_driver NAME ORDER` prints "error: ..." or the
// sum of what the threads read, which is 64 * 63 / 2 where nothing went wrong.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>

#include "cuda/device.cuh"

namespace lkconv::cuda {
namespace {

constexpr int kThreads = 64;
alignas(16) float numbers[kThreads];
alignas(16) float found[kThreads];

float* shared() { return reinterpret_cast<float*>(dynamic_shared()); }
int me() { return int(threadIdx.x); }
int other() { return kThreads - 1 - me(); }  // a thread of the other warp

// Every thread hands its number to one of the other warp.
void exchange() {
  shared()[me()] = numbers[me()];
  sync_block();
  found[me()] = shared()[other()];
}

void no_barrier() {
  shared()[me()] = numbers[me()];
  found[me()] = shared()[other()];
}

void barrier_of_one_warp() {
  if (me() < kWarp) sync_block();
  exchange();
}

void barrier_after_an_early_exit() {
  if (me() == 5) return;
  exchange();
}

void barrier_in_a_loop_of_other_lengths() {
  for (int i = 0; i <= me() / kWarp; ++i) sync_block();
}

void copy() { copy_async<4>(shared() + me(), numbers + me(), 4); }

void copy_and_wait() {
  copy(), commit_copies(), wait_copies<0>();
  sync_block();
  found[me()] = shared()[other()];
}

void copy_read_before_its_wait() {
  copy(), commit_copies();
  sync_block();
  found[me()] = shared()[other()];
  wait_copies<0>();
}

void copy_waited_for_in_a_later_group() {
  copy(), commit_copies(), commit_copies();
  wait_copies<2>();
  sync_block();
  found[me()] = shared()[other()];
  wait_copies<0>();
}

void copy_never_committed() {
  copy(), wait_copies<0>();
  sync_block();
  found[me()] = shared()[other()];
}

void copy_read_without_a_barrier() {
  copy(), commit_copies(), wait_copies<0>();
  found[me()] = shared()[other()];
}

void copy_to_an_odd_address() {
  copy_async<16>(reinterpret_cast<unsigned char*>(shared()) + 4, numbers, 16);
  commit_copies(), wait_copies<0>();
}

void shuffle_of_half_a_warp() {
  if (me() % kWarp < 16) shuffle(1, 0);
}

void lanes_at_different_instructions() {
  if (me() % 2)
    shuffle(1, 0);
  else
    sync_warp();
}

void shuffle_against_barrier() {
  if (me() % 2)
    shuffle(1, 0);
  else
    sync_block();
}

const std::map<std::string, void (*)()> kKernels = {
    {"none", exchange},
    {"none, copied", copy_and_wait},
    {"no barrier", no_barrier},
    {"barrier of one warp", barrier_of_one_warp},
    {"barrier after an early exit", barrier_after_an_early_exit},
    {"barrier in a loop of other lengths", barrier_in_a_loop_of_other_lengths},
    {"copy read before its wait", copy_read_before_its_wait},
    {"copy waited for in a later group", copy_waited_for_in_a_later_group},
    {"copy never committed", copy_never_committed},
    {"copy read without a barrier", copy_read_without_a_barrier},
    {"copy to an odd address", copy_to_an_odd_address},
    {"shuffle of half a warp", shuffle_of_half_a_warp},
    {"lanes at different instructions", lanes_at_different_instructions},
    {"shuffle against barrier", shuffle_against_barrier},
};

shim::Order order_named(const std::string& name) {
  return name == "reverse"  ? shim::Order::reverse
         : name == "random" ? shim::Order::random
                            : shim::Order::forward;
}

}  // namespace
}  // namespace lkconv::cuda

int main(int, char** arguments) {
  using namespace lkconv::cuda;
  const auto kernel = kKernels.at(arguments[1]);
  for (int i = 0; i < kThreads; ++i) numbers[i] = float(i);
  const size_t bytes = kThreads * sizeof(float);
  try {
    lkconv::shim::run_grid({1, 1, 1}, {kThreads, 1, 1}, bytes, {order_named(arguments[2]), 1}, kernel);
  } catch (const std::runtime_error& error) {
    std::printf("error: %s\n", error.what());
    std::fflush(stdout);
    std::_Exit(0);  // fibers of the failed launch still hold memory, which must not count as leaked
  }
  double sum = 0;
  for (const float f : found) sum += f;
  std::printf("%g\n", sum);
}
