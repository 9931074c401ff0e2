// What the ops on the CPU share: torch's threads and this machine.
#pragma once

#include <functional>
#include <vector>

#include "../op_arguments.h"
#include "machine.h"

namespace lkconv::cpu {

inline void parallel(int64_t tasks, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (tasks <= grain) return body(0, tasks);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t a, int64_t b) { body(a, b); });
}

inline Machine machine() { return machine_for(active_isa(), torch::stable::get_num_threads()); }

}  // namespace lkconv::cpu
