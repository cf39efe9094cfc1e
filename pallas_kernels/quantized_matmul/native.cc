// What XLA calls: reads shapes and pointers out of its buffers, and hands them on.
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

const char* ReadMatrix(const Stack& stack, int64_t depth, const ffi::Buffer<ffi::S32, 0>& layer,
                       Matrix& matrix) {
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
  matrix = LayerOf(matrix, shape[0], *layer.typed_data());
  return nullptr;
}

constexpr char kNoFloat[] = "matmul: a dtype that is not a float of 16 or 32 bits";

ffi::Error MatmulHandler(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer values,
                         ffi::AnyBuffer scale, ffi::AnyBuffer minimum,
                         ffi::Buffer<ffi::S32, 0> layer, ffi::Result<ffi::AnyBuffer> out,
                         bool narrow) {
  Matmul matmul;
  matmul.narrow = narrow;
  matmul.x_rows = x.dimensions()[0];
  const Stack stack = {values, scale, minimum};
  if (const char* reason = ReadMatrix(stack, x.dimensions()[1], layer, matmul.matrix)) {
    return ffi::Error::InvalidArgument(reason);
  }
  if (!ReadNumber(x, matmul.x_number) || !ReadNumber(*out, matmul.out_number)) {
    return ffi::Error::InvalidArgument(kNoFloat);
  }
  matmul.x = x.untyped_data();
  matmul.out = out->untyped_data();
  const MatmulKernel& kernel = CurrentMatmulKernel();
  if (const char* reason = WhyNotMultiply(matmul, kernel)) {
    return ffi::Error::InvalidArgument(reason);
  }
  XlaExecutor executor(threads);
  RunMatmul(matmul, kernel, executor);
  return ffi::Error::Success();
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
  const char* reason = ReadMatrix(stacks[0], x.dimensions()[1], layer, f.gate_up);
  if (!reason) reason = ReadMatrix(stacks[1], f.gate_up.rows / 2, layer, f.down);
  if (reason) return ffi::Error::InvalidArgument(reason);
  if (!ReadNumber(x, f.x_number) || !ReadNumber(*out, f.out_number)) {
    return ffi::Error::InvalidArgument(kNoFloat);
  }
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
JAXSERVE_FFI_HANDLER(jaxserve_feed_forward, jaxserve::FeedForwardHandler,
                     jaxserve::FeedForwardBinding());
