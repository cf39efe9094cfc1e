#include "append.h"

#include <algorithm>
#include <cstring>

namespace jaxserve {
namespace {

constexpr int64_t kTileTokens = 64;
// What one thread copies faster than another one wakes up.
constexpr int64_t kAloneBytes = 128 * 1024;

void WriteTokens(const Append& a, int64_t row, int64_t first, int64_t end) {
  const PoolShape& pool = a.pool;
  const int64_t cell_bytes = pool.head_dim * a.item_bytes;
  const int64_t tile_bytes = pool.page_tokens * cell_bytes;
  for (int64_t token = first; token < end; ++token) {
    const int64_t position = int64_t{a.rows.start[row]} + token;
    const int64_t entry = position / pool.page_tokens;
    if (position < 0 || entry >= a.rows.table_width) continue;
    const int64_t page = PageAt(a.rows, pool, row, entry);
    if (page == kNullPage) continue;
    const int64_t pool_row = a.layer * pool.pages + page;
    const int64_t offset =
        pool_row * pool.kv_heads * tile_bytes + position % pool.page_tokens * cell_bytes;
    const int64_t source = (row * a.rows.query_tokens + token) * pool.kv_heads * cell_bytes;
    for (int64_t head = 0; head < pool.kv_heads; ++head) {
      for (int which = 0; which < 2; ++which) {
        std::memcpy(a.pools[which] + offset + head * tile_bytes,
                    a.fresh[which] + source + head * cell_bytes, cell_bytes);
      }
    }
  }
}

}  // namespace

void RunAppend(const Append& a, Executor& executor) {
  const Rows& rows = a.rows;
  int64_t tokens = 0;
  for (int64_t row = 0; row < rows.rows; ++row) tokens += std::max(rows.length[row], 0);
  const int64_t tiles = (rows.query_tokens + kTileTokens - 1) / kTileTokens;
  auto write_tile = [&](int64_t item) {
    const int64_t row = item / tiles, first = item % tiles * kTileTokens;
    const int64_t real = std::min<int64_t>(rows.length[row], rows.query_tokens);
    WriteTokens(a, row, first, std::min(first + kTileTokens, real));
  };
  const int64_t bytes = 2 * tokens * a.pool.kv_heads * a.pool.head_dim * a.item_bytes;
  if (bytes > kAloneBytes) {
    ParallelFor(executor, rows.rows * tiles, write_tile);
  } else {
    SerialFor(rows.rows * tiles, write_tile);
  }
}

}  // namespace jaxserve
