// Small kernels around the Group-Mix kernels: parameters of any type into one array, BatchNorm as scale and
// shift, sums over splits.
#pragma once

#include "group_mix_common.cuh"

namespace lkconv::cuda {

// kPackBlocks blocks a job.
template <class A>
__global__ void __launch_bounds__(kTokenThreads)
    pack_parameters(const __grid_constant__ PackParametersParams p) {
  const PackJob& job = p.jobs[blockIdx.x / kPackBlocks];
  A* out = static_cast<A*>(p.out) + job.to;
  const int first = int(blockIdx.x % kPackBlocks) * kTokenThreads + int(threadIdx.x);
  for (int i = first; i < job.count; i += kPackBlocks * kTokenThreads) {
    if (job.dtype == 0)
      out[i] = A(read<double>(job.from, i));
    else if (job.dtype == 1)
      out[i] = A(read<float>(job.from, i));
    else if (job.dtype == 2)
      out[i] = A(read<Half>(job.from, i));
    else
      out[i] = A(read<BFloat>(job.from, i));
  }
}

// dU = scale * (dA - mean(dA) - U^ mean(dA U^)) with U^ = (U - mean) / sigma, written as scale * dA + slope *
// U + offset; with fixed statistics slope and offset are zero.
template <class A>
__global__ void __launch_bounds__(kTokenThreads) fold_norms(const __grid_constant__ FoldNormsParams p) {
  const int c = int(blockIdx.x) * kTokenThreads + int(threadIdx.x);
  if (c >= p.channels) return;
  const double mean = double(read<A>(p.mean, c)), var = double(read<A>(p.var, c));
  const double inverse = 1 / square_root(var + p.eps), scale = double(read<A>(p.weight, c)) * inverse;
  double slope = 0, offset = 0;
  if (p.sums) {
    const double per_sigma = p.sums[p.channels + c] / p.count * inverse;
    slope = -scale * per_sigma;
    offset = scale * (per_sigma * mean - p.sums[c] / p.count);
  }
  A* out = static_cast<A*>(p.out) + c;
  out[kScale * p.channels] = A(scale);
  out[kShift * p.channels] = A(double(read<A>(p.bias, c)) - mean * scale);
  out[kSlope * p.channels] = A(slope);
  out[kOffset * p.channels] = A(offset);
  out[kMean * p.channels] = A(mean);
  out[kInverse * p.channels] = A(inverse);
}

// Columns of 32 elements a block; row r of threads adds splits r, r + 8, ..., and the rows are added in
// order.
template <class A>
__global__ void __launch_bounds__(kTokenThreads) reduce_sums(const __grid_constant__ ReduceSumsParams p) {
  double* rows = reinterpret_cast<double*>(dynamic_shared());
  int which = 0;
  while (which + 1 < p.count && p.jobs[which + 1].first_block <= int(blockIdx.x)) ++which;
  const ReduceJob& job = p.jobs[which];
  const int lane = int(threadIdx.x) % kLanes, row = int(threadIdx.x) / kLanes;
  const int i = (int(blockIdx.x) - job.first_block) * kLanes + lane;
  double sum = 0;
  if (i < job.count)
#pragma unroll 4
    for (int s = row; s < job.splits; s += kLaneRows)
      sum += double(read<A>(job.partial, int64_t(s) * job.count + i));
  rows[threadIdx.x] = sum;
  sync_block();
  if (row != 0 || i >= job.count) return;
  for (int r = 1; r < kLaneRows; ++r) sum += rows[r * kLanes + lane];
  if (job.wide)
    static_cast<double*>(job.out)[i] = sum;
  else
    static_cast<A*>(job.out)[i] = A(sum);
}

}  // namespace lkconv::cuda
