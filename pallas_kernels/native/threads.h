// A parallel loop over somebody else's threads.
//
// The calling thread takes items like every other, and returns when each item is done. It waits for
// items that a helper has taken, never for a helper to start: several devices may share one pool
// whose threads all stand in such a loop, so a helper may start after the loop has ended, or never.
// One that starts late finds no item left and touches nothing of the caller's.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

namespace jaxserve {

// Threads that run tasks: XLA's intra-op pool (xla.h), or a test's own.
class Executor {
 public:
  virtual ~Executor() = default;
  // Threads that could run side by side, the caller's among them.
  virtual int64_t threads() const = 0;
  // Runs the task some time, on any thread.
  virtual void Schedule(std::function<void()> task) = 0;
};

namespace internal {

// Makes denormal numbers zero while it lives, so that an answer does not depend on which thread
// computed it: XLA sets this on its own threads, and others run tasks, too.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before_ | 0x8040); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(before_); }

 private:
  const unsigned before_;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};

class Loop {
 public:
  Loop(int64_t items, const std::function<void(int64_t)>* body) : items_(items), body_(body) {}

  // Takes items until there are none left.
  void Work() {
    const FlushDenormals flush;
    int64_t done = 0;
    for (;;) {
      // Acquired, so that a helper sees what the caller wrote before the loop.
      const int64_t item = next_.fetch_add(1, std::memory_order_acq_rel);
      if (item >= items_) break;
      (*body_)(item);
      ++done;
    }
    if (done == 0) return;
    if (done_.fetch_add(done, std::memory_order_acq_rel) + done == items_) {
      std::lock_guard<std::mutex> lock(mutex_);
      finished_.notify_all();
    }
  }

  void Wait() {
    // The last items of a loop end within microseconds of each other: a sleep would cost more.
    for (int turn = 0; turn < kSpins; ++turn) {
      if (IsDone()) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [this] { return IsDone(); });
  }

 private:
  static constexpr int kSpins = 2000;

  bool IsDone() const { return done_.load(std::memory_order_acquire) == items_; }

  const int64_t items_;
  // The caller's, which outlives every item but not this object.
  const std::function<void(int64_t)>* const body_;
  std::atomic<int64_t> next_{0};
  std::atomic<int64_t> done_{0};
  std::mutex mutex_;
  std::condition_variable finished_;
};

}  // namespace internal

// Runs body(0) to body(items - 1), each once, in order on this thread: for work that is done before
// another thread has woken up.
inline void SerialFor(int64_t items, const std::function<void(int64_t)>& body) {
  const internal::FlushDenormals flush;
  for (int64_t item = 0; item < items; ++item) body(item);
}

// Runs body(0) to body(items - 1), each once, in any order and on any threads.
inline void ParallelFor(Executor& executor, int64_t items,
                        const std::function<void(int64_t)>& body) {
  int64_t helpers = executor.threads() - 1;
  if (helpers > items - 1) helpers = items - 1;
  if (helpers <= 0) return SerialFor(items, body);
  auto loop = std::make_shared<internal::Loop>(items, &body);
  for (int64_t helper = 0; helper < helpers; ++helper) {
    executor.Schedule([loop] { loop->Work(); });
  }
  loop->Work();
  loop->Wait();
}

}  // namespace jaxserve
