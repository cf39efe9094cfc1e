// What XLA calls: reads shapes and pointers out of its buffers, and hands them on.
#include "append.h"
#include "attention.h"
#include "native/xla.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;
using Int32Rows = ffi::Buffer<ffi::S32, 1>;
using Int32Table = ffi::Buffer<ffi::S32, 2>;
using Int32Scalar = ffi::Buffer<ffi::S32, 0>;

PoolShape ReadPoolShape(const ffi::AnyBuffer& pool, int64_t pages) {
  const auto shape = pool.dimensions();
  return {shape[0] / pages, pages, shape[1], shape[2], shape[3]};
}

Rows ReadRows(const Int32Table& table, const Int32Rows& start, const Int32Rows& length,
              int64_t query_tokens) {
  const auto shape = table.dimensions();
  return {shape[0],           query_tokens,       shape[1],
          table.typed_data(), start.typed_data(), length.typed_data()};
}

// A layer that the pool does not have becomes the nearest one, as in a clamped XLA gather.
int64_t ReadLayer(const Int32Scalar& layer, const PoolShape& pool) {
  const int64_t number = *layer.typed_data();
  return number < 0 ? 0 : number < pool.layers ? number : pool.layers - 1;
}

ffi::Error AppendHandler(ffi::ThreadPool threads, ffi::AnyBuffer k_pool, ffi::AnyBuffer v_pool,
                         ffi::AnyBuffer k, ffi::AnyBuffer v, Int32Table table, Int32Rows start,
                         Int32Rows length, Int32Scalar layer, ffi::Result<ffi::AnyBuffer> k_out,
                         ffi::Result<ffi::AnyBuffer> v_out, int64_t pages) {
  if (k_out->untyped_data() != k_pool.untyped_data() ||
      v_out->untyped_data() != v_pool.untyped_data()) {
    return ffi::Error::Internal("append: the results do not alias the pools");
  }
  Append append;
  append.pool = ReadPoolShape(k_pool, pages);
  append.rows = ReadRows(table, start, length, k.dimensions()[1]);
  append.layer = ReadLayer(layer, append.pool);
  append.item_bytes = ffi::ByteWidth(k_pool.element_type());
  append.pools[0] = static_cast<char*>(k_out->untyped_data());
  append.pools[1] = static_cast<char*>(v_out->untyped_data());
  append.fresh[0] = static_cast<const char*>(k.untyped_data());
  append.fresh[1] = static_cast<const char*>(v.untyped_data());
  XlaExecutor executor(threads);
  RunAppend(append, executor);
  return ffi::Error::Success();
}

ffi::Error AttendHandler(ffi::ThreadPool threads, ffi::AnyBuffer q, ffi::AnyBuffer k_pool,
                         ffi::AnyBuffer v_pool, Int32Table table, Int32Rows start,
                         Int32Rows length, Int32Scalar layer, Int32Scalar window,
                         ffi::Result<ffi::AnyBuffer> out, int64_t pages, float scale,
                         float softcap) {
  Attention attention;
  if (!ReadNumber(q, attention.q_number) || !ReadNumber(k_pool, attention.pool_number)) {
    return ffi::Error::InvalidArgument("paged_attention: a dtype that is not a float of 16 or 32");
  }
  attention.pool = ReadPoolShape(k_pool, pages);
  attention.rows = ReadRows(table, start, length, q.dimensions()[1]);
  attention.layer = ReadLayer(layer, attention.pool);
  attention.q_heads = q.dimensions()[2];
  attention.k_pool = k_pool.untyped_data();
  attention.v_pool = v_pool.untyped_data();
  attention.q = q.untyped_data();
  attention.out = out->untyped_data();
  attention.scale = scale;
  attention.softcap = softcap;
  attention.window = *window.typed_data();
  const Kernel& kernel = CurrentKernel();
  if (const char* reason = WhyNotAttend(attention, kernel)) {
    return ffi::Error::InvalidArgument(reason);
  }
  XlaExecutor executor(threads);
  RunAttention(attention, kernel, executor);
  return ffi::Error::Success();
}

auto AppendBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()  // k_pool
      .Arg<ffi::AnyBuffer>()  // v_pool
      .Arg<ffi::AnyBuffer>()  // k
      .Arg<ffi::AnyBuffer>()  // v
      .Arg<Int32Table>()
      .Arg<Int32Rows>()    // start
      .Arg<Int32Rows>()    // length
      .Arg<Int32Scalar>()  // layer
      .Ret<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Attr<int64_t>("pages");
}

auto AttendBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()  // q
      .Arg<ffi::AnyBuffer>()  // k_pool
      .Arg<ffi::AnyBuffer>()  // v_pool
      .Arg<Int32Table>()
      .Arg<Int32Rows>()    // start
      .Arg<Int32Rows>()    // length
      .Arg<Int32Scalar>()  // layer
      .Arg<Int32Scalar>()  // window
      .Ret<ffi::AnyBuffer>()
      .Attr<int64_t>("pages")
      .Attr<float>("scale")
      .Attr<float>("softcap");
}

}  // namespace
}  // namespace jaxserve

JAXSERVE_FFI_HANDLER(jaxserve_append, jaxserve::AppendHandler, jaxserve::AppendBinding());
JAXSERVE_FFI_HANDLER(jaxserve_paged_attention, jaxserve::AttendHandler, jaxserve::AttendBinding());
