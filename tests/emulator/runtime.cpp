// An emulated multiprocessor: one block at a time, its threads as fibers that take turns in a random order.
//
// What happens on its way somewhere else on a GPU happens here as early or as late as it may, by a coin: bulk copies
// when they are issued, later, or once nothing else can go on; matrix instructions once all of a warpgroup have issued
// them, or when one of it waits. So what reads too early or overwrites too early shows as a wrong value.
// Who waits for what never comes is an error.
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <map>
#include <random>
#include <vector>

#include "emulated.h"

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr int kShared = 256 << 10, kBarriers = 16, kWarpgroup = 128;

struct Copy {
  bool box;
  void* to;
  const void* from;
  int bytes;
  uint64_t* barrier;
  int at[5];
};

struct Issued {  // a matrix instruction that a thread has not waited for
  long number;
  const float* accumulators;
  int columns;
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool begun, done, dependent;  // dependent: has called begin_dependent()
  const char* waits;
  int exchanges;            // with its warp, so far
  long issued;              // matrix instructions, so far
  std::deque<Issued> flying;
  std::vector<long> groups;  // how many had been issued at each commit
  std::vector<Copy> words;   // into shared memory, which come as late as they are waited for
  std::vector<Copy> stores;  // out of shared memory, which may be read as late as it is waited for
  std::vector<size_t> sent;  // how many of them there were at each end of a group
};

struct Meeting {  // of threads at a barrier
  int arrived, generation, gathered, result;
};

struct Warp {
  char given[2][32][24];
  int arrived[2], left[2];
};

struct Product {
  uint64_t x, y;
  int columns, bfloat, anew, threads;
  float* accumulators[kWarpgroup];
};

struct Warpgroup {
  std::deque<Product> waiting;
  long finished;
};

struct Map {  // as device.py packs it: dims are C, W, H, D, N, or W, H, D, C, N of planes
  uint64_t pointer, strides[4];  // strides in bytes, of all but the first
  uint32_t sizes[5], box[5], itemsize, planes;  // rows are swizzled
};

std::mt19937 chance(0);
std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<Warpgroup> warpgroups;
std::vector<Copy> copies;
std::map<const void*, std::vector<max_align_t>> variables;  // in static shared memory
Meeting meetings[kBarriers];
jmp_buf scheduler, failed;
char message[512];
int current, alive;
bool moved, eager;
long products;  // matrix instructions of a warpgroup, of the last launch
void (*body)(void**);
void** parameters;
uint8_t* dynamic;
int dynamic_bytes;

uint8_t* stacks() {
  static uint8_t* const memory = (uint8_t*)mmap(nullptr, kStack * 1024, PROT_READ | PROT_WRITE,
                                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory;
}

uint8_t* shared_memory() {
  static uint8_t* const memory = (uint8_t*)aligned_alloc(1024, kShared + 1024);
  return memory;
}

int left_early;  // threads

void enter() {
  body(parameters);
  if (!fibers[current].words.empty()) emulated_fail("a thread ends before its words are in shared memory");
  if (!fibers[current].stores.empty()) emulated_fail("a thread ends before its stores have read shared memory");
  if (!fibers[current].dependent) ++left_early;
  fibers[current].done = moved = true;
  --alive;
  _longjmp(scheduler, 1);
}

void yield(const char* why) {
  fibers[current].waits = why;
  if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}

template <class Ready>
void wait_until(const char* why, Ready ready) {
  while (!ready()) yield(why);
  moved = true;
}

void take_turns() {
  yield("its turn");
  moved = true;
}

void resume(int number) {
  current = number;
  threadIdx = {(unsigned)number, 0, 0};
  Fiber& f = fibers[number];
  if (_setjmp(scheduler)) return;
  if (f.begun) _longjmp(f.at, 1);
  f.begun = true;
  setcontext(&f.start);
}

// --- mbarriers: arrivals of a phase, those that are missing, the phase, bytes that are missing ---------------
// `unseen`: nobody has waited for the phase that ended last.
struct Barrier {
  uint64_t arrivals : 12, missing : 12, phase : 1, unseen : 1, valid : 6;
  int64_t bytes : 32;
};
static_assert(sizeof(Barrier) == 8);

void settle(Barrier* b) {
  if (b->missing == 0 && b->bytes == 0) {
    if (b->unseen) emulated_fail("a phase of a barrier ends, and nobody has waited for the one before");
    b->phase ^= 1, b->missing = b->arrivals, b->unseen = 1;
  }
  moved = true;
}

Barrier* barrier_at(uint64_t* at) {
  Barrier* b = (Barrier*)at;
  if (b->valid != 0x15) emulated_fail("a barrier that was not initialised");
  return b;
}

// --- copies -----------------------------------------------------------------------------------------------
uint32_t swizzled(uint32_t address, int row_bytes) {
  const uint32_t mask = row_bytes == 128 ? 7 : row_bytes == 64 ? 3 : 1;
  return address ^ (address >> 7 & mask) << 4;
}

void check_shared(const void* at, size_t bytes) {
  if ((uint8_t*)at < dynamic || (uint8_t*)at + bytes > dynamic + dynamic_bytes) emulated_fail("a copy leaves the shared memory");
}

void finish(const Copy& c) {
  if (!c.box) {
    memcpy(c.to, c.from, c.bytes);
    barrier_at(c.barrier)->bytes -= c.bytes;
    settle(barrier_at(c.barrier));
    return;
  }
  Map m;
  memcpy(&m, c.from, sizeof m);
  const int row_bytes = m.box[0] * m.itemsize, each = 16 / m.itemsize;
  const uint32_t first = emulated_address(c.to);
  uint32_t row = 0;
  for (uint32_t n = 0; n < m.box[4]; ++n)
    for (uint32_t d = 0; d < m.box[3]; ++d)
      for (uint32_t h = 0; h < m.box[2]; ++h)
        for (uint32_t w = 0; w < m.box[1]; ++w, ++row)
          for (int unit = 0; unit < row_bytes / 16; ++unit) {
            const int64_t at[5] = {c.at[0] + unit * each, c.at[1] + (int)w, c.at[2] + (int)h, c.at[3] + (int)d, c.at[4] + (int)n};
            bool inside = true;
            for (int i = 1; i < 5; ++i) inside &= at[i] >= 0 && at[i] < m.sizes[i];
            const uint32_t linear = first + row * row_bytes + unit * 16;
            uint8_t* to = dynamic + ((m.planes ? linear : swizzled(linear, row_bytes)) - emulated_address(dynamic));
            const uint8_t* from = (const uint8_t*)m.pointer + at[0] * (int64_t)m.itemsize;
            for (int i = 1; i < 5; ++i) from += at[i] * (int64_t)m.strides[i - 1];
            for (int k = 0; k < each; ++k) {
              if (inside && at[0] + k >= 0 && at[0] + k < m.sizes[0])
                memcpy(to + k * m.itemsize, from + k * (int)m.itemsize, m.itemsize);
              else
                memset(to + k * m.itemsize, 0, m.itemsize);
            }
          }
  barrier_at(c.barrier)->bytes -= row * row_bytes;
  settle(barrier_at(c.barrier));
}

void finish_some(bool all_stand) {
  std::shuffle(copies.begin(), copies.end(), chance);
  size_t count = all_stand ? 1 : chance() % 2;
  while (count-- && !copies.empty()) {
    const Copy c = copies.back();
    copies.pop_back();
    finish(c);
  }
}

// --- matrix instructions ------------------------------------------------------------------------------------
float half_at(const uint8_t* at, bool bfloat) {
  uint16_t bits;
  memcpy(&bits, at, 2);
  if (bfloat) return __uint_as_float((uint32_t)bits << 16);
  const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000u | (rest & 0x3ff) << 13);
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest << 13) * 0x1p112f));
}

// `rows` rows of 16 numbers, as a descriptor tells where they are.
void gather_rows(uint64_t descriptor, int rows, bool bfloat, float (*to)[16]) {
  const uint32_t first = (descriptor & 0x3fff) << 4, group = (descriptor >> 32 & 0x3fff) << 4;
  const int kind = descriptor >> 62, row_bytes = kind == 1 ? 128 : kind == 2 ? 64 : 32;
  const uint32_t base = emulated_address(dynamic) & 0x3ffff;
  for (int r = 0; r < rows; ++r)
    for (int unit = 0; unit < 2; ++unit) {
      const uint32_t at = swizzled(first + r / 8 * group + r % 8 * row_bytes + unit * 16, row_bytes);
      if (at < base || at + 16 > base + dynamic_bytes) emulated_fail("a matrix instruction leaves the shared memory");
      for (int k = 0; k < 8; ++k) to[r][unit * 8 + k] = half_at(dynamic + (at - base) + k * 2, bfloat);
    }
}

void multiply(Warpgroup& group) {
  const Product p = group.waiting.front();
  group.waiting.pop_front();
  ++group.finished, ++products;
  static float x[64][16], y[256][16];
  gather_rows(p.x, 64, p.bfloat, x), gather_rows(p.y, p.columns, p.bfloat, y);
  for (int thread = 0; thread < kWarpgroup; ++thread)
    for (int i = 0; i < p.columns / 2; ++i) {
      const int row = thread / 32 * 16 + (i / 2 & 1) * 8 + (thread & 31) / 4, column = i / 4 * 8 + (thread & 3) * 2 + (i & 1);
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += x[row][k] * y[column][k];
      p.accumulators[thread][i] = p.anew ? sum : p.accumulators[thread][i] + sum;
    }
}

}  // namespace

// --- what kernels call -----------------------------------------------------------------------------------------
extern "C" {

void emulated_seed(unsigned seed) { chance.seed(seed); }

void emulated_fail(const char* why) {
  snprintf(message, sizeof message, "%s (block %u %u %u, thread %u)", why, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
  _longjmp(failed, 1);
}

uint8_t* emulated_dynamic() { return dynamic; }

void* emulated_static(const void* which, int bytes) {
  auto& memory = variables[which];
  if (memory.empty()) {
    memory.resize(bytes / sizeof(max_align_t) + 1);
    memset(memory.data(), 0xff, memory.size() * sizeof(max_align_t));
  }
  return memory.data();
}

uint32_t emulated_address(const void* shared) { return (uint32_t)((const uint8_t*)shared - shared_memory()); }

void emulated_meet(int barrier, int threads) {
  Meeting& m = meetings[barrier];
  const int generation = m.generation;
  ++m.arrived;
  wait_until("bar.sync", [&] {
    if (m.generation == generation && m.arrived >= (threads ? threads : alive)) {
      if (m.arrived > (threads ? threads : alive)) emulated_fail("too many threads at a barrier");
      ++m.generation, m.arrived = 0, m.result = m.gathered, m.gathered = 0;
    }
    return m.generation != generation;
  });
}

int emulated_meet_or(int value) {
  meetings[0].gathered |= value != 0;
  emulated_meet(0, 0);
  return meetings[0].result;
}

void emulated_warp(const void* given, void* all, int size) {
  const int number = current, lane = number & 31, phase = fibers[number].exchanges++ & 1;
  Warp& w = warps[number / 32];
  memcpy(w.given[phase][lane], given, size);
  ++w.arrived[phase];
  wait_until("the other lanes of its warp", [&] { return w.arrived[phase] == 32; });
  for (int i = 0; i < 32; ++i) memcpy((char*)all + i * size, w.given[phase][i], size);
  if (++w.left[phase] == 32) w.arrived[phase] = w.left[phase] = 0;
}

void emulated_barrier_init(uint64_t* at, int arrivals) {
  Barrier b = {};
  b.arrivals = b.missing = arrivals, b.valid = 0x15;
  memcpy(at, &b, 8);
}

void emulated_barrier_arrive(uint64_t* at, int bytes) {
  Barrier* b = barrier_at(at);
  b->bytes += bytes;
  --b->missing;
  settle(b);
  if (chance() % 8 == 0) take_turns();
}

void emulated_barrier_wait(uint64_t* at, int parity) {
  Barrier* b = barrier_at(at);
  wait_until("an mbarrier", [&] { return (int)b->phase != parity; });
  b->unseen = 0;
}

int emulated_barrier_ready(uint64_t* at, int parity) {
  if (chance() % 2) take_turns();
  Barrier* b = barrier_at(at);
  if ((int)b->phase != parity) b->unseen = 0;
  return (int)b->phase != parity;
}

void emulated_copy(void* to, const void* from, int bytes, uint64_t* barrier) {
  if (bytes % 16 || (uintptr_t)from % 16 || emulated_address(to) % 16) emulated_fail("a copy that is not aligned to 16 bytes");
  check_shared(to, bytes);
  copies.push_back({false, to, from, bytes, barrier, {}});
}

void emulated_copy_box(void* to, const void* map, uint64_t* barrier, const int* at) {
  Map m;
  memcpy(&m, map, sizeof m);
  if (emulated_address(to) % 128 || m.pointer % 16) emulated_fail("a box that is not aligned");
  if (at[0] * (int64_t)m.itemsize % 16) emulated_fail("a box that begins beside a multiple of 16 bytes");
  for (int i = 0; i < 5; ++i)
    if (m.box[i] > 256) emulated_fail("a box with a side of more than 256");
  check_shared(to, (size_t)m.box[0] * m.box[1] * m.box[2] * m.box[3] * m.box[4] * m.itemsize);
  Copy c = {true, to, map, 0, barrier, {}};
  std::copy(at, at + 5, c.at);
  copies.push_back(c);
}

void emulated_copy_word(void* to, const void* from) {
  if ((uintptr_t)from % 4 || emulated_address(to) % 4) emulated_fail("a word that is not aligned");
  check_shared(to, 4);
  fibers[current].words.push_back({false, to, from, 4, nullptr, {}});
}

void emulated_copied_words() {
  if (chance() % 2) yield("its turn");
  for (const Copy& c : fibers[current].words) memcpy(c.to, c.from, c.bytes);
  moved = true;
  fibers[current].words.clear();
}

void emulated_store(void* to, const void* from, int bytes) {
  if (bytes % 16 || (uintptr_t)to % 16 || emulated_address(from) % 16) emulated_fail("a store that is not aligned to 16 bytes");
  check_shared(from, bytes);
  fibers[current].stores.push_back({false, to, from, bytes, nullptr, {}});
}

void emulated_store_group() { fibers[current].sent.push_back(fibers[current].stores.size()); }

void emulated_stored(int pending) {
  if (chance() % 2) take_turns();
  Fiber& f = fibers[current];
  if ((int)f.sent.size() <= pending) return;
  const size_t end = f.sent[f.sent.size() - 1 - pending];
  for (size_t i = 0; i < end; ++i) memcpy(f.stores[i].to, f.stores[i].from, f.stores[i].bytes);
  f.stores.erase(f.stores.begin(), f.stores.begin() + end);
  f.sent.erase(f.sent.begin(), f.sent.end() - pending);
  for (size_t& at : f.sent) at -= end;
}

void emulated_wgmma(float* accumulators, uint64_t x, uint64_t y, int columns, int bfloat, int anew) {
  Fiber& f = fibers[current];
  Warpgroup& group = warpgroups[current / kWarpgroup];
  for (const Issued& other : f.flying)  // each thread has half as many accumulators as the instruction has columns
    if (other.columns != columns && other.accumulators < accumulators + columns / 2 && accumulators < other.accumulators + other.columns / 2)
      emulated_fail("a product adds to what one of another shape, not waited for, adds to");
  f.flying.push_back({f.issued, accumulators, columns});
  const size_t at = f.issued++ - group.finished;
  if (at == group.waiting.size()) group.waiting.push_back({x, y, columns, bfloat, anew, 0, {}});
  Product& p = group.waiting[at];
  if (p.x != x || p.y != y || p.columns != columns || p.anew != anew) emulated_fail("threads of a warpgroup issue different products");
  p.accumulators[current % kWarpgroup] = accumulators;
  if (++p.threads == kWarpgroup && eager)
    while (!group.waiting.empty() && group.waiting.front().threads == kWarpgroup) multiply(group);
}

void emulated_wgmma_commit() { fibers[current].groups.push_back(fibers[current].issued); }

void emulated_wgmma_wait(int pending) {
  Fiber& f = fibers[current];
  Warpgroup& group = warpgroups[current / kWarpgroup];
  if ((int)f.groups.size() <= pending) return;
  const long wanted = f.groups[f.groups.size() - 1 - pending];
  wait_until("its warpgroup's products", [&] {
    while (group.finished < wanted && !group.waiting.empty() && group.waiting.front().threads == kWarpgroup) multiply(group);
    return group.finished >= wanted;
  });
  f.groups.erase(f.groups.begin(), f.groups.end() - pending);
  while (!f.flying.empty() && f.flying.front().number < wanted) f.flying.pop_front();
}

void emulated_begin_dependent() { fibers[current].dependent = true; }
int emulated_left_early() { return left_early; }
long emulated_products() { return products; }

const char* emulated_run(void (*entry)(void**), void** given, const int* grid, int block, int bytes) {
  if (block > 1024 || block % 32) return "blocks of up to 1024 threads, in whole warps";
  if (bytes > 227 << 10) return "more than 227 KiB of shared memory";
  left_early = 0, products = 0;
  body = entry, parameters = given, dynamic_bytes = bytes;
  const int offset = 16 * (int)(chance() % 64);
  dynamic = shared_memory() + (bytes + offset <= kShared ? offset : 0);
  blockDim = {(unsigned)block, 1, 1}, gridDim = {(unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2]};
  if (_setjmp(failed)) return message;
  std::vector<int> order(block);
  for (int i = 0; i < block; ++i) order[i] = i;
  const long blocks = (long)grid[0] * grid[1] * grid[2];
  const bool backwards = chance() & 1;
  for (long number = 0; number < blocks; ++number) {
    const long at = backwards ? blocks - 1 - number : number;
    blockIdx = {(unsigned)(at % grid[0]), (unsigned)(at / grid[0] % grid[1]), (unsigned)(at / grid[0] / grid[1])};
    eager = chance() & 1;
    variables.clear();
    memset(dynamic, 0xff, bytes);
    fibers.assign(block, Fiber());
    warps.assign(block / 32, Warp());
    warpgroups.assign(block / kWarpgroup + 1, Warpgroup());
    memset(meetings, 0, sizeof meetings);
    copies.clear();
    alive = block;
    for (int i = 0; i < block; ++i) {
      getcontext(&fibers[i].start);
      fibers[i].start.uc_stack.ss_sp = stacks() + i * kStack;
      fibers[i].start.uc_stack.ss_size = kStack;
      fibers[i].start.uc_link = nullptr;
      makecontext(&fibers[i].start, enter, 0);
    }
    while (alive) {
      moved = false;
      if (chance() % 4 == 0) std::rotate(order.begin(), order.begin() + chance() % block, order.end());
      for (int i : order)
        if (!fibers[i].done) resume(i);
      if (!copies.empty()) finish_some(!moved);
      if (!moved) {
        for (int i = 0; i < block; ++i)
          if (!fibers[i].done) {
            threadIdx.x = i;
            snprintf(message, sizeof message, "nothing goes on: %d threads wait, thread %d of block %u for %s", alive, i,
                     blockIdx.x, fibers[i].waits);
            return message;
          }
      }
    }
    if (!copies.empty()) return "a block ended before its copies";
  }
  return nullptr;
}
}
