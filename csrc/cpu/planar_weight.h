// backward_weight along the rows of a plane, read in place.
#pragma once

#include "planar_weight_strided.h"
#include "planar_weight_sweep.h"

namespace lkconv::cpu::LKCONV_ISA {

#if LKCONV_AVX512

template <class Task>
void weight_planar_by(const WeightProblem& p, const Plan& plan, float* partial, int64_t task0,
                      int64_t task1) {
  const Task task(p, plan);
  for (int64_t i = task0; i < task1; ++i) task.run(partial, i);
}
template <class T>
void weight_planar_of(const WeightProblem& p, const Plan& plan, float* partial, int64_t task0,
                      int64_t task1) {
  (p.stride_w == 1 ? weight_planar_by<SweepWeightTask<T>>
                   : weight_planar_by<StridedWeightTask<T>>)(p, plan, partial, task0, task1);
}

// Task = (group of channels, split of the batch).
inline void weight_planar(const WeightProblem& p, const Plan& plan, float* partial, int64_t task0,
                          int64_t task1) {
  (p.input.dtype == DType::f32 ? weight_planar_of<float> : weight_planar_of<bf16>)(p, plan, partial, task0,
                                                                                   task1);
}

#endif

}  // namespace lkconv::cpu::LKCONV_ISA
