// What every family's FFI handlers share: XLA's threads as an Executor.
#pragma once

#include <functional>
#include <utility>

#include "number.h"
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

// False for a dtype that kernels do not read.
inline bool ReadNumber(const xla::ffi::AnyBuffer& buffer, Number& number) {
  switch (buffer.element_type()) {
    case xla::ffi::F32: number = Number::kFloat32; return true;
    case xla::ffi::BF16: number = Number::kBFloat16; return true;
    case xla::ffi::F16: number = Number::kFloat16; return true;
    default: return false;
  }
}

}  // namespace jaxserve

// Defines a handler under a name that the loader finds; the library hides every other one.
#define JAXSERVE_FFI_HANDLER(name, function, binding)                                   \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* name(                \
      XLA_FFI_CallFrame* call_frame);                                                   \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function, binding)
