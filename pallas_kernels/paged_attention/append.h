// Writing new keys and values into the pages of their rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "native/number.h"
#include "native/threads.h"

namespace jaxserve {

// Page 0 of each layer, which no row owns; padding in a table points there.
constexpr int64_t kNullPage = 0;

// The pool's shape is [layers * pages, kv_heads, page_tokens, head_dim]; see pool.py.
struct PoolShape {
  int64_t layers;
  int64_t pages;
  int64_t kv_heads;
  int64_t page_tokens;
  int64_t head_dim;
};

// The rows of a step: which pages each has, and where its new tokens stand.
struct Rows {
  int64_t rows;
  int64_t query_tokens;  // Places for new tokens in each row, padding included; see first.
  int64_t table_width;
  const int32_t* table;   // [rows, table_width]
  const int32_t* start;   // [rows] position of the first new token
  const int32_t* length;  // [rows] real new tokens
  // [rows] each row's first place among query_tokens that all rows share; null: a row has its own.
  const int32_t* first = nullptr;

  // Of all rows.
  int64_t places() const { return first != nullptr ? query_tokens : rows * query_tokens; }
  // The place of a row's first new token. No mistake of a caller leads outside of the places.
  int64_t First(int64_t row) const {
    if (first == nullptr) return row * query_tokens;
    return std::clamp<int64_t>(first[row], 0, query_tokens);
  }
  int64_t Length(int64_t row) const {
    const int64_t most = first != nullptr ? query_tokens - First(row) : query_tokens;
    return std::clamp<int64_t>(length[row], 0, most);
  }
};

// The page at a place of a row's table. One that the pool does not have counts as the null page:
// no mistake of a caller reads or writes outside the pool.
inline int64_t PageAt(const Rows& rows, const PoolShape& pool, int64_t row, int64_t entry) {
  const int64_t page = rows.table[row * rows.table_width + entry];
  return page >= 0 && page < pool.pages ? page : kNullPage;
}

struct Append {
  PoolShape pool;
  Rows rows;
  int64_t layer;
  int64_t item_bytes;  // Of one number in what is new, and in the pool unless that is scaled.
  char* pools[2];      // Keys and values.
  const char* fresh[2];  // [places, kv_heads, head_dim] each
  // What pools hold, and what is new is float32 then; kNone: what is new as it is.
  Scaled scaled = Scaled::kNone;
  // [layers * pages, kv_heads, page_tokens] bfloat16 each, if there are any.
  uint16_t* scales[2] = {nullptr, nullptr};
};

// Rounds the numbers of one token and head as formats.py says, into PageBytes of them.
void QuantizeCell(Scaled scaled, const float* numbers, int64_t count, uint8_t* values,
                  uint16_t* scale);

// Padding, and positions that the table has no page for, are not written.
void RunAppend(const Append& append, Executor& executor);

}  // namespace jaxserve
