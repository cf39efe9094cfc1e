#include "append.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace jaxserve {
namespace {

constexpr int64_t kTileTokens = 64;
// What one thread copies faster than another one wakes up.
constexpr int64_t kAloneBytes = 128 * 1024;

// Below it a cell is zeros: no number of the format is then too small for a float32.
constexpr float kLeast = 1e-30f;

float FromBits(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

uint32_t ToBits(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return bits;
}

// To bfloat16, ties to even.
uint16_t Round(float number) {
  const uint32_t bits = ToBits(number);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The nearest whole number, ties to even, in the low bits.
int32_t Nearest(float number) { return static_cast<int32_t>(ToBits(number + 12582912.0f)); }

// The nearest number of float8_e4m3fn, ties to even, of one below 464.
uint8_t ToFp8(float number) {
  const uint32_t bits = ToBits(number), size = bits & 0x7fffffffu;
  // Below the format's normals, whose exponent is -6, numbers are so many 512ths.
  const uint32_t small = Nearest(FromBits(size) * 512.0f) & 15;
  const uint32_t normal = ((size + 0x7ffff + ((size >> 20) & 1)) >> 20) - (120 << 3);
  return static_cast<uint8_t>(bits >> 24 & 0x80) | (size < (121u << 23) ? small : normal);
}

// The nearest of -8 to 7: what has nearly the size of -8 is 7 at the other end.
int32_t ToInt4(float number) {
  const int32_t whole = static_cast<int32_t>(ToBits(number + 12582912.0f) & 0x7fffff) - (1 << 22);
  return std::min(std::max(whole, -8), 7);
}

// Writes what is new of one token and head, number `cell` of the pool and `source` of what is new.
void WriteCell(const Append& a, int which, int64_t cell, int64_t source) {
  const int64_t head_dim = a.pool.head_dim, fresh_bytes = head_dim * a.item_bytes;
  const char* fresh = a.fresh[which] + source * fresh_bytes;
  if (a.scaled == Scaled::kNone) {
    std::memcpy(a.pools[which] + cell * fresh_bytes, fresh, fresh_bytes);
  } else {
    const int64_t cell_bytes = PageBytes(a.scaled, Number::kFloat32, head_dim);
    QuantizeCell(a.scaled, reinterpret_cast<const float*>(fresh), head_dim,
                 reinterpret_cast<uint8_t*>(a.pools[which]) + cell * cell_bytes,
                 a.scales[which] + cell);
  }
}

void WriteTokens(const Append& a, int64_t row, int64_t first, int64_t end) {
  const PoolShape& pool = a.pool;
  for (int64_t token = first; token < end; ++token) {
    const int64_t position = int64_t{a.rows.start[row]} + token;
    const int64_t entry = position / pool.page_tokens;
    if (position < 0 || entry >= a.rows.table_width) continue;
    const int64_t page = PageAt(a.rows, pool, row, entry);
    if (page == kNullPage) continue;
    const int64_t pool_row = a.layer * pool.pages + page;
    for (int64_t head = 0; head < pool.kv_heads; ++head) {
      const int64_t cell = (pool_row * pool.kv_heads + head) * pool.page_tokens +
                           position % pool.page_tokens;
      const int64_t source = (a.rows.First(row) + token) * pool.kv_heads + head;
      for (int which = 0; which < 2; ++which) WriteCell(a, which, cell, source);
    }
  }
}

}  // namespace

void QuantizeCell(Scaled scaled, const float* numbers, int64_t count, uint8_t* values,
                  uint16_t* scale) {
  // Compared as whole numbers, a NaN is above infinity, and so it is what the scale becomes.
  int32_t most = 0, top = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = static_cast<int32_t>(ToBits(numbers[i])), size = bits & 0x7fffffff;
    most = size > most ? size : most;
    top = bits > top ? bits : top;
  }
  const float largest = FromBits(static_cast<uint32_t>(most));
  if (!(largest <= std::numeric_limits<float>::max())) {
    // Infinity; NaN. Zeros times either are NaN.
    const uint16_t infinity = scaled == Scaled::kInt4 && top == most ? 0xff80 : 0x7f80;
    *scale = largest > 0 ? infinity : 0x7fc0;
  } else if (largest < kLeast) {
    *scale = 0;
  } else {
    const bool is_positive = top == most;
    *scale = Round(scaled == Scaled::kInt8  ? largest * (1.0f / 127.0f)
                   : scaled == Scaled::kFp8 ? largest * (1.0f / 448.0f)
                                            : (is_positive ? largest : -largest) * -0.125f);
    const float inverse = 1.0f / FromBits(uint32_t{*scale} << 16);
    switch (scaled) {
      case Scaled::kNone: break;
      case Scaled::kInt8:  // None is above 127.497.
        for (int64_t i = 0; i < count; ++i) values[i] = Nearest(numbers[i] * inverse);
        break;
      case Scaled::kFp8:
        for (int64_t i = 0; i < count; ++i) values[i] = ToFp8(numbers[i] * inverse);
        break;
      case Scaled::kInt4:
        for (int64_t i = 0; i < count / 2; ++i) {
          const float even = numbers[2 * i] * inverse, odd = numbers[2 * i + 1] * inverse;
          values[i] = (ToInt4(even) & 15) | (ToInt4(odd) & 15) << 4;
        }
    }
    return;
  }
  std::memset(values, 0, PageBytes(scaled, Number::kFloat32, count));
}

void RunAppend(const Append& a, Executor& executor) {
  const Rows& rows = a.rows;
  int64_t tokens = 0;
  for (int64_t row = 0; row < rows.rows; ++row) tokens += rows.Length(row);
  const int64_t tiles = (rows.query_tokens + kTileTokens - 1) / kTileTokens;
  auto write_tile = [&](int64_t item) {
    const int64_t row = item / tiles, first = item % tiles * kTileTokens;
    WriteTokens(a, row, first, std::min(first + kTileTokens, rows.Length(row)));
  };
  const int64_t bytes = 2 * tokens * a.pool.kv_heads * a.pool.head_dim * a.item_bytes;
  if (bytes > kAloneBytes) {
    ParallelFor(executor, rows.rows * tiles, write_tile);
  } else {
    SerialFor(rows.rows * tiles, write_tile);
  }
}

}  // namespace jaxserve
