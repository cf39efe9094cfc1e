// What XLA calls: reads shapes and pointers out of its buffers, and hands them on.
#include <algorithm>

#include "append.h"
#include "attention.h"
#include "native/xla.h"
#include "rotate.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;
using Int32Rows = ffi::Buffer<ffi::S32, 1>;
using Int32Table = ffi::Buffer<ffi::S32, 2>;
using Int32Scalar = ffi::Buffer<ffi::S32, 0>;

PoolShape ReadPoolShape(const ffi::AnyBuffer& pool, int64_t pages, Scaled scaled) {
  const auto shape = pool.dimensions();
  const int64_t head_dim = shape[3] * (scaled == Scaled::kInt4 ? 2 : 1);
  return {shape[0] / pages, pages, shape[1], shape[2], head_dim};
}

// Without numbers in `first` every row has places of its own.
Rows ReadRows(const Int32Table& table, const Int32Rows& start, const Int32Rows& length,
              const Int32Rows& first, int64_t query_tokens) {
  const auto shape = table.dimensions();
  return {shape[0],
          query_tokens,
          shape[1],
          table.typed_data(),
          start.typed_data(),
          length.typed_data(),
          first.element_count() > 0 ? first.typed_data() : nullptr};
}

// A layer that the pool does not have becomes the nearest one, as in a clamped XLA gather.
int64_t ReadLayer(const Int32Scalar& layer, const PoolShape& pool) {
  const int64_t number = *layer.typed_data();
  return number < 0 ? 0 : number < pool.layers ? number : pool.layers - 1;
}

// The scales of pages: bfloat16 for each token, keys' and then values', as a call's last arguments.
// Pages of floats have none.
struct Scales {
  Scaled scaled = Scaled::kNone;
  const uint16_t* k = nullptr;
  const uint16_t* v = nullptr;
};

bool IsScale(const ffi::AnyBuffer& scale, const ffi::AnyBuffer& pool) {
  return scale.element_type() == ffi::BF16 &&
         scale.element_count() * pool.dimensions()[3] == pool.element_count();
}

Scaled ReadScaled(const ffi::AnyBuffer& pool) {
  switch (pool.element_type()) {
    case ffi::S8: return Scaled::kInt8;
    case ffi::F8E4M3FN: return Scaled::kFp8;
    case ffi::U8: return Scaled::kInt4;
    default: return Scaled::kNone;
  }
}

// Null pointers when the pool holds floats; false when it does not and its scales are not there.
bool ReadScales(const ffi::AnyBuffer& pool, ffi::RemainingArgs more, Scales& out) {
  out.scaled = ReadScaled(pool);
  if (out.scaled == Scaled::kNone) return more.size() == 0;
  if (more.size() != 2) return false;
  const auto k = more.get<ffi::AnyBuffer>(0), v = more.get<ffi::AnyBuffer>(1);
  if (!k || !v || !IsScale(*k, pool) || !IsScale(*v, pool)) return false;
  out.k = static_cast<const uint16_t*>(k->untyped_data());
  out.v = static_cast<const uint16_t*>(v->untyped_data());
  return true;
}

bool AliasScales(const Scales& in, ffi::RemainingRets more, uint16_t* (&out)[2]) {
  if (in.k == nullptr) return more.size() == 0;
  if (more.size() != 2) return false;
  const auto k = more.get<ffi::AnyBuffer>(0), v = more.get<ffi::AnyBuffer>(1);
  if (!k || !v || (*k)->untyped_data() != in.k || (*v)->untyped_data() != in.v) return false;
  out[0] = static_cast<uint16_t*>((*k)->untyped_data());
  out[1] = static_cast<uint16_t*>((*v)->untyped_data());
  return true;
}

bool AreAlike(const ffi::AnyBuffer& left, const ffi::AnyBuffer& right) {
  const auto ours = left.dimensions(), theirs = right.dimensions();
  return left.element_type() == right.element_type() && ours.size() == theirs.size() &&
         std::equal(ours.begin(), ours.end(), theirs.begin());
}

// Whether both pools are whole layers of pages, alike.
bool ArePools(const ffi::AnyBuffer& k, const ffi::AnyBuffer& v, int64_t pages) {
  const auto shape = k.dimensions();
  return AreAlike(k, v) && shape.size() == 4 && pages > 0 && shape[0] > 0 &&
         shape[0] % pages == 0 && shape[1] > 0;
}

// Whether each row of the table has a number in what else says where its tokens are.
bool AreOfRows(const Int32Table& table, const Int32Rows& start, const Int32Rows& length,
               const Int32Rows& first) {
  const size_t rows = table.dimensions()[0], firsts = first.element_count();
  return start.element_count() == rows && length.element_count() == rows &&
         (firsts == 0 || firsts == rows);
}

// Whether heads are [rows, places, heads, head_dim], or with `first` [1, places, heads, head_dim].
bool AreHeads(const ffi::AnyBuffer& heads, const Int32Table& table, const Int32Rows& first,
              const PoolShape& pool) {
  const auto shape = heads.dimensions();
  if (shape.size() != 4 || shape[3] != pool.head_dim) return false;
  return shape[0] == (first.element_count() > 0 ? 1 : table.dimensions()[0]);
}

ffi::Error AppendHandler(ffi::ThreadPool threads, ffi::AnyBuffer k_pool, ffi::AnyBuffer v_pool,
                         ffi::AnyBuffer k, ffi::AnyBuffer v, Int32Table table, Int32Rows start,
                         Int32Rows length, Int32Rows first, Int32Scalar layer,
                         ffi::RemainingArgs scales_in, ffi::Result<ffi::AnyBuffer> k_out,
                         ffi::Result<ffi::AnyBuffer> v_out, ffi::RemainingRets scales_out,
                         int64_t pages) {
  if (k_out->untyped_data() != k_pool.untyped_data() ||
      v_out->untyped_data() != v_pool.untyped_data()) {
    return ffi::Error::Internal("append: the results do not alias the pools");
  }
  // What is read here by its shape would be read past its end if it had another: Python has checked
  // the same with better words, unless it is not what calls.
  if (!ArePools(k_pool, v_pool, pages) || !AreOfRows(table, start, length, first)) {
    return ffi::Error::InvalidArgument("append: pools, or rows, that do not belong together");
  }
  Append append;
  Scales scales;
  if (!ReadScales(k_pool, scales_in, scales) || !AliasScales(scales, scales_out, append.scales) ||
      (scales.k != nullptr && k.element_type() != ffi::F32)) {
    return ffi::Error::Internal("append: pages of 8 or 4 bits need scales, aliased, and float32 numbers");
  }
  append.scaled = scales.scaled;
  append.pool = ReadPoolShape(k_pool, pages, scales.scaled);
  if (!AreAlike(k, v) || !AreHeads(k, table, first, append.pool) ||
      k.dimensions()[2] != append.pool.kv_heads ||
      (scales.k == nullptr && k.element_type() != k_pool.element_type())) {
    return ffi::Error::InvalidArgument("append: keys and values that are not of the pool's cells");
  }
  append.rows = ReadRows(table, start, length, first, k.dimensions()[1]);
  append.layer = ReadLayer(layer, append.pool);
  append.item_bytes = ffi::ByteWidth(k.element_type());
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
                         Int32Rows length, Int32Rows first, Int32Scalar layer,
                         Int32Scalar window,
                         ffi::RemainingArgs scales_in, ffi::Result<ffi::AnyBuffer> out,
                         int64_t pages, float scale, float softcap, bool narrow) {
  if (!ArePools(k_pool, v_pool, pages) || !AreOfRows(table, start, length, first)) {
    return ffi::Error::InvalidArgument(
        "paged_attention: pools, or rows, that do not belong together");
  }
  Attention attention;
  Scales scales;
  if (!ReadScales(k_pool, scales_in, scales)) {
    return ffi::Error::InvalidArgument("paged_attention: pages of 8 and 4 bits, and no others, have scales");
  }
  attention.pool_number = Number::kFloat32;  // Of scaled pages nobody asks.
  if (!ReadNumber(q, attention.q_number) ||
      (scales.k == nullptr && !ReadNumber(k_pool, attention.pool_number))) {
    return ffi::Error::InvalidArgument("paged_attention: a dtype that is not a float of 16 or 32");
  }
  attention.scaled = scales.scaled;
  attention.k_scale = scales.k;
  attention.v_scale = scales.v;
  attention.pool = ReadPoolShape(k_pool, pages, scales.scaled);
  if (!AreHeads(q, table, first, attention.pool) || !AreAlike(q, *out)) {
    return ffi::Error::InvalidArgument("paged_attention: queries that are not of the pool's cells");
  }
  attention.rows = ReadRows(table, start, length, first, q.dimensions()[1]);
  attention.layer = ReadLayer(layer, attention.pool);
  attention.q_heads = q.dimensions()[2];
  attention.k_pool = k_pool.untyped_data();
  attention.v_pool = v_pool.untyped_data();
  attention.q = q.untyped_data();
  attention.out = out->untyped_data();
  attention.scale = scale;
  attention.softcap = softcap;
  attention.narrow = narrow;
  attention.window = *window.typed_data();
  const Kernel& kernel = CurrentKernel();
  if (const char* reason = WhyNotAttend(attention, kernel)) {
    return ffi::Error::InvalidArgument(reason);
  }
  XlaExecutor executor(threads);
  RunAttention(attention, kernel, executor);
  return ffi::Error::Success();
}

ffi::Error RotateHandler(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> numbers,
                         ffi::Result<ffi::Buffer<ffi::F32>> out) {
  const int64_t head_dim = numbers.dimensions().back();
  if (head_dim < 1 || head_dim > kMostRotated) {
    return ffi::Error::InvalidArgument("rotate: a head_dim that there is no room for");
  }
  XlaExecutor executor(threads);
  RunRotate(numbers.typed_data(), numbers.element_count() / head_dim, head_dim, out->typed_data(),
            executor);
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
      .Arg<Int32Rows>()    // first
      .Arg<Int32Scalar>()  // layer
      .RemainingArgs()     // scales of keys and of values
      .Ret<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .RemainingRets()
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
      .Arg<Int32Rows>()    // first
      .Arg<Int32Scalar>()  // layer
      .Arg<Int32Scalar>()  // window
      .RemainingArgs()     // scales of keys and of values
      .Ret<ffi::AnyBuffer>()
      .Attr<int64_t>("pages")
      .Attr<float>("scale")
      .Attr<float>("softcap")
      .Attr<bool>("narrow");
}

auto RotateBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::Buffer<ffi::F32>>()   // numbers
      .Ret<ffi::Buffer<ffi::F32>>();
}

}  // namespace
}  // namespace jaxserve

JAXSERVE_FFI_HANDLER(jaxserve_append, jaxserve::AppendHandler, jaxserve::AppendBinding());
JAXSERVE_FFI_HANDLER(jaxserve_paged_attention, jaxserve::AttendHandler, jaxserve::AttendBinding());
JAXSERVE_FFI_HANDLER(jaxserve_rotate, jaxserve::RotateHandler, jaxserve::RotateBinding());
