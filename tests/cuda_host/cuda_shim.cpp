#include "cuda_shim.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/half.h"
#include "fiber.h"

lkconv::shim::Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace lkconv::shim {
namespace {

constexpr int kWarp = 32;
enum class State { ready, at_barrier, at_collective, done, failed };

struct Copy {
  void* destination;
  const void* source;
  int bytes, source_bytes;
};

// A warp-wide instruction: what each lane asked for. `kind` must agree over the warp.
struct Request {
  const char* kind = "";
  void* arguments = nullptr;
};

struct Thread {
  Fiber fiber;
  State state = State::done;
  Dim3 index;
  int id = 0;
  Request request;
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;
  int count = 0, waiting_at_barrier = 0;
  Thread* current = nullptr;
  unsigned char* shared = nullptr;
  const std::function<void()>* body = nullptr;
  std::string error;
};

Block block;
Counts total;

[[noreturn]] void fail(const std::string& what) {
  block.error = what + " (thread " + std::to_string(block.current->id) + " of block " +
                std::to_string(blockIdx.x) + ")";
  block.current->state = State::failed;
  block.current->fiber.finish();
}

bool has_pending(const Thread& t) {
  if (!t.open_group.empty()) return true;
  return std::any_of(t.groups.begin(), t.groups.end(), [](const auto& g) { return !g.empty(); });
}

void thread_main(void* argument) {
  Thread* t = static_cast<Thread*>(argument);
  (*block.body)();
  if (has_pending(*t)) fail("an asynchronous copy was never waited for");
  t->state = State::done;
  t->fiber.finish();
}

template <class Lane>
using WarpOp = void (*)(Lane* const lanes[kWarp]);

// Waits until all lanes of the warp ask for the same instruction; the last to arrive runs it for all.
template <class Lane>
void collective(const char* kind, Lane* mine, WarpOp<Lane> op) {
  Thread* self = block.current;
  const int first = self->id / kWarp * kWarp;
  if (first + kWarp > block.count) fail(std::string(kind) + " in a warp of fewer than 32 threads");
  self->request = {kind, mine};
  self->state = State::at_collective;
  Lane* lanes[kWarp];
  bool complete = true;
  for (int i = 0; i < kWarp && complete; ++i) {
    Thread& t = *block.threads[first + i];
    complete = t.state == State::at_collective;
    if (complete && std::strcmp(t.request.kind, kind) != 0)
      fail(std::string("lanes of one warp are at ") + kind + " and at " + t.request.kind);
    lanes[i] = static_cast<Lane*>(t.request.arguments);
  }
  if (!complete) return self->fiber.yield();
  op(lanes);
  for (int i = 0; i < kWarp; ++i) block.threads[first + i]->state = State::ready;
}

void land(const std::vector<Copy>& group) {
  for (const Copy& c : group) {
    std::memset(c.destination, 0, size_t(c.bytes));
    if (c.source_bytes) std::memcpy(c.destination, c.source, size_t(c.source_bytes));
  }
}

std::string who_waits() {
  std::string text;
  for (int i = 0; i < block.count; ++i) {
    const Thread& t = *block.threads[i];
    const char* where = t.state == State::at_barrier      ? "barrier"
                        : t.state == State::at_collective ? t.request.kind
                                                          : "exit";
    if (i == 0 || i + 1 == block.count || i % kWarp == 0) text += " " + std::to_string(i) + ":" + where;
  }
  return text;
}

void run_thread(Thread& t) {
  block.current = &t;
  threadIdx = t.index;
  t.fiber.resume();
  if (!block.error.empty()) throw std::runtime_error(block.error);
}

// Resumes ready threads, in the schedule's order, until all are done.
void run_block(const Schedule& schedule, std::mt19937_64& random) {
  std::vector<int> order(size_t(block.count));
  std::iota(order.begin(), order.end(), 0);
  if (schedule.order == Order::reverse) std::reverse(order.begin(), order.end());
  for (;;) {
    if (schedule.order == Order::random) std::shuffle(order.begin(), order.end(), random);
    bool progress = false, all_done = true;
    for (int i : order) {
      Thread& t = *block.threads[i];
      if (t.state == State::ready) run_thread(t), progress = true;
      all_done = all_done && t.state == State::done;
    }
    if (all_done) return;
    if (!progress) throw std::runtime_error("threads diverged: they wait at" + who_waits());
  }
}

void start_block(Dim3 size) {
  block.waiting_at_barrier = 0;
  for (int i = 0; i < block.count; ++i) {
    if (int(block.threads.size()) <= i) block.threads.push_back(std::make_unique<Thread>());
    Thread& t = *block.threads[i];
    t.id = i;
    t.index = {unsigned(i) % size.x, unsigned(i) / size.x % size.y, unsigned(i) / size.x / size.y};
    t.open_group.clear(), t.groups.clear();
    t.state = State::ready;
    t.fiber.start(thread_main, &t);
  }
}

}  // namespace

Counts& counts() { return total; }
unsigned char* dynamic_shared_memory() { return block.shared; }
int lane_id() { return block.current->id % kWarp; }

void run_grid(Dim3 grid, Dim3 size, size_t shared_bytes, const Schedule& schedule,
              const std::function<void()>& body) {
  std::mt19937_64 random(schedule.seed);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), uint64_t(0));
  if (schedule.order == Order::reverse) std::reverse(order.begin(), order.end());
  if (schedule.order == Order::random) std::shuffle(order.begin(), order.end(), random);
  gridDim = grid, blockDim = size;
  block.body = &body;
  block.count = int(size.x * size.y * size.z);
  if (block.count > 1024) throw std::runtime_error("more than 1024 threads in a block");
  for (uint64_t b : order) {
    blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    // Exactly as large as asked for, and NaN in every floating-point type.
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, std::max<size_t>(shared_bytes, 1))) throw std::bad_alloc();
    std::unique_ptr<unsigned char, void (*)(void*)> shared(static_cast<unsigned char*>(memory), std::free);
    std::memset(shared.get(), 0xff, shared_bytes);
    block.shared = shared.get();
    block.error.clear();
    ++total.blocks;
    start_block(size);
    run_block(schedule, random);
  }
}

void barrier() {
  ++total.barriers;
  Thread* self = block.current;
  if (++block.waiting_at_barrier == block.count) {
    block.waiting_at_barrier = 0;
    for (int i = 0; i < block.count; ++i)
      if (block.threads[i]->state == State::at_barrier) block.threads[i]->state = State::ready;
    return;
  }
  self->state = State::at_barrier;
  self->fiber.yield();
}

namespace {
struct Nothing {};
struct ShuffleLane {
  uint32_t value, result;
  int source;
};
struct LdmatrixLane {
  uint32_t* registers;
  const unsigned char* row;
  int matrices;
  bool transpose;
};
struct MmaLane {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

void run_ldmatrix(LdmatrixLane* const lanes[kWarp]) {
  ++total.ldmatrix;
  for (int m = 0; m < lanes[0]->matrices; ++m) {
    uint16_t matrix[8][8];
    for (int r = 0; r < 8; ++r) std::memcpy(matrix[r], lanes[m * 8 + r]->row, 16);
    for (int l = 0; l < kWarp; ++l) {
      const int g = l / 4, t = l % 4 * 2;
      const uint32_t lo = lanes[l]->transpose ? matrix[t][g] : matrix[g][t];
      const uint32_t hi = lanes[l]->transpose ? matrix[t + 1][g] : matrix[g][t + 1];
      lanes[l]->registers[m] = lo | hi << 16;
    }
  }
}

template <MmaKind K>
float element(uint32_t reg, int half) {
  if constexpr (K == MmaKind::tf32)
    return cpu::bits_to_float(reg & 0xffffe000u);  // the unit reads 19 bits
  else if constexpr (K == MmaKind::f16)
    return cpu::half_to_float(uint16_t(reg >> (16 * half)));
  else
    return cpu::bfloat_to_float(uint16_t(reg >> (16 * half)));
}

// Gathers A (16 x k) and B (k x 8) from the lanes' fragments, multiplies, and hands out D.
template <MmaKind K>
void run_mma(MmaLane* const lanes[kWarp]) {
  ++total.mma;
  constexpr int kDepth = K == MmaKind::tf32 ? 8 : 16, kPack = K == MmaKind::tf32 ? 1 : 2;
  float a[16][kDepth], b[kDepth][8];
  for (int l = 0; l < kWarp; ++l) {
    const int g = l / 4, t = l % 4;
    for (int half = 0; half < kPack; ++half) {
      for (int r = 0; r < 4; ++r)
        a[g + r % 2 * 8][t * kPack + half + r / 2 * (kDepth / 2)] = element<K>(lanes[l]->a[r], half);
      for (int r = 0; r < 2; ++r)
        b[t * kPack + half + r * (kDepth / 2)][g] = element<K>(lanes[l]->b[r], half);
    }
  }
  for (int l = 0; l < kWarp; ++l)
    for (int r = 0; r < 4; ++r) {
      const int row = l / 4 + r / 2 * 8, column = l % 4 * 2 + r % 2;
      float sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
      lanes[l]->d[r] += sum;
    }
}
}  // namespace

void warp_barrier() {
  Nothing nothing;
  collective<Nothing>("__syncwarp", &nothing, [](Nothing* const*) {});
}

uint32_t shuffle(uint32_t value, int source_lane) {
  ShuffleLane mine{value, 0, source_lane & (kWarp - 1)};
  collective<ShuffleLane>("__shfl_sync", &mine, [](ShuffleLane* const lanes[kWarp]) {
    for (int l = 0; l < kWarp; ++l) lanes[l]->result = lanes[lanes[l]->source]->value;
  });
  return mine.result;
}

void ldmatrix(uint32_t* registers, int matrices, bool transpose, const void* row) {
  const bool used = lane_id() < matrices * 8;
  if (used && reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix: a row is not aligned to 16 bytes");
  LdmatrixLane mine{registers, static_cast<const unsigned char*>(row), matrices, transpose};
  collective<LdmatrixLane>(transpose ? "ldmatrix.trans" : "ldmatrix", &mine, run_ldmatrix);
}

void mma(MmaKind kind, float* d, const uint32_t* a, const uint32_t* b) {
  MmaLane mine{d, a, b};
  if (kind == MmaKind::f16) return collective<MmaLane>("mma.f16", &mine, run_mma<MmaKind::f16>);
  if (kind == MmaKind::bf16) return collective<MmaLane>("mma.bf16", &mine, run_mma<MmaKind::bf16>);
  collective<MmaLane>("mma.tf32", &mine, run_mma<MmaKind::tf32>);
}

void copy_async(void* destination, const void* source, int bytes, int source_bytes) {
  if (reinterpret_cast<uintptr_t>(destination) % uintptr_t(bytes)) fail("cp.async: misaligned destination");
  if (source_bytes && reinterpret_cast<uintptr_t>(source) % uintptr_t(bytes))
    fail("cp.async: misaligned source");
  if (source_bytes < 0 || source_bytes > bytes) fail("cp.async: source size out of range");
  ++total.async_copies;
  std::memset(destination, 0xff, size_t(bytes));
  block.current->open_group.push_back({destination, source, bytes, source_bytes});
}

void commit_async() {
  Thread& t = *block.current;
  t.groups.push_back(std::move(t.open_group));
  t.open_group.clear();
}

void wait_async(int groups_left) {
  Thread& t = *block.current;
  for (; int(t.groups.size()) > groups_left; t.groups.pop_front()) land(t.groups.front());
}

}  // namespace lkconv::shim
