// What XLA calls: reads shapes and pointers out of its buffers, and hands them on.
#include "matmul.h"
#include "native/xla.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

// values [layers, rows, stored depth]; scale and minimum [layers, rows, groups], or nothing.
ffi::Error MatmulHandler(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer values,
                         ffi::AnyBuffer scale, ffi::AnyBuffer minimum,
                         ffi::Buffer<ffi::S32, 0> layer, ffi::Result<ffi::AnyBuffer> out,
                         bool narrow) {
  Matmul matmul;
  matmul.narrow = narrow;
  Matrix& matrix = matmul.matrix;
  const auto shape = values.dimensions();
  matmul.x_rows = x.dimensions()[0];
  matrix.rows = shape[1];
  matrix.depth = x.dimensions()[1];
  matrix.number = Number::kFloat32;
  switch (values.element_type()) {
    case ffi::S8: matrix.format = Format::kInt8; break;
    case ffi::U8: matrix.format = Format::kInt4; break;
    default:
      matrix.format = Format::kNumber;
      if (!ReadNumber(values, matrix.number)) {
        return ffi::Error::InvalidArgument("matmul: a matrix of this dtype is not implemented");
      }
  }
  if (!ReadNumber(x, matmul.x_number) || !ReadNumber(*out, matmul.out_number)) {
    return ffi::Error::InvalidArgument("matmul: a dtype that is not a float of 16 or 32 bits");
  }
  matrix.values = values.untyped_data();
  matrix.scale = static_cast<const uint16_t*>(scale.untyped_data());
  matrix.minimum = static_cast<const uint16_t*>(minimum.untyped_data());
  matrix = LayerOf(matrix, shape[0], *layer.typed_data());
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

}  // namespace
}  // namespace jaxserve

JAXSERVE_FFI_HANDLER(jaxserve_matmul, jaxserve::MatmulHandler, jaxserve::MatmulBinding());
