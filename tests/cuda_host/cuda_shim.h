// Runs CUDA kernels on the CPU: what csrc/cuda/device.cuh needs from a compiler that is not nvcc.
//
// A block's threads are fibers on one OS thread. A fiber runs until it meets a barrier or a warp-wide
// instruction, so the order of threads between two such points is the scheduler's choice: forward, reverse or
// random. A kernel that lacks a barrier gives different results in different orders. Warp-wide instructions
// (shuffles, ldmatrix, mma) run once all 32 lanes have arrived, on the real fragment layouts. An asynchronous
// copy poisons its destination when it is issued and lands only at its wait. Dynamic shared memory is a heap
// block of exactly the requested size, filled with NaN patterns, so AddressSanitizer sees every overrun.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "cpu/half.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace lkconv::shim {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

enum class Order { forward, reverse, random };

struct Schedule {
  Order order = Order::forward;
  uint64_t seed = 1;
};

// Runs body() once per thread of the grid. Throws std::runtime_error when threads diverge at a barrier or a
// warp-wide instruction, when an address is misaligned, or when a copy is never waited for.
void run_grid(Dim3 grid, Dim3 block, size_t shared_bytes, const Schedule& schedule,
              const std::function<void()>& body);

// Counts of the last grids since reset_counts().
struct Counts {
  uint64_t mma = 0, ldmatrix = 0, async_copies = 0, barriers = 0, blocks = 0;
};
Counts& counts();

unsigned char* dynamic_shared_memory();
void barrier();
void warp_barrier();

uint32_t shuffle(uint32_t value, int source_lane);
int lane_id();
void ldmatrix(uint32_t* registers, int matrices, bool transpose, const void* row);

enum class MmaKind { f16, bf16, tf32 };
void mma(MmaKind kind, float* d, const uint32_t* a, const uint32_t* b);

void copy_async(void* destination, const void* source, int bytes, int source_bytes);
void commit_async();
void wait_async(int groups_left);

}  // namespace lkconv::shim

extern lkconv::shim::Dim3 threadIdx, blockIdx, blockDim, gridDim;
