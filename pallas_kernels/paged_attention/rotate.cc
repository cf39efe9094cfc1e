#include "rotate.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace jaxserve {
namespace {

constexpr int64_t kTileVectors = 64;
// What one thread rotates faster than another one wakes up.
constexpr int64_t kAloneNumbers = 16 * 1024;

typedef float Four __attribute__((vector_size(16)));

Four Load(const float* source) {
  Four four;
  std::memcpy(&four, source, sizeof(four));
  return four;
}

// Sums and differences of both halves, in pairs beside each other: reads and writes of one pass are
// then contiguous, and every pass is like the one before.
void RotateBlock(const float* numbers, int64_t block, float factor, float* out) {
  float rooms[2][kMostRotated];
  const float* from = numbers;
  float* to = rooms[0];
  for (int64_t width = block; width > 1; width /= 2) {
    const float* right = from + block / 2;
    int64_t i = 0;
    for (; i + 4 <= block / 2; i += 4) {
      const Four sum = Load(from + i) + Load(right + i), difference = Load(from + i) - Load(right + i);
      const Four pairs[2] = {__builtin_shufflevector(sum, difference, 0, 4, 1, 5),
                             __builtin_shufflevector(sum, difference, 2, 6, 3, 7)};
      std::memcpy(to + 2 * i, pairs, sizeof(pairs));
    }
    for (; i < block / 2; ++i) {
      const float sum = from[i] + right[i], difference = from[i] - right[i];
      to[2 * i] = sum;
      to[2 * i + 1] = difference;
    }
    from = to;
    to = to == rooms[0] ? rooms[1] : rooms[0];
  }
  for (int64_t i = 0; i < block; ++i) out[i] = from[i] * factor;
}

}  // namespace

void RunRotate(const float* numbers, int64_t vectors, int64_t head_dim, float* out,
               Executor& executor) {
  const int64_t block = head_dim & -head_dim;
  // As float32 rounds the root's inverse.
  const float factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  auto rotate_tile = [&](int64_t tile) {
    const int64_t end = std::min((tile + 1) * kTileVectors, vectors) * head_dim;
    for (int64_t i = tile * kTileVectors * head_dim; i < end; i += block) {
      RotateBlock(numbers + i, block, factor, out + i);
    }
  };
  const int64_t tiles = (vectors + kTileVectors - 1) / kTileVectors;
  if (vectors * head_dim > kAloneNumbers) {
    ParallelFor(executor, tiles, rotate_tile);
  } else {
    SerialFor(tiles, rotate_tile);
  }
}

}  // namespace jaxserve
