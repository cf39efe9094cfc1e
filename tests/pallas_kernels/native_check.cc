// Runs the native kernels without Python, for the sanitizers: native_check FILE, written by
// native_cases.py. Each array has an allocation of its own, so a read past its end is found; each
// case runs on every instruction set of this machine and with several numbers of threads, which
// must not change a bit.
#include "native_check.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "native_check_feed_forward.h"
#include "native_check_matmul.h"
#include "paged_attention/append.h"
#include "paged_attention/attention.h"
#include "paged_attention/rotate.h"

namespace {

using namespace jaxserve;

// The new cells, and nothing else, are what the step wrote.
void CheckAppend(const std::string& name, const Attention& a, const char* k_pool, size_t pool_bytes,
                 Executor& executor) {
  const PoolShape& pool = a.pool;
  const int64_t item = a.pool_number == Number::kFloat32 ? 4 : 2, cell = pool.head_dim * item;
  const size_t fresh_bytes = a.rows.rows * a.rows.query_tokens * pool.kv_heads * cell;
  Array<char> fresh(new char[fresh_bytes]), k(new char[pool_bytes]), v(new char[pool_bytes]);
  for (size_t i = 0; i < fresh_bytes; ++i) fresh[i] = static_cast<char>(i * 131 + 7);
  std::memcpy(k.get(), k_pool, pool_bytes);
  std::memcpy(v.get(), k_pool, pool_bytes);
  Append append{pool, a.rows, a.layer, item, {k.get(), v.get()}, {fresh.get(), fresh.get()}};
  RunAppend(append, executor);
  Array<char> expected(new char[pool_bytes]);
  std::memcpy(expected.get(), k_pool, pool_bytes);
  for (int64_t row = 0; row < a.rows.rows; ++row) {
    for (int64_t token = 0; token < a.rows.length[row]; ++token) {
      const int64_t position = a.rows.start[row] + token;
      const int64_t page = a.rows.table[row * a.rows.table_width + position / pool.page_tokens];
      for (int64_t head = 0; head < pool.kv_heads; ++head) {
        const int64_t target = (((a.layer * pool.pages + page) * pool.kv_heads + head) *
                                    pool.page_tokens + position % pool.page_tokens) * cell;
        const int64_t source =
            ((row * a.rows.query_tokens + token) * pool.kv_heads + head) * cell;
        std::memcpy(&expected[target], &fresh[source], cell);
      }
    }
  }
  if (std::memcmp(expected.get(), k.get(), pool_bytes) != 0 ||
      std::memcmp(expected.get(), v.get(), pool_bytes) != 0) {
    Fail(name + ": append wrote something else");
  }
}

// Number `index` of a cell of pages with scales.
float Stored(Scaled scaled, const char* cell, int64_t index) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(cell);
  if (scaled == Scaled::kInt8) return static_cast<signed char>(bytes[index]);
  if (scaled == Scaled::kInt4) {
    const int nibble = bytes[index / 2] >> (index % 2 * 4) & 15;
    return nibble > 7 ? nibble - 16 : nibble;
  }
  const int exponent = bytes[index] >> 3 & 15, fraction = bytes[index] & 7;
  const float size = exponent == 0 ? std::ldexp(fraction, -9)
                                   : std::ldexp(8 + fraction, exponent - 10);
  return bytes[index] & 0x80 ? -size : size;
}

// How far a number may be from what is stored for it.
float MostOff(Scaled scaled, float number, float scale) {
  const float step = std::fabs(scale);
  if (scaled == Scaled::kFp8) return std::fmax(std::fabs(number) / 16, step / 1024);
  // What is next to the largest number of int4, on the other side, comes to 7 steps and not to 8.
  return scaled == Scaled::kInt4 && number * scale > 0 ? step * 1.04f : step / 2;
}

// The new cells of pages with scales are what is new to within half a step of their scale, and no
// other cell was written.
void CheckQuantizedAppend(const std::string& name, const Attention& a, const char* k_pool,
                          Executor& executor) {
  const PoolShape& pool = a.pool;
  const size_t cells = pool.layers * pool.pages * pool.kv_heads * pool.page_tokens;
  const size_t tokens = a.rows.rows * a.rows.query_tokens * pool.kv_heads;
  Array<float> fresh(new float[tokens * pool.head_dim]);
  for (size_t i = 0; i < tokens * pool.head_dim; ++i) {
    fresh[i] = (static_cast<int>(i * 131 % 257) - 128) * std::ldexp(1.f, i * 7 % 40 - 20);
  }
  Array<char> values[2];
  Array<uint16_t> scales[2];
  const size_t cell_bytes = PageBytes(a.scaled, Number::kFloat32, pool.head_dim);
  for (int which = 0; which < 2; ++which) {
    values[which].reset(new char[cells * cell_bytes]);
    scales[which].reset(new uint16_t[cells]);
    std::memcpy(values[which].get(), k_pool, cells * cell_bytes);
    std::memcpy(scales[which].get(), a.k_scale, cells * sizeof(uint16_t));
  }
  const char* bytes = reinterpret_cast<const char*>(fresh.get());
  RunAppend(Append{pool, a.rows, a.layer, 4, {values[0].get(), values[1].get()}, {bytes, bytes},
                   a.scaled, {scales[0].get(), scales[1].get()}},
            executor);
  std::vector<bool> is_new(cells);
  for (int64_t row = 0; row < a.rows.rows; ++row) {
    for (int64_t token = 0; token < a.rows.length[row]; ++token) {
      const int64_t position = a.rows.start[row] + token;
      const int64_t page = a.rows.table[row * a.rows.table_width + position / pool.page_tokens];
      for (int64_t head = 0; head < pool.kv_heads; ++head) {
        const size_t cell = ((a.layer * pool.pages + page) * pool.kv_heads + head) *
                                pool.page_tokens + position % pool.page_tokens;
        is_new[cell] = true;
        const float* source =
            &fresh[((row * a.rows.query_tokens + token) * pool.kv_heads + head) * pool.head_dim];
        for (const int which : {0, 1}) {
          const float step = AsFloat(reinterpret_cast<const char*>(scales[which].get()),
                                     Number::kBFloat16, cell);
          for (int64_t d = 0; d < pool.head_dim; ++d) {
            const float value = Stored(a.scaled, &values[which][cell * cell_bytes], d);
            const float most = MostOff(a.scaled, source[d], step);
            if (!(std::fabs(step * value - source[d]) <= 1.00001f * most)) {
              Fail(name + ": append rounds badly");
            }
          }
        }
      }
    }
  }
  for (size_t cell = 0; cell < cells; ++cell) {
    for (const int which : {0, 1}) {
      const size_t first = cell * cell_bytes;
      if (!is_new[cell] && (scales[which][cell] != a.k_scale[cell] ||
                            std::memcmp(&values[which][first], k_pool + first, cell_bytes))) {
        Fail(name + ": append wrote something else");
      }
    }
  }
}

// What the name of the case with shared pages begins with.
constexpr char kSharing[] = "sharing";

std::atomic<int64_t> keys_read{0};
const Kernel* counted_kernel = nullptr;

void CountKeys(const Tile& tile, int64_t first, int64_t end, const Scratch& scratch,
               const Softmax& state) {
  keys_read += end - first;
  counted_kernel->attend(tile, first, end, scratch, state);
}

// What six rows of the case have in the same pages, 256 keys, is read once for all of them where
// there are threads to share it, and not six times.
void CheckSharing(const std::string& name, Attention a, size_t out_bytes, Pool& one, Pool& two) {
  counted_kernel = &CurrentKernel();
  Kernel counting = *counted_kernel;
  counting.attend = CountKeys;
  const Array<char> out(new char[out_bytes]);
  a.out = out.get();
  RunAttention(a, counting, one);
  const int64_t alone = keys_read.exchange(0);
  RunAttention(a, counting, two);
  const int64_t together = keys_read.exchange(0);
  if (alone - together != 5 * 256 * a.pool.kv_heads) Fail(name + ": shared pages were read again");
}

// The same rows among places that they share, with a place of nobody before each, answer the same,
// and write the same cells. What is said of rows that are not there leads nowhere.
void CheckRagged(const std::string& name, Attention a, size_t pool_bytes, Executor& executor) {
  const Rows apart = a.rows;
  const size_t place = a.q_heads * a.pool.head_dim * (a.q_number == Number::kFloat32 ? 4 : 2);
  std::vector<int32_t> first;
  int64_t places = 0;
  for (int64_t row = 0; row < apart.rows; ++row) {
    first.push_back(++places);
    places += apart.Length(row);
  }
  const Array<char> q(new char[places * place]), out(new char[places * place]);
  const Array<char> expected(new char[places * place]);
  const Array<char> before(new char[apart.places() * place]);
  std::memset(q.get(), 0xff, places * place);  // NaN.
  std::memset(expected.get(), 0, places * place);
  a.out = before.get();
  RunAttention(a, CurrentKernel(), executor);
  for (int64_t row = 0; row < apart.rows; ++row) {
    const size_t bytes = apart.Length(row) * place;
    std::memcpy(&q[first[row] * place], static_cast<const char*>(a.q) + apart.First(row) * place,
                bytes);
    std::memcpy(&expected[first[row] * place], &before[apart.First(row) * place], bytes);
  }
  a.q = q.get(), a.out = out.get();
  a.rows.query_tokens = places, a.rows.first = first.data();
  RunAttention(a, CurrentKernel(), executor);
  if (std::memcmp(out.get(), expected.get(), places * place) != 0) {
    Fail(name + ": ragged rows answer something else");
  }
  if (a.k_scale == nullptr) {
    const int64_t item = a.pool_number == Number::kFloat32 ? 4 : 2;
    const size_t fresh_place = a.pool.kv_heads * a.pool.head_dim * item;
    const Array<char> fresh(new char[places * fresh_place]);
    const Array<char> own(new char[apart.places() * fresh_place]);
    for (size_t i = 0; i < places * fresh_place; ++i) fresh[i] = static_cast<char>(i % 61);
    std::memset(own.get(), 0, apart.places() * fresh_place);
    for (int64_t row = 0; row < apart.rows; ++row) {
      std::memcpy(&own[apart.First(row) * fresh_place], &fresh[first[row] * fresh_place],
                  apart.Length(row) * fresh_place);
    }
    const Array<char> k(new char[2 * pool_bytes]), own_k(new char[2 * pool_bytes]);
    for (const Array<char>* pools : {&k, &own_k}) {
      std::memcpy(pools->get(), a.k_pool, pool_bytes);
      std::memcpy(pools->get() + pool_bytes, a.k_pool, pool_bytes);
    }
    RunAppend(Append{a.pool, a.rows, a.layer, item, {k.get(), k.get() + pool_bytes},
                     {fresh.get(), fresh.get()}},
              executor);
    RunAppend(Append{a.pool, apart, a.layer, item, {own_k.get(), own_k.get() + pool_bytes},
                     {own.get(), own.get()}},
              executor);
    if (std::memcmp(k.get(), own_k.get(), 2 * pool_bytes) != 0) {
      Fail(name + ": ragged rows write something else");
    }
  }
  for (int32_t& place_of : first) place_of = 1 << 30;
  first[0] = -7;
  RunAttention(a, CurrentKernel(), executor);
  if (a.k_scale == nullptr) {
    const int64_t item = a.pool_number == Number::kFloat32 ? 4 : 2;
    const Array<char> fresh(new char[places * a.pool.kv_heads * a.pool.head_dim * item]);
    const Array<char> k(new char[pool_bytes]), v(new char[pool_bytes]);
    std::memset(fresh.get(), 0, places * a.pool.kv_heads * a.pool.head_dim * item);
    RunAppend(Append{a.pool, a.rows, a.layer, item, {k.get(), v.get()}, {fresh.get(), fresh.get()}},
              executor);
  }
}

void CheckCase(const std::string& line, std::istream& file, const std::vector<Pool*>& pools) {
  std::istringstream header(line);
  std::string name;
  int number;
  Attention a;
  PoolShape& pool = a.pool;
  Rows& rows = a.rows;
  header >> name >> number >> pool.layers >> pool.pages >> pool.kv_heads >> pool.page_tokens >>
      pool.head_dim >> rows.rows >> rows.query_tokens >> rows.table_width >> a.layer >>
      a.q_heads >> a.window >> a.scale >> a.softcap;
  if (!header) Fail("the header " + line);
  // Dtypes first, and then formats; see native_cases.py.
  a.scaled = number < 3 ? Scaled::kNone : static_cast<Scaled>(number - 2);
  const bool is_scaled = a.scaled != Scaled::kNone;
  a.q_number = a.pool_number = is_scaled ? Number::kFloat32 : static_cast<Number>(number);
  const size_t item = a.q_number == Number::kFloat32 ? 4 : 2;
  const size_t cells = pool.layers * pool.pages * pool.kv_heads * pool.page_tokens;
  const size_t pool_bytes = PageBytes(a.scaled, a.pool_number, cells * pool.head_dim);
  const size_t answers = rows.rows * rows.query_tokens * a.q_heads * pool.head_dim;
  const auto k = Read<char>(file, pool_bytes), v = Read<char>(file, pool_bytes);
  const auto q = Read<char>(file, answers * item);
  const auto table = Read<int32_t>(file, rows.rows * rows.table_width);
  const auto start = Read<int32_t>(file, rows.rows), length = Read<int32_t>(file, rows.rows);
  const auto expected = Read<float>(file, answers);
  const size_t scales = is_scaled ? cells : 0;
  const auto k_scale = Read<uint16_t>(file, scales), v_scale = Read<uint16_t>(file, scales);
  if (is_scaled) a.k_scale = k_scale.get(), a.v_scale = v_scale.get();
  if (!file) Fail(name + ": the file ends early");
  rows.table = table.get(), rows.start = start.get(), rows.length = length.get();
  a.k_pool = k.get(), a.v_pool = v.get(), a.q = q.get();

  const float tolerances[] = {2e-6f, 1.f / 256, 1.f / 2048, 2e-6f, 2e-6f, 2e-6f};
  for (int level = 0; level < JAXSERVE_ISA_LEVELS; ++level) {
    jaxserve_set_isa_limit(level);
    if (static_cast<int>(CurrentIsa()) != level) continue;
    const Kernel& kernel = CurrentKernel();
    if (WhyNotAttend(a, kernel)) continue;
    Array<char> first;
    // Narrow answers of bfloat16 pages differ where there are products of pairs; all others have
    // the same bits.
    const bool has_pairs = a.pool_number == Number::kBFloat16 && a.k_scale == nullptr &&
                           level >= static_cast<int>(Isa::kAvx512Bf16);
    for (size_t run = 0; run < 2 * pools.size(); ++run) {
      Pool* executor = pools[run % pools.size()];
      a.narrow = run >= pools.size();
      if (run == pools.size() && has_pairs) first.reset();
      Array<char> out(new char[answers * item]);
      a.out = out.get();
      RunAttention(a, kernel, *executor);
      for (size_t i = 0; i < answers; ++i) {
        const float got = AsFloat(out.get(), a.q_number, i);
        // Weights have an error of 2^-8 each then, and values are below 5.
        const float weights = a.narrow && has_pairs ? 5.f / 256 : 0;
        const float most = tolerances[number] * (1 + std::fabs(expected[i])) + weights;
        if (!(std::fabs(got - expected[i]) <= most)) {
          std::ostringstream what;
          what << name << " on level " << level << ": number " << i << " is " << got << ", not "
               << expected[i];
          Fail(what.str());
        }
      }
      if (first && std::memcmp(first.get(), out.get(), answers * item) != 0) {
        Fail(name + ": the number of threads, or what is narrow, changed a bit");
      }
      first = std::move(out);
    }
  }
  if (name.rfind(kSharing, 0) == 0) CheckSharing(name, a, answers * item, *pools[0], *pools[1]);
  a.narrow = false;
  for (Pool* executor : pools) {
    CheckRagged(name, a, pool_bytes, *executor);
    if (is_scaled) {
      CheckQuantizedAppend(name, a, k.get(), *executor);
    } else {
      CheckAppend(name, a, k.get(), pool_bytes, *executor);
    }
  }
}

// More loops at once than the pool has threads, some of them inside the pool's own tasks.
void CheckLoopsShareThreads(Pool& pool) {
  std::atomic<int64_t> sum{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 8; ++caller) {
    callers.emplace_back([&] {
      for (int turn = 0; turn < 200; ++turn) {
        ParallelFor(pool, 7, [&](int64_t outer) {
          if (outer == 3) ParallelFor(pool, 5, [&](int64_t inner) { sum += inner; });
          sum += outer;
        });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  if (sum != 8 * 200 * (21 + 10)) Fail("parallel loops");
}

// Against sums of all numbers with the signs of a Walsh-Hadamard matrix.
void CheckRotate(const std::vector<Pool*>& pools) {
  for (const auto& [vectors, head_dim] : std::vector<std::pair<int64_t, int64_t>>{
           {700, 64}, {3, 96}, {130, 256}, {5, 2}, {2, 7}, {0, 64}}) {
    const int64_t count = vectors * head_dim, block = head_dim & -head_dim;
    Array<float> numbers(new float[count]), out(new float[count]);
    for (int64_t i = 0; i < count; ++i) numbers[i] = static_cast<float>(i * 37 % 101) - 50;
    for (Pool* pool : pools) {
      RunRotate(numbers.get(), vectors, head_dim, out.get(), *pool);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t first = i / block * block;
        double sum = 0;
        for (int64_t j = 0; j < block; ++j) {
          sum += __builtin_parityll((i - first) & j) ? -numbers[first + j] : numbers[first + j];
        }
        if (std::abs(sum / std::sqrt(static_cast<double>(block)) - out[i]) > 1e-4) {
          Fail("rotate: another number");
        }
      }
    }
  }
}

}  // namespace

int main(int, char** arguments) {
  std::ifstream file(arguments[1], std::ios::binary);
  Pool one(1), two(2), five(5);
  const std::vector<Pool*> pools = {&one, &two, &five};
  int cases = 0;
  MatmulCounts matmuls;
  for (std::string line; std::getline(file, line);) {
    if (line.rfind(kMatmulLine, 0) == 0) {
      CheckMatmul(line, file, pools, matmuls);
    } else if (line.rfind(kFeedForwardLine, 0) == 0) {
      CheckFeedForward(line, file, pools, matmuls);
    } else {
      CheckCase(line, file, pools);
      ++cases;
    }
  }
  if (cases == 0 || matmuls.cases == 0) Fail(std::string("no case in ") + arguments[1]);
  CheckRotate(pools);
  CheckLoopsShareThreads(two);
  std::cout << cases << " cases of attention\n" << matmuls.cases << " of products, run";
  for (int level = 0; level < JAXSERVE_ISA_LEVELS; ++level) {
    std::cout << " " << matmuls.runs[level] << " times on level " << level
              << (level + 1 < JAXSERVE_ISA_LEVELS ? "," : "\n");
  }
}
