// What the parts of native_check.cc share: threads, arrays out of the file, numbers as they are
// stored.
#pragma once

#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <iostream>
#include <istream>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "native/isa.h"
#include "native/number.h"
#include "native/threads.h"

extern "C" void jaxserve_set_isa_limit(int level);

namespace jaxserve {

class Pool final : public Executor {
 public:
  explicit Pool(int threads) : size_(threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { Work(); });
  }
  ~Pool() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_closed_ = true;
    }
    ready_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }
  int64_t threads() const override { return size_; }
  void Schedule(std::function<void()> task) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    ready_.notify_one();
  }

 private:
  void Work() {
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        ready_.wait(lock, [this] { return is_closed_ || !tasks_.empty(); });
        if (tasks_.empty()) return;
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      task();
    }
  }

  const int64_t size_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<std::function<void()>> tasks_;
  bool is_closed_ = false;
};

template <typename T>
using Array = std::unique_ptr<T[]>;

template <typename T>
Array<T> Read(std::istream& file, size_t count) {
  Array<T> array(new T[count]);
  file.read(reinterpret_cast<char*>(array.get()), count * sizeof(T));
  return array;
}

// Runs work(x, out) on a copy of x and on fresh memory, both of which end where they should.
template <typename Work>
Array<char> Apart(const char* x, size_t x_bytes, size_t out_bytes, const Work& work) {
  Array<char> own(new char[x_bytes]), out(new char[out_bytes]);
  std::memcpy(own.get(), x, x_bytes);
  // What is not written shows: a NaN in every format.
  std::memset(out.get(), 0xff, out_bytes);
  work(own.get(), out.get());
  return out;
}

[[noreturn]] inline void Fail(const std::string& what) {
  std::cerr << "FAILED " << what << "\n";
  std::exit(1);
}

inline float AsFloat(const char* numbers, Number number, size_t i) {
  if (number == Number::kFloat32) {
    float value;
    std::memcpy(&value, numbers + 4 * i, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, numbers + 2 * i, 2);
  if (number == Number::kBFloat16) {
    const uint32_t bits = uint32_t{half} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const float size = exponent == 0 ? std::ldexp(float(fraction), -24)
                                   : std::ldexp(float(1024 + fraction), exponent - 25);
  return half >> 15 ? -size : size;
}

}  // namespace jaxserve
