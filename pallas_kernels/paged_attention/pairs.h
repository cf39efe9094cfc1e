// Attention over bfloat16 pages in products of pairs, for queries and weights rounded to bfloat16.
//
// Included by kernel.cc where the instruction set has such products. A word of 32 bits is a pair:
// of a key two numbers side by side, of values the same number of two tokens side by side. So
// nothing is widened, and a block takes half the memory and half the products of float32. Chains of
// operations are as in kernel.cc, with pairs in place of numbers.
#pragma once

#include <immintrin.h>

#include "kernel.h"
#include "native/simd.h"

namespace jaxserve {
namespace ISA_NAMESPACE {
namespace {

// Products of words; see Widened.
struct Pairs {
  using Left = uint32_t;
  using Right = uint32_t;
  static JAXSERVE_INLINE Vec Load(const Right* right) { return LoadAs<Vec>(right); }
  static JAXSERVE_INLINE Vec Every(Left left) { return Bits<Vec>(_mm512_set1_epi32(left)); }
  static JAXSERVE_INLINE Vec Add(Vec left, Vec right, Vec sum) {
    return _mm512_dpbf16_ps(sum, Bits<__m512bh>(left), Bits<__m512bh>(right));
  }
};

// packed[head_dim / 2 words, kBlockKeys]. With each line, one of the next block is asked for.
void PackKeyPairs(const uint16_t* k, const Places& places, const uint16_t* next_k,
                  const Places& next, int64_t head_dim, uint32_t* packed) {
  const int64_t words = head_dim / 2;
  for (int64_t key = 0; key < kBlockKeys; key += kLanes) {
    for (int64_t w = 0; w < words; w += kLanes) {
      VecU some[kLanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint16_t* source = k + places.offset[key + lane] + 2 * w;
        some[lane] = Bits<VecU>(LoadSome(First(words - w), source));
        AskFor(next_k + next.offset[key + lane] + 2 * w);
      }
      Transpose(some);
      const int64_t count = Least(words - w, kLanes);
      for (int64_t i = 0; i < count; ++i) StoreAs(packed + (w + i) * kBlockKeys + key, some[i]);
    }
  }
}

// packed[kBlockKeys / 2, head_dim words] from the tokens first to end; pairs without any are left
// alone, and of others what is not there is zero. With each line, one of the next block is asked
// for.
void PackValuePairs(const uint16_t* v, const Places& places, const uint16_t* next_v,
                    const Places& next, int64_t first, int64_t end, int64_t head_dim,
                    uint32_t* packed) {
  static constexpr uint16_t kLow[] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                      37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = LoadAs<__m512i>(kLow);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t pair = first / 2; 2 * pair < end; ++pair) {
    uint32_t* target = packed + pair * head_dim;
    const int64_t key = 2 * pair;
    for (int64_t d = 0; d < head_dim; d += 2 * kLanes) {
      const __mmask16 here = First((head_dim - d) / 2);
      const __m512i even = LoadSome(key >= first ? here : 0, v + places.offset[key] + d);
      const __m512i odd = LoadSome(key + 1 < end ? here : 0, v + places.offset[key + 1] + d);
      AskFor(next_v + next.offset[key] + d);
      AskFor(next_v + next.offset[key + 1] + d);
      StoreAs(target + d, _mm512_permutex2var_epi16(even, low, odd));
      if (d + kLanes < head_dim) {
        StoreAs(target + d + kLanes, _mm512_permutex2var_epi16(even, high, odd));
      }
    }
  }
}

// Rounds numbers to words, two to one.
void RoundPairs(const float* from, int64_t count, uint32_t* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    StoreAs(reinterpret_cast<uint16_t*>(to) + i, _mm512_cvtneps_pbh(LoadAs<__m512>(from + i)));
  }
}

bool TakesPairs(const Tile& tile) {
  return tile.narrow && tile.scaled == Scaled::kNone && tile.pool_number == Number::kBFloat16;
}

// As AttendAs. Scratch holds words: of queries [vectors, head_dim / 2], and where it says float32
// of keys, values and weights, in the front of what is there.
void AttendPairs(const Tile& tile, int64_t first, int64_t end, const Scratch& scratch,
                 const Softmax& state) {
  const int64_t vectors = tile.vectors(), head_dim = tile.head_dim, words = head_dim / 2;
  for (int64_t m = 0; m < vectors; ++m) state.maximum[m] = kFloor, state.total[m] = 0;
  for (int64_t i = 0; i < vectors * head_dim; i += kLanes) StoreAs(state.weighted + i, Splat(0));
  const auto* k = static_cast<const uint16_t*>(tile.k);
  const auto* v = static_cast<const uint16_t*>(tile.v);
  auto* q_words = reinterpret_cast<uint32_t*>(scratch.q);
  auto* k_words = reinterpret_cast<uint32_t*>(scratch.k);
  auto* v_words = reinterpret_cast<uint32_t*>(scratch.v);
  Places places[2] = {};
  int turn = 0;
  const int64_t first_block = first / kBlockKeys * kBlockKeys;
  if (first < end) Find(tile, first_block, first, Least(first_block + kBlockKeys, end), places[0]);
  for (int64_t block = first_block; block < end; block += kBlockKeys, turn ^= 1) {
    const int64_t from = block < first ? first : block;
    const int64_t to = Least(block + kBlockKeys, end);
    const Upcoming next = FindNext(tile, to, end, places[turn ^ 1]);
    PackKeyPairs(k, places[turn], static_cast<const uint16_t*>(next.k), places[turn ^ 1], head_dim,
                 k_words);
    Product<Pairs>(vectors, kBlockKeys, words, q_words, words, k_words, kBlockKeys, scratch.scores,
                   kBlockKeys, false);
    for (int64_t m = 0; m < vectors; ++m) {
      float* scores = scratch.scores + m * kBlockKeys;
      WeighBlock<Weights::kRounded>(tile, m, block, from, to, scratch, state);
      RoundPairs(scores, kBlockKeys, reinterpret_cast<uint32_t*>(scores));
    }
    PackValuePairs(v, places[turn], static_cast<const uint16_t*>(next.v), places[turn ^ 1],
                   from - block, to - block, head_dim, v_words);
    const int64_t pair = (from - block) / 2, pairs = (to - block + 1) / 2 - pair;
    Product<Pairs>(vectors, head_dim, pairs,
                   reinterpret_cast<const uint32_t*>(scratch.scores) + pair, kBlockKeys,
                   v_words + pair * head_dim, head_dim, state.weighted, head_dim, true);
  }
}

}  // namespace
}  // namespace ISA_NAMESPACE
}  // namespace jaxserve
