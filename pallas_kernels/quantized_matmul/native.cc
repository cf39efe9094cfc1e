// What XLA calls: reads shapes and pointers out of its buffers, and hands them on.
#include <algorithm>
#include <cstring>

#include "matmul.h"
#include "native/xla.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

// A layer of a stack: values [layers, rows, stored depth]; scale and minimum [layers, rows, groups],
// or nothing.
struct Stack {
  ffi::AnyBuffer values, scale, minimum;
};

// Of a row as it is stored.
int64_t RowBytes(const ffi::AnyBuffer& values) {
  return values.size_bytes() / (values.dimensions()[0] * values.dimensions()[1]);
}

const char* ReadMatrix(const Stack& stack, int64_t depth, int32_t layer, Matrix& matrix) {
  const auto shape = stack.values.dimensions();
  matrix.rows = shape[1];
  matrix.depth = depth;
  matrix.number = Number::kFloat32;
  switch (stack.values.element_type()) {
    case ffi::S8: matrix.format = Format::kInt8; break;
    case ffi::U8: matrix.format = Format::kInt4; break;
    default:
      matrix.format = Format::kNumber;
      if (!ReadNumber(stack.values, matrix.number)) {
        return "matmul: a matrix of this dtype is not implemented";
      }
  }
  matrix.values = stack.values.untyped_data();
  matrix.scale = static_cast<const uint16_t*>(stack.scale.untyped_data());
  matrix.minimum = static_cast<const uint16_t*>(stack.minimum.untyped_data());
  matrix = LayerOf(matrix, shape[0], layer);
  return nullptr;
}

ffi::Error NoFloat() {
  return ffi::Error::InvalidArgument("matmul: a dtype that is not a float of 16 or 32 bits");
}

// Reads a product, but for its answers.
ffi::Error ReadProduct(const ffi::AnyBuffer& x, const Stack& stack, int32_t layer, bool narrow,
                       Matmul& matmul) {
  matmul.narrow = narrow;
  matmul.x_rows = x.dimensions()[0];
  if (const char* reason = ReadMatrix(stack, x.dimensions()[1], layer, matmul.matrix)) {
    return ffi::Error::InvalidArgument(reason);
  }
  if (!ReadNumber(x, matmul.x_number)) return NoFloat();
  matmul.x = x.untyped_data();
  return ffi::Error::Success();
}

ffi::Error Run(const Matmul& matmul, ffi::ThreadPool threads) {
  const MatmulKernel& kernel = CurrentMatmulKernel();
  if (const char* reason = WhyNotMultiply(matmul, kernel)) {
    return ffi::Error::InvalidArgument(reason);
  }
  XlaExecutor executor(threads);
  RunMatmul(matmul, kernel, executor);
  return ffi::Error::Success();
}

ffi::Error MatmulHandler(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer values,
                         ffi::AnyBuffer scale, ffi::AnyBuffer minimum,
                         ffi::Buffer<ffi::S32, 0> layer, ffi::Result<ffi::AnyBuffer> out,
                         bool narrow) {
  Matmul matmul;
  const int32_t number = *layer.typed_data();
  ffi::Error error = ReadProduct(x, {values, scale, minimum}, number, narrow, matmul);
  if (error.failure()) return error;
  if (!ReadNumber(*out, matmul.out_number)) return NoFloat();
  matmul.out = out->untyped_data();
  return Run(matmul, threads);
}

// x's rows by group, each group's with a matrix of its own: values are [layers * groups, rows, stored
// depth]. Rows behind the last group give zeros, and sizes that no caller may give stay in bounds.
ffi::Error GroupedMatmulHandler(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer values,
                                ffi::AnyBuffer scale, ffi::AnyBuffer minimum,
                                ffi::Buffer<ffi::S32, 1> sizes, ffi::Buffer<ffi::S32, 0> layer,
                                ffi::Result<ffi::AnyBuffer> out, bool narrow) {
  Matmul matmul;
  ffi::Error error = ReadProduct(x, {values, scale, minimum}, 0, narrow, matmul);
  if (error.failure()) return error;
  if (!ReadNumber(*out, matmul.out_number)) return NoFloat();
  const MatmulKernel& kernel = CurrentMatmulKernel();
  if (const char* reason = WhyNotMultiply(matmul, kernel)) {
    return ffi::Error::InvalidArgument(reason);
  }
  XlaExecutor executor(threads);
  const Matrix first = matmul.matrix;
  const int64_t matrices = values.dimensions()[0], groups = sizes.dimensions()[0];
  const int64_t layers = matrices / std::max<int64_t>(groups, 1), rows = x.dimensions()[0];
  const int64_t start = std::clamp<int64_t>(*layer.typed_data(), 0, layers - 1) * groups;
  const int64_t x_bytes = first.depth * NumberBytes(matmul.x_number);
  const int64_t out_bytes = first.rows * NumberBytes(matmul.out_number);
  const auto* x_rows = static_cast<const char*>(x.untyped_data());
  auto* out_rows = static_cast<char*>(out->untyped_data());
  int64_t done = 0;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t size = std::clamp<int64_t>(sizes.typed_data()[group], 0, rows - done);
    if (size == 0) continue;
    matmul.matrix = LayerOf(first, matrices, start + group);
    matmul.x = x_rows + done * x_bytes;
    matmul.out = out_rows + done * out_bytes;
    matmul.x_rows = size;
    RunMatmul(matmul, kernel, executor);
    done += size;
  }
  std::memset(out_rows + done * out_bytes, 0, (rows - done) * out_bytes);
  return ffi::Error::Success();
}

// The best of the first `count` rows of the only matrix; of all if it has fewer.
ffi::Error BestHandler(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer values,
                       ffi::AnyBuffer scale, ffi::AnyBuffer minimum,
                       ffi::Buffer<ffi::S32, 0> count, ffi::ResultBuffer<ffi::F32> best,
                       ffi::ResultBuffer<ffi::S32> place, ffi::ResultBuffer<ffi::PRED> is_finite,
                       bool narrow) {
  Matmul matmul;
  ffi::Error error = ReadProduct(x, {values, scale, minimum}, 0, narrow, matmul);
  if (error.failure()) return error;
  matmul.matrix.rows = std::clamp<int64_t>(*count.typed_data(), 0, matmul.matrix.rows);
  matmul.out_number = Number::kFloat32;
  const Bests bests = {best->typed_data(), place->typed_data(), is_finite->typed_data()};
  matmul.bests = &bests;
  return Run(matmul, threads);
}

ffi::Error FeedForwardHandler(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer values,
                              ffi::AnyBuffer scale, ffi::AnyBuffer minimum,
                              ffi::AnyBuffer down_values, ffi::AnyBuffer down_scale,
                              ffi::AnyBuffer down_minimum, ffi::Buffer<ffi::S32, 0> layer,
                              ffi::Result<ffi::AnyBuffer> out, int32_t activation, bool narrow) {
  FeedForward f;
  f.narrow = narrow;
  f.activation = static_cast<Activation>(activation);
  f.x_rows = x.dimensions()[0];
  const Stack stacks[] = {{values, scale, minimum}, {down_values, down_scale, down_minimum}};
  const int32_t number = *layer.typed_data();
  if (activation != static_cast<int32_t>(Activation::kSilu) &&
      activation != static_cast<int32_t>(Activation::kGelu)) {
    return ffi::Error::InvalidArgument("feed-forward: an activation that is not implemented");
  }
  const char* reason = ReadMatrix(stacks[0], x.dimensions()[1], number, f.gate_up);
  if (!reason) reason = ReadMatrix(stacks[1], f.gate_up.rows / 2, number, f.down);
  if (!reason && f.down.row_bytes() != RowBytes(down_values)) {
    reason = "feed-forward: not half as many numbers for the second matrix as rows in the first";
  }
  if (reason) return ffi::Error::InvalidArgument(reason);
  if (!ReadNumber(x, f.x_number) || !ReadNumber(*out, f.out_number)) return NoFloat();
  f.x = x.untyped_data();
  f.out = out->untyped_data();
  const MatmulKernel& kernel = CurrentMatmulKernel();
  if (const char* why = WhyNotFeedForward(f, kernel)) return ffi::Error::InvalidArgument(why);
  XlaExecutor executor(threads);
  RunFeedForward(f, kernel, executor);
  return ffi::Error::Success();
}

auto MatmulBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()  // x
      .Arg<ffi::AnyBuffer>()  // values
      .Arg<ffi::AnyBuffer>()  // scale
      .Arg<ffi::AnyBuffer>()  // minimum
      .Arg<ffi::Buffer<ffi::S32, 0>>()  // layer
      .Ret<ffi::AnyBuffer>()
      .Attr<bool>("narrow");
}

auto GroupedMatmulBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()  // x
      .Arg<ffi::AnyBuffer>()  // values
      .Arg<ffi::AnyBuffer>()  // scale
      .Arg<ffi::AnyBuffer>()  // minimum
      .Arg<ffi::Buffer<ffi::S32, 1>>()  // sizes
      .Arg<ffi::Buffer<ffi::S32, 0>>()  // layer
      .Ret<ffi::AnyBuffer>()
      .Attr<bool>("narrow");
}

auto BestBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()  // x
      .Arg<ffi::AnyBuffer>()  // values
      .Arg<ffi::AnyBuffer>()  // scale
      .Arg<ffi::AnyBuffer>()  // minimum
      .Arg<ffi::Buffer<ffi::S32, 0>>()  // count
      .Ret<ffi::Buffer<ffi::F32>>()  // best
      .Ret<ffi::Buffer<ffi::S32>>()  // place
      .Ret<ffi::Buffer<ffi::PRED>>()  // is_finite
      .Attr<bool>("narrow");
}

auto FeedForwardBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()  // x
      .Arg<ffi::AnyBuffer>()  // values of the gate and what it gates
      .Arg<ffi::AnyBuffer>()  // scale
      .Arg<ffi::AnyBuffer>()  // minimum
      .Arg<ffi::AnyBuffer>()  // values of the second matrix
      .Arg<ffi::AnyBuffer>()  // scale
      .Arg<ffi::AnyBuffer>()  // minimum
      .Arg<ffi::Buffer<ffi::S32, 0>>()  // layer
      .Ret<ffi::AnyBuffer>()
      .Attr<int32_t>("activation")
      .Attr<bool>("narrow");
}

}  // namespace
}  // namespace jaxserve

JAXSERVE_FFI_HANDLER(jaxserve_matmul, jaxserve::MatmulHandler, jaxserve::MatmulBinding());
JAXSERVE_FFI_HANDLER(jaxserve_grouped_matmul, jaxserve::GroupedMatmulHandler,
                     jaxserve::GroupedMatmulBinding());
JAXSERVE_FFI_HANDLER(jaxserve_best, jaxserve::BestHandler, jaxserve::BestBinding());
JAXSERVE_FFI_HANDLER(jaxserve_feed_forward, jaxserve::FeedForwardHandler,
                     jaxserve::FeedForwardBinding());
