// FlashAttention's loop over key blocks (Dao et al. 2022, algorithm 1) for one tile of queries.
//
// A block of keys is packed transposed, a block of values as it is, both in float32; each is then
// multiplied with all queries of the tile out of the cache. Every number of an answer is one chain
// of operations, the same in any tile:
//
//     score     over head_dim in order
//     value     over the block's keys in order, then over the blocks
//     total     over lanes in order, then a tree over the lanes, then over the blocks
//
// A key that a query does not see adds an exact zero, so neighbours in the tile leave no trace.
//
// Pages with scales are multiplied as the numbers they hold. A token's scale stands before its sum
// over head_dim: one product for each score, and one for each weight, in place of head_dim.
#include "kernel.h"

#include "native/simd.h"

namespace jaxserve {
namespace ISA_NAMESPACE {
namespace {

// Queries and vectors that one product keeps in registers: 24 sums of 32, or 12 of 16.
#if defined(ISA_AVX512)
constexpr int kTileRows = 6, kTileVecs = 4;
#else
constexpr int kTileRows = 6, kTileVecs = 2;
#endif

// Far below kFloor, and finite: the difference of two masked scores is 0 and not NaN.
constexpr float kMasked = -1e30f;

// Where prefetched lines wait: in the second cache, which has more of them on their way at a time
// than the first. Two cores read scattered pages at 24 GB/s so, and at 17 into the first.
constexpr int kNearness = 2;

int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }

// -- products ------------------------------------------------------------------------------------

// How a product reads both sides and adds to its sums: stored numbers of T, widened.
template <typename T>
struct Widened {
  using Left = float;
  using Right = typename T::Storage;
  static JAXSERVE_INLINE Vec Load(const Right* right) { return T::Load(right); }
  static JAXSERVE_INLINE Vec Every(Left left) { return Splat(left); }
  static JAXSERVE_INLINE Vec Add(Vec left, Vec right, Vec sum) { return Fma(left, right, sum); }
};

// C[ROWS, VECS lanes] (+)= A[ROWS, depth] B[depth, VECS lanes], B as it is stored
template <typename How, int ROWS, int VECS>
void Multiply(int64_t depth, const typename How::Left* a, int64_t a_stride,
              const typename How::Right* b, int64_t b_stride, float* c, int64_t c_stride,
              bool adds) {
  Vec sum[ROWS][VECS];
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 4
    for (int vec = 0; vec < VECS; ++vec) {
      sum[row][vec] = adds ? LoadAs<Vec>(c + row * c_stride + vec * kLanes) : Splat(0);
    }
  }
  for (int64_t d = 0; d < depth; ++d) {
    Vec right[VECS];
#pragma GCC unroll 4
    for (int vec = 0; vec < VECS; ++vec) right[vec] = How::Load(b + d * b_stride + vec * kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
      const Vec left = How::Every(a[row * a_stride + d]);
#pragma GCC unroll 4
      for (int vec = 0; vec < VECS; ++vec) {
        sum[row][vec] = How::Add(left, right[vec], sum[row][vec]);
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 4
    for (int vec = 0; vec < VECS; ++vec) {
      StoreAs(c + row * c_stride + vec * kLanes, sum[row][vec]);
    }
  }
}

template <typename How>
struct Multipliers {
  using Function = void (*)(int64_t, const typename How::Left*, int64_t,
                            const typename How::Right*, int64_t, float*, int64_t, bool);
#define ROW(vecs)                                                              \
  {Multiply<How, 1, vecs>, Multiply<How, 2, vecs>, Multiply<How, 3, vecs>,     \
   Multiply<How, 4, vecs>, Multiply<How, 5, vecs>, Multiply<How, 6, vecs>}
  static constexpr Function kTable[kTileVecs][kTileRows] = {
      ROW(1),
      ROW(2),
#if defined(ISA_AVX512)
      ROW(3),
      ROW(4),
#endif
  };
#undef ROW
};

// C[rows, columns] (+)= A[rows, depth] B[depth, columns]; columns are whole vectors.
template <typename How>
void Product(int64_t rows, int64_t columns, int64_t depth, const typename How::Left* a,
             int64_t a_stride, const typename How::Right* b, int64_t b_stride, float* c,
             int64_t c_stride, bool adds) {
  for (int64_t column = 0; column < columns; column += kTileVecs * kLanes) {
    const int64_t vecs = Least((columns - column) / kLanes, kTileVecs);
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int64_t count = Least(rows - row, kTileRows);
      Multipliers<How>::kTable[vecs - 1][count - 1](depth, a + row * a_stride, a_stride,
                                                    b + column, b_stride,
                                                    c + row * c_stride + column, c_stride, adds);
    }
  }
}

// -- packing -------------------------------------------------------------------------------------

// Where the keys of a block lie, in numbers and in tokens from the head's first page. Keys outside
// the span of the tile stand in for the span's first: they are masked, and have to be readable.
struct Places {
  int64_t offset[kBlockKeys];
  int64_t token[kBlockKeys];
};

void Find(const Tile& tile, int64_t block, int64_t first, int64_t end, Places& places) {
  int64_t entry = first / tile.page_tokens, token = first % tile.page_tokens;
  for (int64_t key = first; key < end; ++entry, token = 0) {
    int64_t page = tile.table[entry];
    if (page < 0 || page >= tile.pages) page = 0;
    const int64_t left = tile.page_tokens - token;
    const int64_t count = left < end - key ? left : end - key;
    const int64_t at = page * tile.page_stride + token;
    for (int64_t i = 0; i < count; ++i) {
      places.offset[key - block + i] = (at + i) * tile.head_dim;
      places.token[key - block + i] = at + i;
    }
    key += count;
  }
  const int64_t offset = places.offset[first - block], at = places.token[first - block];
  for (int64_t i = 0; i < kBlockKeys; ++i) {
    if (i >= first - block && i < end - block) continue;
    places.offset[i] = offset, places.token[i] = at;
  }
}

// The scales of a block's tokens, for what T loads.
template <typename T>
void LoadScales(const uint16_t* scales, const Places& places, float* out) {
  for (int64_t key = 0; key < kBlockKeys; ++key) {
    out[key] = Bits<float>(uint32_t{scales[places.token[key]]} << 16) * T::kFactor;
  }
}

// What a thread reads after the block at hand.
struct Upcoming {
  const void* k;
  const void* v;
};

// Finds what comes after the keys before `key`, in a call up to `end`. With nothing to come, places
// are left as they are. It is asked for a line at a time, beside the lines of the block at hand:
// pages lie anywhere, and the machine cannot foresee them.
Upcoming FindNext(const Tile& tile, int64_t key, int64_t end, Places& places) {
  const int64_t reads_to = end > tile.reads_to ? end : tile.reads_to;
  if (key < reads_to) {
    Find(tile, key, key, Least(key + kBlockKeys, reads_to), places);
  } else if (tile.next != nullptr) {
    const int64_t first = tile.next->reads_from, block = first / kBlockKeys * kBlockKeys;
    Find(*tile.next, block, first, Least(block + kBlockKeys, tile.next->reads_to), places);
    return {tile.next->k, tile.next->v};
  }
  return {tile.k, tile.v};
}

JAXSERVE_INLINE void AskFor(const void* line) { __builtin_prefetch(line, 0, kNearness); }

template <typename T>
void PackKeys(const typename T::Storage* k, const Places& places, const Upcoming& next,
              const Places& next_places, int64_t head_dim, float* packed) {
  const auto ask = [&](int64_t key, int64_t d) {
    const int64_t at = (next_places.offset[key] + d) / T::kPacked;
    AskFor(static_cast<const typename T::Storage*>(next.k) + at);
    AskFor(static_cast<const typename T::Storage*>(next.v) + at);
  };
  for (int64_t key = 0; key < kBlockKeys; key += kLanes) {
    int64_t d = 0;
    if constexpr (T::kHasWords) {
      // The numbers of a word at a time: they are told apart when they stand where they belong.
      constexpr int kCount = 4 / sizeof(typename T::Storage);
      for (; d + kCount * kLanes <= head_dim; d += kCount * kLanes) {
        VecU words[kLanes];
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane) {
          words[lane] = LoadAs<VecU>(k + places.offset[key + lane] + d);
          ask(key + lane, d);
        }
        Transpose(words);
#pragma GCC unroll 16
        for (int word = 0; word < kLanes; ++word) {
          float* target = packed + (d + kCount * word) * kBlockKeys + key;
          StoreAs(target, T::template FromWord<0>(words[word]));
          StoreAs(target + kBlockKeys, T::template FromWord<1>(words[word]));
          if constexpr (kCount == 4) {
            StoreAs(target + 2 * kBlockKeys, T::template FromWord<2>(words[word]));
            StoreAs(target + 3 * kBlockKeys, T::template FromWord<3>(words[word]));
          }
        }
      }
    }
    for (; d < head_dim; d += kLanes) {
      VecU rows[kLanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) {
        rows[lane] = Bits<VecU>(T::Load(k + (places.offset[key + lane] + d) / T::kPacked));
        ask(key + lane, d);
      }
      Transpose(rows);
#pragma GCC unroll 16
      for (int row = 0; row < kLanes; ++row) {
        StoreAs(packed + (d + row) * kBlockKeys + key, rows[row]);
      }
    }
  }
}

// weighted[vectors, head_dim] += weights[vectors, keys] V[keys, head_dim]
template <typename T>
void AddValues(const Tile& tile, const typename T::Storage* v, const Places& places, int64_t first,
               int64_t end, const Scratch& scratch, float* weighted) {
  const int64_t vectors = tile.vectors(), head_dim = tile.head_dim;
  if constexpr (T::kPacked == 1) {
    if (sizeof(typename T::Storage) == sizeof(float) || vectors <= kTileRows) {
      // Straight out of the pages, as many keys at once as lie side by side.
      for (int64_t key = first; key < end;) {
        int64_t after = key + 1;
        while (after < end && places.offset[after] == places.offset[after - 1] + head_dim) ++after;
        Product<Widened<T>>(vectors, head_dim, after - key, scratch.scores + key, kBlockKeys,
                            v + places.offset[key], head_dim, weighted, head_dim, true);
        key = after;
      }
      return;
    }
  }
  // Each number would be converted again for every few queries: once is enough.
  for (int64_t key = first; key < end; ++key) {
    const typename T::Storage* source = v + places.offset[key] / T::kPacked;
    float* target = scratch.v + key * head_dim;
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      StoreAs(target + d, T::Load(source + d / T::kPacked));
    }
  }
  Product<Widened<Float32>>(vectors, head_dim, end - first, scratch.scores + first, kBlockKeys,
                            scratch.v + first * head_dim, head_dim, weighted, head_dim, true);
}

// -- softmax -------------------------------------------------------------------------------------

// How keys become weights. Of kScaled pages, scores take in the keys' scales before, and weights
// those of the values after; kRounded weights are rounded to 8 bits next.
enum class Weights { kPlain, kScaled, kRounded };

template <Weights kWeights>
JAXSERVE_INLINE Vec WeightOf(Vec below_top) {
#if defined(ISA_AVX512)
  if constexpr (kWeights == Weights::kRounded) return ShortExp(below_top);
#endif
  return Exp(below_top);
}

// Turns one query's scores of a block into weights. It sees the keys first <= key < end of it.
template <Weights kWeights>
void Weigh(const Tile& tile, int64_t first, int64_t end, const Scratch& scratch, float* scores,
           float* maximum, float* total, float* weighted) {
  constexpr int kVecs = kBlockKeys / kLanes;
  constexpr bool kScaled = kWeights == Weights::kScaled;
  if (first >= end) {
    for (int vec = 0; vec < kVecs; ++vec) StoreAs(scores + vec * kLanes, Splat(0));
    return;
  }
  Vec score[kVecs];
  Vec most = Splat(*maximum);
#pragma GCC unroll 16
  for (int vec = 0; vec < kVecs; ++vec) {
    score[vec] = LoadAs<Vec>(scores + vec * kLanes) * Splat(tile.scale);
    if constexpr (kScaled) score[vec] *= LoadAs<Vec>(scratch.k_scale + vec * kLanes);
  }
  if (tile.softcap > 0) {
    for (int vec = 0; vec < kVecs; ++vec) {
      score[vec] = Tanh(score[vec] / Splat(tile.softcap)) * Splat(tile.softcap);
    }
  }
  if (first > 0 || end < kBlockKeys) {
#pragma GCC unroll 16
    for (int vec = 0; vec < kVecs; ++vec) {
      const VecI key = LaneNumbers() + SplatI(vec * kLanes);
      const VecI seen = (key >= SplatI(static_cast<int32_t>(first))) &
                        (key < SplatI(static_cast<int32_t>(end)));
      score[vec] = Select(seen, score[vec], Splat(kMasked));
    }
  }
#pragma GCC unroll 16
  for (int vec = 0; vec < kVecs; ++vec) most = Select(score[vec] > most, score[vec], most);
  const float top = Max(most);
  Vec sum = Splat(0);
#pragma GCC unroll 16
  for (int vec = 0; vec < kVecs; ++vec) {
    const Vec weight = WeightOf<kWeights>(score[vec] - Splat(top));
    sum += weight;
    if constexpr (kScaled) {
      StoreAs(scores + vec * kLanes, weight * LoadAs<Vec>(scratch.v_scale + vec * kLanes));
    } else {
      StoreAs(scores + vec * kLanes, weight);
    }
  }
  if (top != *maximum) {
    const float shrink = Exp(Splat(*maximum - top))[0];
    *maximum = top;
    *total *= shrink;
    for (int64_t d = 0; d < tile.head_dim; d += kLanes) {
      StoreAs(weighted + d, LoadAs<Vec>(weighted + d) * Splat(shrink));
    }
  }
  *total += Sum(sum);
}

// Weighs the keys from <= key < to of a block for query vector m.
template <Weights kWeights>
void WeighBlock(const Tile& tile, int64_t m, int64_t block, int64_t from, int64_t to,
                const Scratch& scratch, const Softmax& state) {
  const int64_t token = m / tile.group;
  int64_t sees_first = tile.KeyFirst(token);
  if (sees_first < from) sees_first = from;
  const int64_t sees_end = Least(tile.KeyEnd(token), to);
  Weigh<kWeights>(tile, sees_first - block, sees_end - block, scratch,
                  scratch.scores + m * kBlockKeys, state.maximum + m, state.total + m,
                  state.weighted + m * tile.head_dim);
}

}  // namespace
}  // namespace ISA_NAMESPACE
}  // namespace jaxserve

#if defined(ISA_AVX512BF16)
#include "pairs.h"
#endif

namespace jaxserve {
namespace ISA_NAMESPACE {
namespace {

// -- the kernel ----------------------------------------------------------------------------------

template <typename T, bool kScaled = false>
void AttendAs(const Tile& tile, int64_t first, int64_t end, const Scratch& scratch,
              const Softmax& state) {
  const int64_t vectors = tile.vectors(), head_dim = tile.head_dim;
  for (int64_t m = 0; m < vectors; ++m) state.maximum[m] = kFloor, state.total[m] = 0;
  for (int64_t i = 0; i < vectors * head_dim; i += kLanes) StoreAs(state.weighted + i, Splat(0));
  const auto* k = static_cast<const typename T::Storage*>(tile.k);
  const auto* v = static_cast<const typename T::Storage*>(tile.v);
  Places places[2] = {};
  int turn = 0;
  const int64_t first_block = first / kBlockKeys * kBlockKeys;
  if (first < end) Find(tile, first_block, first, Least(first_block + kBlockKeys, end), places[0]);
  for (int64_t block = first_block; block < end; block += kBlockKeys, turn ^= 1) {
    const int64_t from = block < first ? first : block;
    const int64_t to = Least(block + kBlockKeys, end);
    const Upcoming next = FindNext(tile, to, end, places[turn ^ 1]);
    PackKeys<T>(k, places[turn], next, places[turn ^ 1], head_dim, scratch.k);
    if constexpr (kScaled) {
      LoadScales<T>(tile.k_scale, places[turn], scratch.k_scale);
      LoadScales<T>(tile.v_scale, places[turn], scratch.v_scale);
    }
    Product<Widened<Float32>>(vectors, kBlockKeys, head_dim, scratch.q, head_dim, scratch.k,
                              kBlockKeys, scratch.scores, kBlockKeys, false);
    for (int64_t m = 0; m < vectors; ++m) {
      constexpr Weights kWeights = kScaled ? Weights::kScaled : Weights::kPlain;
      WeighBlock<kWeights>(tile, m, block, from, to, scratch, state);
    }
    AddValues<T>(tile, v, places[turn], from - block, to - block, scratch, state.weighted);
  }
}

void Attend(const Tile& tile, int64_t first, int64_t end, const Scratch& scratch,
            const Softmax& state) {
  switch (tile.scaled) {
    case Scaled::kInt8: return AttendAs<Int8, true>(tile, first, end, scratch, state);
    case Scaled::kFp8: return AttendAs<Fp8, true>(tile, first, end, scratch, state);
    case Scaled::kInt4: return AttendAs<Int4, true>(tile, first, end, scratch, state);
    case Scaled::kNone: break;
  }
#if defined(ISA_AVX512BF16)
  if (TakesPairs(tile)) return AttendPairs(tile, first, end, scratch, state);
#endif
  switch (tile.pool_number) {
    case Number::kFloat32: return AttendAs<Float32>(tile, first, end, scratch, state);
    case Number::kBFloat16: return AttendAs<BFloat16>(tile, first, end, scratch, state);
    case Number::kFloat16: return AttendAs<Float16>(tile, first, end, scratch, state);
  }
}

template <typename T>
void LoadAsFloat(const Tile& tile, const Scratch& scratch) {
  const auto* q = static_cast<const typename T::Storage*>(tile.q);
  const int64_t width = tile.group * tile.head_dim;
  for (int64_t token = 0; token < tile.tokens; ++token) {
    for (int64_t i = 0; i < width; i += kLanes) {
      StoreAs(scratch.q + token * width + i, T::Load(q + token * tile.token_stride + i));
    }
  }
}

void Load(const Tile& tile, const Scratch& scratch) {
  switch (tile.q_number) {
    case Number::kFloat32: LoadAsFloat<Float32>(tile, scratch); break;
    case Number::kBFloat16: LoadAsFloat<BFloat16>(tile, scratch); break;
    case Number::kFloat16: LoadAsFloat<Float16>(tile, scratch); break;
  }
#if defined(ISA_AVX512BF16)
  if (TakesPairs(tile)) {
    RoundPairs(scratch.q, tile.vectors() * tile.head_dim, reinterpret_cast<uint32_t*>(scratch.q));
  }
#endif
}

void Merge(const Tile& tile, const Softmax& part, const Softmax& whole) {
  for (int64_t m = 0; m < tile.vectors(); ++m) {
    const float top =
        part.maximum[m] > whole.maximum[m] ? part.maximum[m] : whole.maximum[m];
    const Vec old = Splat(Exp(Splat(whole.maximum[m] - top))[0]);
    const Vec fresh = Splat(Exp(Splat(part.maximum[m] - top))[0]);
    whole.maximum[m] = top;
    whole.total[m] = Fma(Splat(part.total[m]), fresh, Splat(whole.total[m]) * old)[0];
    float* target = whole.weighted + m * tile.head_dim;
    const float* source = part.weighted + m * tile.head_dim;
    for (int64_t d = 0; d < tile.head_dim; d += kLanes) {
      StoreAs(target + d,
              Fma(LoadAs<Vec>(source + d), fresh, LoadAs<Vec>(target + d) * old));
    }
  }
}

template <typename T>
void StoreFrom(const Tile& tile, const Softmax& whole) {
  auto* out = static_cast<typename T::Storage*>(tile.out);
  for (int64_t m = 0; m < tile.vectors(); ++m) {
    // A query that saw no key has total 0 and weighted 0: its answer is 0. Others have 1 or more.
    const float total = whole.total[m] == 0 ? 1 : whole.total[m];
    auto* target =
        out + m / tile.group * tile.token_stride + m % tile.group * tile.head_dim;
    const float* source = whole.weighted + m * tile.head_dim;
    for (int64_t d = 0; d < tile.head_dim; d += kLanes) {
      T::Store(target + d, LoadAs<Vec>(source + d) / Splat(total));
    }
  }
}

void Store(const Tile& tile, const Softmax& whole) {
  switch (tile.q_number) {
    case Number::kFloat32: return StoreFrom<Float32>(tile, whole);
    case Number::kBFloat16: return StoreFrom<BFloat16>(tile, whole);
    case Number::kFloat16: return StoreFrom<Float16>(tile, whole);
  }
}

}  // namespace

extern const Kernel kKernel;
const Kernel kKernel = {Load, Attend, Merge, Store, kHasFloat16};

}  // namespace ISA_NAMESPACE
}  // namespace jaxserve
