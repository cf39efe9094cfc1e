// What every family's FFI handlers share: XLA's threads as an Executor.
#pragma once

#include <functional>
#include <utility>

#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jaxserve {

class XlaExecutor final : public Executor {
 public:
  explicit XlaExecutor(xla::ffi::ThreadPool pool) : pool_(pool), threads_(pool.num_threads()) {}

  int64_t threads() const override { return threads_; }
  void Schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  xla::ffi::ThreadPool pool_;
  int64_t threads_;
};

}  // namespace jaxserve

// Defines a handler under a name that the loader finds; the library hides every other one.
#define JAXSERVE_FFI_HANDLER(name, function, binding)                                   \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* name(                \
      XLA_FFI_CallFrame* call_frame);                                                   \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function, binding)
