// Float32 memory that a thread keeps from call to call.
#pragma once

#include <cstdint>
#include <vector>

namespace jaxserve {

// A cache line: no two threads' memory shares one, and vectors do not straddle them.
constexpr int64_t kAlignFloats = 16;

// The thread's memory, aligned; what was in it is not kept when it grows. Each Use has its own.
template <typename Use>
float* ThreadMemory(int64_t floats) {
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < floats + kAlignFloats) {
    memory.resize(floats + kAlignFloats);
  }
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (kAlignFloats - address / sizeof(float) % kAlignFloats);
}

}  // namespace jaxserve
