// Attention of new tokens over the pages of their rows: how the work is cut and put together.
//
// A tile is some query tokens of one row and the query heads of one key head. Its keys are cut into
// parts of kPartKeys, counted from position 0; each part has a softmax of its own, and the parts
// are merged in order. Which tiles there are, and which thread takes a part, therefore changes no
// bit of an answer. Each tile reads the keys and values it sees once, so a decoding row reads its
// context once, and a prompt's chunk reads it once for every kTileVectors query vectors. Parts that
// decoding rows have in the same pages are computed for all of these rows together.
#pragma once

#include <cstdint>

#include "append.h"
#include "kernel.h"
#include "native/threads.h"

namespace jaxserve {

constexpr int64_t kPartKeys = 256;

// Query vectors in a tile, or one token's if that is more. 96 of them amortise the packing of a
// block, and with their answers still fit the second cache of a core at head_dim 256.
constexpr int64_t kTileVectors = 96;
// Query heads of one key head at most. With it the scratch memory of a thread is bounded: see
// ScratchFloats.
constexpr int64_t kMaxGroup = 128;
constexpr int64_t kMaxHeadDim = 256;

// Float32 numbers that unmerged parts may take in one call. Beyond it tiles are not cut.
constexpr int64_t kMaxPartFloats = 8 << 20;

struct Attention {
  PoolShape pool;
  Rows rows;
  int64_t layer;
  int64_t q_heads;
  Number q_number;
  Number pool_number;
  const void* k_pool;
  const void* v_pool;
  Scaled scaled = Scaled::kNone;  // What pages hold; kNone: pool_number.
  const uint16_t* k_scale = nullptr;  // [layers * pages, kv_heads, page_tokens] bfloat16 of pages
  const uint16_t* v_scale = nullptr;  // that are scaled.
  const void* q;  // [places, q_heads, head_dim]
  void* out;      // As q.
  float scale;
  float softcap;
  int64_t window;
  bool narrow = false;  // See Tile.
};

// Why these arguments cannot be taken; null when they can.
const char* WhyNotAttend(const Attention& attention, const Kernel& kernel);

void RunAttention(const Attention& attention, const Kernel& kernel, Executor& executor);

// The kernel of the instruction set in use.
const Kernel& CurrentKernel();

}  // namespace jaxserve
