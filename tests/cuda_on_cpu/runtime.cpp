// Fibers, barriers and warp exchanges behind the stand-in for the CUDA runtime.
//
// This file is never instrumented itself: what it does is the hardware's part. Under ThreadSanitizer
// (SHIM_THREAD_SANITIZER) and AddressSanitizer (SHIM_ADDRESS_SANITIZER) it tells the sanitizer about fibers and about
// the order that a barrier makes.

#include <cuda_runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#ifdef SHIM_THREAD_SANITIZER
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#define ORDER_BEFORE(barrier) __tsan_release(barrier)
#define ORDER_AFTER(barrier) __tsan_acquire(barrier)
#else
#define ORDER_BEFORE(barrier)
#define ORDER_AFTER(barrier)
#endif
#ifdef SHIM_ADDRESS_SANITIZER
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the callee-saved registers on the stack, stores the stack pointer in *save and continues on `load`.
extern "C" void shim_switch_stacks(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.globl shim_switch_stacks
.hidden shim_switch_stacks
.type shim_switch_stacks, @function
shim_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size shim_switch_stacks, .-shim_switch_stacks
.section .note.GNU-stack,"",@progbits
.text
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl shim_switch_stacks
.hidden shim_switch_stacks
.type shim_switch_stacks, %function
shim_switch_stacks:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size shim_switch_stacks, .-shim_switch_stacks
)");
#else
#error "the context switch is written for x86-64 and aarch64"
#endif

namespace shim {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxWorkers = 2;
constexpr size_t kStack = 128 * 1024;
constexpr long kPatience = 200000;  // rounds over all fibers before a barrier that nobody completes is a deadlock

// Writes that ThreadSanitizer shall not take for the program's: those of the allocator.
struct UnseenWrites {
#ifdef SHIM_THREAD_SANITIZER
  UnseenWrites() { AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  ~UnseenWrites() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__); }
#else
  UnseenWrites() {}  // not trivial: an unused variable of a trivial type would be warned about
#endif
};

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "shim: %s\n", what);
  std::abort();
}

int setting(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr || *value == 0 ? otherwise : std::atoi(value);
}

struct Barrier {
  int members = 0, arrived = 0;
  long generation = 0;
  bool any = false, result = false;
  // What ThreadSanitizer takes for the barrier, by turns: a fiber that wakes up must not be ordered after what another
  // has done on its way to the next generation.
  char turns[2] = {};

  char* turn() { return &turns[generation % 2]; }

  void complete() {
    result = any;
    any = false;
    arrived = 0;
    ++generation;
  }
};

struct Warp {
  Barrier exchange;
  float values[2][kWarp];  // two buffers, since a lane may be one exchange ahead of the others
};

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Coordinates coordinates;
  int lane = 0, index = 0;
  bool done = false;
  int exchanges = 0;
  void* tsan = nullptr;
  void* asan_stack = nullptr;
};

// One OS thread at work on blocks of a launch.
struct Worker {
  std::vector<Fiber> fibers;
  std::vector<int> next;  // a ring over the fibers, in the order in which they run
  std::vector<Warp> warps;
  std::vector<std::pair<const void*, void*>> shared;
  std::vector<void*> retired;  // shared memory of earlier blocks: ThreadSanitizer must not see it used again
  Barrier barrier;
  Fiber* current = nullptr;
  void* stack_pointer = nullptr;
  const std::function<void()>* kernel = nullptr;
  int index = 0, alive = 0;
  char* stacks = nullptr;
  void* tsan = nullptr;
  void* asan_stack = nullptr;
  const void* asan_bottom = nullptr;
  size_t asan_size = 0;
  char finished = 0;  // its address orders the kernel's writes before the end of the launch

  void run_block(dim3 block_index, dim3 grid, dim3 block, bool reversed);
  void switch_to(Fiber* fiber);
  void yield();
  void leave();
  void wait(Barrier& barrier, bool value);
  void end_launch();
};

thread_local Worker* worker = nullptr;
[[maybe_unused]] char launched = 0;  // its address orders the host before the launch

#ifdef SHIM_THREAD_SANITIZER
// The sanitizer's side of a worker's fibers. Costly to make, so blocks and launches share them: two blocks of one worker
// seem ordered where they share a fiber or a barrier. Neighbouring blocks go to different workers, which nothing orders.
std::vector<void*>& sanitizer_fibers(int worker_index) {
  static std::vector<void*> pools[kMaxWorkers];
  return pools[worker_index];
}
#endif

void fiber_main() {
  Worker* self = worker;
#ifdef SHIM_ADDRESS_SANITIZER
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (self->asan_bottom == nullptr) self->asan_bottom = bottom, self->asan_size = size;
#endif
  ORDER_AFTER(&launched);
  (*self->kernel)();
  self->leave();
}

// To `fiber`, or to the worker's own stack.
void Worker::switch_to(Fiber* fiber) {
  Fiber* from = current;
  current = fiber;
  void** save = from == nullptr ? &stack_pointer : &from->stack_pointer;
#ifdef SHIM_THREAD_SANITIZER
  __tsan_switch_to_fiber(fiber == nullptr ? tsan : fiber->tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef SHIM_ADDRESS_SANITIZER
  void** fake = from == nullptr ? &asan_stack : from->done ? nullptr : &from->asan_stack;
  __sanitizer_start_switch_fiber(fake, fiber == nullptr ? asan_bottom : fiber->stack,
                                 fiber == nullptr ? asan_size : kStack);
#endif
  shim_switch_stacks(save, fiber == nullptr ? stack_pointer : fiber->stack_pointer);
#ifdef SHIM_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(from == nullptr ? asan_stack : from->asan_stack, nullptr, nullptr);
#endif
}

void Worker::yield() {
  Fiber* fiber = &fibers[next[current->index]];
  if (fiber != current) switch_to(fiber);
}

// The current fiber's kernel has returned: barriers no longer wait for it.
void Worker::leave() {
  Warp& warp = warps[current->index / kWarp];
  for (Barrier* left : {&barrier, &warp.exchange}) {
    --left->members;
    if (left->members > 0 && left->arrived == left->members) left->complete();
  }
  ORDER_BEFORE(&finished);
  current->done = true;
  --alive;
  if (alive == 0) switch_to(nullptr);
  int previous = current->index;
  while (next[previous] != current->index) previous = next[previous];
  next[previous] = next[current->index];
  switch_to(&fibers[next[current->index]]);
  fail("a finished fiber was resumed");
}

void Worker::wait(Barrier& barrier, bool value) {
  barrier.any |= value;
  const long mine = barrier.generation;
  if (++barrier.arrived == barrier.members) {
    barrier.complete();
    return;
  }
  for (long rounds = 0; barrier.generation == mine; ++rounds) {
    if (rounds == kPatience) fail("deadlock: some threads of a block wait at a barrier that the others do not reach");
    yield();
  }
}

char* map_stacks(size_t count) {
  void* memory = mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for the stacks of a block");
  for (size_t i = 0; i < count; ++i) mprotect(static_cast<char*>(memory) + i * kStack, 4096, PROT_NONE);
  return static_cast<char*>(memory);
}

void Worker::run_block(dim3 block_index, dim3 grid, dim3 block, bool reversed) {
  const int count = static_cast<int>(block.x);
  if (block.y != 1 || block.z != 1) fail("only one-dimensional blocks are modelled");
  if (stacks == nullptr) stacks = map_stacks(count);
  for (auto& [key, memory] : shared) retired.push_back(memory);
  shared.clear();
#ifndef SHIM_THREAD_SANITIZER
  for (void* memory : retired) std::free(memory);
  retired.clear();
#endif
  {
    const UnseenWrites unseen;
    fibers.assign(count, Fiber{});
    next.resize(count);
    warps.assign((count + kWarp - 1) / kWarp, Warp{});
  }
  barrier = Barrier{count};
  alive = count;
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.index = i;
    fiber.lane = i % kWarp;
    fiber.coordinates = {dim3(i), block_index, block, grid};
    fiber.stack = stacks + i * kStack;
    next[i] = reversed ? (i + count - 1) % count : (i + 1) % count;
    ++warps[i / kWarp].exchange.members;
    // The stack as a switch leaves it, with fiber_main as the address to return to.
    void** top = reinterpret_cast<void**>(fiber.stack + kStack - 64);
#if defined(__x86_64__)
    *--top = nullptr;  // fiber_main sees an aligned stack, as if called
    *--top = reinterpret_cast<void*>(fiber_main);
    top -= 6;
#else
    top -= 20;
    top[11] = reinterpret_cast<void*>(fiber_main);  // x30
#endif
    fiber.stack_pointer = top;
#ifdef SHIM_THREAD_SANITIZER
    std::vector<void*>& pool = sanitizer_fibers(index);
    if (static_cast<int>(pool.size()) == i) pool.push_back(__tsan_create_fiber(0));
    fiber.tsan = pool[i];
#endif
  }
  switch_to(&fibers[reversed ? count - 1 : 0]);
}

void Worker::end_launch() {
  ORDER_AFTER(&finished);
  for (auto& [key, memory] : shared) std::free(memory);
  for (void* memory : retired) std::free(memory);
  if (stacks != nullptr) munmap(stacks, fibers.size() * kStack);
}

}  // namespace

const Coordinates& coordinates() { return worker->current->coordinates; }

void run(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  const long total = static_cast<long>(grid.x) * grid.y * grid.z;
  const bool reversed = setting("EPT_SHIM_REVERSED", 0) != 0;  // the last thread of a block runs first
  const long threads = std::min<long>(kMaxWorkers, total);
  ORDER_BEFORE(&launched);
  const auto work = [&](int index) {
    Worker self;
    worker = &self;
    self.index = index;
    self.kernel = &kernel;
#ifdef SHIM_THREAD_SANITIZER
    self.tsan = __tsan_get_current_fiber();
#endif
    for (long i = index; i < total; i += threads) {
      self.run_block(dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y), grid, block, reversed);
    }
    self.end_launch();
    worker = nullptr;
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& other : others) other.join();
}

// One allocation for each block and variable, so that AddressSanitizer sees its bounds. The junk is a NaN in every
// floating-point type and a large integer.
void* shared_memory(const void* key, size_t bytes, size_t alignment) {
  for (auto& [known, memory] : worker->shared) {
    if (known == key) return memory;
  }
  void* memory = nullptr;
  const UnseenWrites unseen;  // to take memory is no write by the fiber that comes first
  if (posix_memalign(&memory, std::max<size_t>(alignment, 16), bytes) != 0) fail("no memory for a block");
  for (size_t i = 0; i < bytes; ++i) static_cast<unsigned char*>(memory)[i] = i % 2 ? 0x7f : 0xff;
  worker->shared.emplace_back(key, memory);
  return memory;
}

void block_barrier() { block_barrier_or(false); }

bool block_barrier_or(bool value) {
  [[maybe_unused]] char* turn = worker->barrier.turn();
  ORDER_BEFORE(turn);
  worker->wait(worker->barrier, value);
  ORDER_AFTER(turn);
  return worker->barrier.result;
}

namespace {

Warp& whole_warp(unsigned mask) {
  if (mask != 0xffffffffu) fail("only whole warps are modelled");
  return worker->warps[worker->current->index / kWarp];
}

}  // namespace

float shuffle_down(unsigned mask, float value, unsigned distance) {
  Warp& warp = whole_warp(mask);
  Fiber& self = *worker->current;
  float* values = warp.values[self.exchanges++ % 2];
  values[self.lane] = value;
  worker->wait(warp.exchange, false);
  const unsigned source = self.lane + distance;
  return source < kWarp ? values[source] : value;
}

}  // namespace shim
