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

// Writes what is new of one token and head, number `cell` of the pool and `source` of what is new.
void WriteCell(const Append& a, int which, int64_t cell, int64_t source) {
  const int64_t head_dim = a.pool.head_dim, fresh_bytes = head_dim * a.item_bytes;
  const char* fresh = a.fresh[which] + source * fresh_bytes;
  if (a.scales[which] == nullptr) {
    std::memcpy(a.pools[which] + cell * fresh_bytes, fresh, fresh_bytes);
  } else {
    QuantizeCell(reinterpret_cast<const float*>(fresh), head_dim,
                 reinterpret_cast<int8_t*>(a.pools[which]) + cell * head_dim,
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

void QuantizeCell(const float* numbers, int64_t count, int8_t* values, uint16_t* scale) {
  // Compared as whole numbers, a NaN is above infinity, and so it is what the scale becomes.
  int32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t size = static_cast<int32_t>(ToBits(numbers[i]) & 0x7fffffffu);
    most = size > most ? size : most;
  }
  const float largest = FromBits(static_cast<uint32_t>(most));
  if (!(largest <= std::numeric_limits<float>::max())) {
    *scale = largest > 0 ? 0x7f80 : 0x7fc0;  // Infinity; NaN. Zeros times either are NaN.
  } else if (largest < kLeast) {
    *scale = 0;
  } else {
    const uint32_t bits = ToBits(largest * (1.0f / 127.0f));
    *scale = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    const float inverse = 1.0f / FromBits(uint32_t{*scale} << 16);
    // The nearest whole number is in the low bits then, even at a tie. None is above 127.497.
    for (int64_t i = 0; i < count; ++i) {
      values[i] = static_cast<int8_t>(ToBits(numbers[i] * inverse + 12582912.0f));
    }
    return;
  }
  std::memset(values, 0, count);
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
