// Launches kernels on the emulator, and the words of a case: what the drivers share.
#pragma once

#include <cstring>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/planner.h"
#include "cuda_shim.h"

namespace lkconv::cuda {

using Words = std::map<std::string, std::string>;

inline std::vector<int64_t> numbers(const std::string& text) {
  std::vector<int64_t> out;
  std::stringstream s(text);
  for (std::string part; std::getline(s, part, ',');) out.push_back(std::stoll(part));
  return out;
}

inline Words words_of(const std::string& line, Words words) {
  std::stringstream s(line);
  for (std::string word; s >> word;) {
    const size_t eq = word.find('=');
    words[word.substr(0, eq)] = word.substr(eq + 1);
  }
  return words;
}

inline DType dtype_named(const std::string& name) {
  return name == "f64" ? DType::f64 : name == "f16" ? DType::f16 : name == "bf16" ? DType::bf16 : DType::f32;
}

struct Executor {
  shim::Schedule schedule;
  Machine description;
  std::vector<std::unique_ptr<unsigned char[]>> memory;
  std::string launched;

  // order, seed, sms and shared of a case
  explicit Executor(Words& words) {
    const std::string order = words["order"];
    schedule.order = order == "reverse"  ? shim::Order::reverse
                     : order == "random" ? shim::Order::random
                                         : shim::Order::forward;
    schedule.seed = std::stoull(words["seed"]);
    description.sms = std::stoll(words["sms"]);
    description.shared_per_block = std::stoll(words["shared"]);
  }

  Machine machine() const { return description; }

  // Exactly as many bytes as asked for, full of NaN.
  void* workspace(int64_t bytes) {
    memory.push_back(std::make_unique<unsigned char[]>(size_t(bytes)));
    std::memset(memory.back().get(), 0xff, size_t(bytes));
    return memory.back().get();
  }

  template <class P>
  void launch(const char* name, Kernel<P> kernel, const LaunchShape& s, const P& params) {
    if (!kernel) throw std::runtime_error(std::string("no kernel ") + name);
    if (s.blocks > INT32_MAX || s.shared_bytes > description.shared_per_block)
      throw std::runtime_error(std::string(name) + ": launch is too large");
    launched += (launched.empty() ? "" : " ") + std::string(name);
    shim::run_grid({unsigned(s.blocks), 1, 1}, {unsigned(s.threads), 1, 1}, size_t(s.shared_bytes), schedule,
                   [&] { kernel(params); });
  }
};

}  // namespace lkconv::cuda
