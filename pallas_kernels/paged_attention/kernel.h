// The arithmetic of attention over pages: what each instruction set implements.
//
// Pointers and sizes only, since kernel.cc takes no C++ standard header; attention.cc decides which
// thread computes what.
#pragma once

#include <stdint.h>

#include "native/isa.h"
#include "native/number.h"

namespace jaxserve {

// Keys in one block. Blocks begin at multiples of it, counted from position 0, so that a query's
// sums run in the same order whatever it is computed together with.
constexpr int64_t kBlockKeys = 64;

// Where a running maximum starts: below any real score, and above what masked scores are.
constexpr float kFloor = -1e20f;

// A tile: query tokens that stand together in one row, and all the query heads of one key head.
// Query vector m of the tile is head m % group of token m / group.
struct Tile {
  Number q_number;
  Number pool_number;
  const void* q;        // First token's first head; head_dim numbers each.
  void* out;            // As q.
  int64_t token_stride;  // Numbers from one token to the next, in q and out.
  int64_t tokens;
  int64_t group;
  int64_t head_dim;
  const void* k;  // The layer's pages, at this key head.
  const void* v;
  Scaled scaled;  // What those pages hold; kNone: pool_number.
  // bfloat16 for each of their tokens, if any.
  const uint16_t* k_scale;
  const uint16_t* v_scale;
  int64_t page_stride;  // Tokens of any head from one page to the next.
  int64_t page_tokens;
  int64_t pages;
  const int32_t* table;
  int64_t first_position;  // Of the first token.
  int64_t context;         // Positions that the table has room for: later keys are not there.
  int64_t window;          // 0 for none.
  float scale;
  float softcap;  // 0 for none.
  // Whether queries and weights may be rounded to bfloat16 for pages of that.
  bool narrow;
  // What the same thread reads after a call, so that it can be asked for in time: the tile's
  // further keys up to reads_to, then those of another tile, or nothing where that is null. A tile
  // is read from reads_from on.
  int64_t reads_from;
  int64_t reads_to;
  const Tile* next;

  int64_t vectors() const { return tokens * group; }
  // The keys that a token sees; none when the end is not above the first.
  int64_t KeyEnd(int64_t token) const {
    const int64_t end = first_position + token + 1;
    return end < context ? end : context;
  }
  int64_t KeyFirst(int64_t token) const {
    const int64_t first = window > 0 ? first_position + token + 1 - window : 0;
    return first > 0 ? first : 0;
  }
};

// A running softmax of each query vector of a tile.
struct Softmax {
  float* maximum;   // [vectors]
  float* total;     // [vectors]
  float* weighted;  // [vectors, head_dim]
};

// Float32 memory of one thread, for tiles of up to so many vectors.
struct Scratch {
  float* q;       // [vectors, head_dim]
  float* k;       // [head_dim, kBlockKeys]
  float* v;       // [kBlockKeys, head_dim]
  float* scores;  // [vectors, kBlockKeys]
  float* k_scale;  // [kBlockKeys]
  float* v_scale;  // [kBlockKeys]
};

struct Kernel {
  // Makes float32 of a tile's queries, in scratch.
  void (*load)(const Tile& tile, const Scratch& scratch);
  // The softmax over the keys first <= position < end, from nothing.
  void (*attend)(const Tile& tile, int64_t first, int64_t end, const Scratch& scratch,
                 const Softmax& state);
  // Takes one more part into the whole.
  void (*merge)(const Tile& tile, const Softmax& part, const Softmax& whole);
  // Writes the answers.
  void (*store)(const Tile& tile, const Softmax& whole);
  bool has_float16;
};

JAXSERVE_FOR_EACH_ISA(extern const Kernel kKernel;)

}  // namespace jaxserve
