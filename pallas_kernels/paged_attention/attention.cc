#include "attention.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "native/memory.h"

namespace jaxserve {
namespace {

// Multiplications that one thread does sooner than another one wakes up: about 10 microseconds.
constexpr int64_t kAloneProducts = 1 << 18;
// Tiles for each thread from which on there is no need to cut them.
constexpr int64_t kPlentyOfTiles = 4;
// Decoding rows with the same pages in front, from which on their common parts are computed first.
constexpr int64_t kSharingRows = 4;

struct SharedMemory;

// A tile's softmaxes over the parts that it shares, which stand before its own; none when there are
// no parts. Those of other rows lie around them.
struct SharedParts {
  Softmax first;
  int64_t parts = 0;
  int64_t part_floats;  // From one part to the next.

  Softmax Part(int64_t part) const {
    const int64_t floats = part * part_floats;
    return {first.maximum + floats, first.total + floats, first.weighted + floats};
  }
};

// One tile with the keys that any of its queries sees, but for those of shared parts.
struct Job {
  Tile tile;
  int64_t first;
  int64_t end;
  SharedParts shared;

  int64_t first_part() const { return first / kPartKeys; }
  int64_t parts() const {
    return end > first ? (end + kPartKeys - 1) / kPartKeys - first_part() : 0;
  }
  int64_t products() const { return 2 * (end - first) * tile.vectors() * tile.head_dim; }
  int64_t state_floats() const { return tile.vectors() * (tile.head_dim + 2); }
};

// The float32 memory of one thread: scratch and two states.
int64_t ScratchFloats(int64_t vectors, int64_t head_dim) {
  return vectors * head_dim + 2 * kBlockKeys * (head_dim + 1) + vectors * kBlockKeys +
         2 * vectors * (head_dim + 2);
}

Softmax CutState(float*& memory, const Tile& tile) {
  Softmax state;
  state.weighted = memory;
  state.maximum = state.weighted + tile.vectors() * tile.head_dim;
  state.total = state.maximum + tile.vectors();
  memory = state.total + tile.vectors();
  return state;
}

struct ThreadState {
  Scratch scratch;
  Softmax part;
  Softmax whole;
};

ThreadState CutThreadMemory(const Tile& tile) {
  const int64_t vectors = tile.vectors(), head_dim = tile.head_dim;
  float* memory = ThreadMemory<Tile>(ScratchFloats(vectors, head_dim));
  ThreadState state;
  state.scratch.k = memory;
  state.scratch.v = state.scratch.k + kBlockKeys * head_dim;
  state.scratch.scores = state.scratch.v + kBlockKeys * head_dim;
  state.scratch.k_scale = state.scratch.scores + vectors * kBlockKeys;
  state.scratch.v_scale = state.scratch.k_scale + kBlockKeys;
  state.scratch.q = state.scratch.v_scale + kBlockKeys;
  memory = state.scratch.q + vectors * head_dim;
  state.part = CutState(memory, tile);
  state.whole = CutState(memory, tile);
  return state;
}

void AttendPart(const Job& job, const Kernel& kernel, int64_t part, const Scratch& scratch,
                const Softmax& state) {
  const int64_t begin = (job.first_part() + part) * kPartKeys;
  kernel.attend(job.tile, std::max(begin, job.first), std::min(begin + kPartKeys, job.end),
                scratch, state);
}

// Makes the first part the whole.
void Begin(const Tile& tile, const Softmax& part, const Softmax& whole) {
  std::copy_n(part.maximum, tile.vectors(), whole.maximum);
  std::copy_n(part.total, tile.vectors(), whole.total);
  std::copy_n(part.weighted, tile.vectors() * tile.head_dim, whole.weighted);
}

void RunWhole(const Job& job, const Kernel& kernel) {
  const ThreadState state = CutThreadMemory(job.tile);
  kernel.load(job.tile, state.scratch);
  if (job.shared.parts > 0) Begin(job.tile, job.shared.first, state.whole);
  for (int64_t part = 1; part < job.shared.parts; ++part) {
    kernel.merge(job.tile, job.shared.Part(part), state.whole);
  }
  for (int64_t part = 0; part < job.parts(); ++part) {
    const bool is_first = part == 0 && job.shared.parts == 0;
    AttendPart(job, kernel, part, state.scratch, is_first ? state.whole : state.part);
    if (!is_first) kernel.merge(job.tile, state.part, state.whole);
  }
  kernel.store(job.tile, state.whole);
}

// Every part of every job by itself, then a merge of each job's.
void RunCut(const std::vector<Job>& jobs, const Kernel& kernel, Executor& executor) {
  struct Piece {
    const Job* job;
    int64_t part;
    Softmax state;
  };
  int64_t floats = 0;
  for (const Job& job : jobs) floats += job.parts() * job.state_floats();
  const std::unique_ptr<float[]> memory(new float[floats]);  // Not zeroed: attend does that.
  std::vector<Piece> pieces;
  float* next = memory.get();
  for (const Job& job : jobs) {
    for (int64_t part = 0; part < job.parts(); ++part) {
      pieces.push_back({&job, part, CutState(next, job.tile)});
    }
  }
  ParallelFor(executor, pieces.size(), [&](int64_t item) {
    const Piece& piece = pieces[item];
    const Scratch scratch = CutThreadMemory(piece.job->tile).scratch;
    kernel.load(piece.job->tile, scratch);
    AttendPart(*piece.job, kernel, piece.part, scratch, piece.state);
  });
  const Piece* first = pieces.data();
  SerialFor(jobs.size(), [&](int64_t number) {
    const Job& job = jobs[number];
    for (int64_t part = 1; part < job.parts(); ++part) {
      kernel.merge(job.tile, first[part].state, first->state);
    }
    kernel.store(job.tile, first->state);
    first += job.parts();
  });
}

// Zeros are the answer of places that no row has.
void ClearPadding(const Attention& a) {
  const int64_t place_bytes = a.q_heads * a.pool.head_dim * NumberBytes(a.q_number);
  std::vector<bool> is_real(a.rows.places());
  for (int64_t row = 0; row < a.rows.rows; ++row) {
    std::fill_n(is_real.begin() + a.rows.First(row), a.rows.Length(row), true);
  }
  for (int64_t place = 0; place < a.rows.places(); ++place) {
    if (is_real[place]) continue;
    std::memset(static_cast<char*>(a.out) + place * place_bytes, 0, place_bytes);
  }
}

// The row's tiles with at least one visible key; everything else of its answer is zeros.
void AddJobs(const Attention& a, int64_t row, std::vector<Job>& jobs) {
  const PoolShape& pool = a.pool;
  const int64_t group = a.q_heads / pool.kv_heads;
  const int64_t q_bytes = NumberBytes(a.q_number);
  const int64_t token_stride = a.q_heads * pool.head_dim;
  const int64_t row_offset = a.rows.First(row) * token_stride;
  const int64_t length = a.rows.Length(row);
  const int64_t tile_tokens = std::max<int64_t>(kTileVectors / group, 1);
  for (int64_t first = 0; first < length; first += tile_tokens) {
    for (int64_t head = 0; head < pool.kv_heads; ++head) {
      const int64_t offset = row_offset + first * token_stride + head * group * pool.head_dim;
      const int64_t page_stride = pool.kv_heads * pool.page_tokens;
      const int64_t first_token = a.layer * pool.pages * page_stride + head * pool.page_tokens;
      const int64_t pool_offset =
          PageBytes(a.scaled, a.pool_number, first_token * pool.head_dim);
      Job job;
      Tile& tile = job.tile;
      tile.q_number = a.q_number;
      tile.pool_number = a.pool_number;
      tile.q = static_cast<const char*>(a.q) + offset * q_bytes;
      tile.out = static_cast<char*>(a.out) + offset * q_bytes;
      tile.token_stride = token_stride;
      tile.tokens = std::min(tile_tokens, length - first);
      tile.group = group;
      tile.head_dim = pool.head_dim;
      tile.k = static_cast<const char*>(a.k_pool) + pool_offset;
      tile.v = static_cast<const char*>(a.v_pool) + pool_offset;
      const bool is_scaled = a.scaled != Scaled::kNone;
      tile.scaled = a.scaled;
      tile.k_scale = is_scaled ? a.k_scale + first_token : nullptr;
      tile.v_scale = is_scaled ? a.v_scale + first_token : nullptr;
      tile.page_stride = page_stride;
      tile.page_tokens = pool.page_tokens;
      tile.pages = pool.pages;
      tile.table = a.rows.table + row * a.rows.table_width;
      tile.first_position = int64_t{a.rows.start[row]} + first;
      tile.context = a.rows.table_width * pool.page_tokens;
      tile.window = a.window;
      tile.scale = a.scale;
      tile.softcap = a.softcap;
      tile.narrow = a.narrow;
      tile.reads_from = tile.KeyFirst(0);
      tile.reads_to = 0;
      tile.next = nullptr;
      job.first = tile.KeyFirst(0);
      job.end = tile.KeyEnd(tile.tokens - 1);
      if (job.parts() > 0) {
        jobs.push_back(job);
      } else {
        for (int64_t token = 0; token < tile.tokens; ++token) {
          std::memset(static_cast<char*>(tile.out) + token * token_stride * q_bytes, 0,
                      group * pool.head_dim * q_bytes);
        }
      }
    }
  }
}

// -- shared parts --------------------------------------------------------------------------------

// Rows of one new token that follow each other in the table and among the places, and how many parts
// of their keys lie in the same pages.
struct Sharers {
  int64_t row;
  int64_t rows;
  int64_t parts;
};

// Parts whose keys a decoding row sees all of; of rows that do not decode, none.
int64_t WholeParts(const Attention& a, int64_t row) {
  if (a.rows.Length(row) != 1 || a.window > 0) return 0;
  const int64_t context = a.rows.table_width * a.pool.page_tokens;
  return std::min<int64_t>(int64_t{a.rows.start[row]} + 1, context) / kPartKeys;
}

// Parts that two rows share, of the first so many.
int64_t CommonParts(const Attention& a, int64_t row, int64_t other, int64_t parts) {
  const int32_t* table = a.rows.table + row * a.rows.table_width;
  const int32_t* beside = a.rows.table + other * a.rows.table_width;
  const int64_t pages = (parts * kPartKeys + a.pool.page_tokens - 1) / a.pool.page_tokens;
  const int64_t same = std::mismatch(table, table + pages, beside).first - table;
  return std::min(parts, same * a.pool.page_tokens / kPartKeys);
}

std::vector<Sharers> FindSharers(const Attention& a) {
  std::vector<Sharers> found;
  const int64_t group = a.q_heads / a.pool.kv_heads;
  const int64_t most = std::max<int64_t>(kTileVectors / group, 1);
  for (int64_t row = 0; row < a.rows.rows;) {
    Sharers some = {row, 1, WholeParts(a, row)};
    for (int64_t next = row + 1; next < a.rows.rows && some.rows < most; ++next) {
      const int64_t parts = CommonParts(a, row, next, std::min(some.parts, WholeParts(a, next)));
      if (parts == 0 || a.rows.First(next) != a.rows.First(row) + some.rows) break;
      some.parts = parts, ++some.rows;
    }
    if (some.rows >= kSharingRows && some.parts > 0) found.push_back(some);
    row += some.rows;
  }
  return found;
}

// Computes the parts that decoding rows share, each once for all of its rows, and leaves jobs the
// rest. A query's numbers are those that it has alone: its part begins from nothing either way.
//
// A row that decodes and sees whole parts has a job for each head, from first_job[row] on.
void RunShared(const Attention& a, const Kernel& kernel, Executor& executor,
               const std::vector<int64_t>& first_job, std::vector<Job>& jobs) {
  struct Piece {
    Job job;
    int64_t part;
    Softmax state;
  };
  std::vector<Sharers> sharers = FindSharers(a);
  const int64_t heads = a.pool.kv_heads;
  int64_t floats = 0;
  for (const Sharers& some : sharers) {
    floats += some.parts * some.rows * a.q_heads * (a.pool.head_dim + 2);
  }
  if (floats == 0 || floats > kMaxPartFloats) return;
  float* next = ThreadMemory<SharedMemory>(floats);
  std::vector<Piece> pieces;
  for (const Sharers& some : sharers) {
    for (int64_t head = 0; head < heads; ++head) {
      const auto job_of = [&](int64_t row) -> Job& { return jobs[first_job[row] + head]; };
      Job together = job_of(some.row);
      Tile& tile = together.tile;
      tile.tokens = some.rows;
      tile.first_position = tile.context - 1;  // All see all keys of these parts.
      together.first = 0, together.end = some.parts * kPartKeys;
      SharedParts shared;
      shared.parts = some.parts;
      shared.part_floats = together.state_floats();
      for (int64_t part = 0; part < some.parts; ++part) {
        pieces.push_back({together, part, CutState(next, tile)});
      }
      const Softmax first = pieces[pieces.size() - some.parts].state;
      for (int64_t number = 0; number < some.rows; ++number) {
        Job& job = job_of(some.row + number);
        const int64_t vector = number * tile.group;
        shared.first = {first.maximum + vector, first.total + vector,
                        first.weighted + vector * tile.head_dim};
        job.shared = shared;
        job.first = job.tile.reads_from = together.end;
      }
    }
  }
  ParallelFor(executor, pieces.size(), [&](int64_t item) {
    const Piece& piece = pieces[item];
    const Scratch scratch = CutThreadMemory(piece.job.tile).scratch;
    kernel.load(piece.job.tile, scratch);
    AttendPart(piece.job, kernel, piece.part, scratch, piece.state);
  });
}

}  // namespace

const char* WhyNotAttend(const Attention& a, const Kernel& kernel) {
  if (a.pool.head_dim % 16 != 0 || a.pool.head_dim > kMaxHeadDim) {
    return "head_dim is not a multiple of 16 up to 256";
  }
  if (a.q_heads % a.pool.kv_heads != 0 || a.q_heads / a.pool.kv_heads > kMaxGroup) {
    return "query heads are not 1 to 128 for each key head";
  }
  const bool has_float16 = a.q_number == Number::kFloat16 ||
                           (a.scaled == Scaled::kNone && a.pool_number == Number::kFloat16);
  if (has_float16 && !kernel.has_float16) return "no float16 on this instruction set";
  return nullptr;
}

void RunAttention(const Attention& attention, const Kernel& kernel, Executor& executor) {
  ClearPadding(attention);
  std::vector<Job> jobs;
  std::vector<int64_t> first_job(attention.rows.rows);
  for (int64_t row = attention.rows.rows - 1; row >= 0; --row) {
    first_job[row] = jobs.size();
    AddJobs(attention, row, jobs);
  }
  int64_t products = 0, parts = 0, part_floats = 0;
  for (const Job& job : jobs) {
    products += job.products();
    parts += job.parts();
    part_floats += job.parts() * job.state_floats();
  }
  const int64_t count = jobs.size();
  if (products <= kAloneProducts || executor.threads() <= 1) {
    SerialFor(count, [&](int64_t item) { RunWhole(jobs[item], kernel); });
  } else if (count < kPlentyOfTiles * executor.threads() && parts > count &&
             part_floats <= kMaxPartFloats) {
    RunCut(jobs, kernel, executor);
  } else {
    RunShared(attention, kernel, executor, first_job, jobs);
    // The last tiles of a prompt see the most keys: taken first, they leave no long tail. A thread
    // takes all heads of one where there are many, and so knows what it will read next.
    const int64_t heads = attention.pool.kv_heads;
    const int64_t taken = count >= kPlentyOfTiles * executor.threads() * heads ? heads : 1;
    for (int64_t number = 0; number < count; ++number) {
      jobs[number].tile.reads_to = jobs[number].end;
      if (number % taken > 0) jobs[number].tile.next = &jobs[number - 1].tile;
    }
    const int64_t items = (count + taken - 1) / taken;
    ParallelFor(executor, items, [&](int64_t item) {
      const int64_t first = (items - 1 - item) * taken;
      for (int64_t number = std::min(first + taken, count) - 1; number >= first; --number) {
        RunWhole(jobs[number], kernel);
      }
    });
  }
}

const Kernel& CurrentKernel() {
  static const Kernel* const kernels[] = JAXSERVE_BY_ISA(kKernel);
  return *kernels[static_cast<int>(CurrentIsa())];
}

}  // namespace jaxserve
