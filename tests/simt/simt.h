// CUDA source on a CPU: what a kernel of one translation unit needs in order to compile with g++ and run under test.
//
// A thread of a block is a fiber (its own stack, all on one OS thread); the blocks of a grid run one after another.
// Which fiber goes on at a synchronisation point, and which block comes next, is drawn from a seed. What a GPU leaves
// undefined is an error here, with a message, and it is found whatever the seed:
//   - two threads touch the same element of shared memory, one of them writing, with no barrier between (also within
//     a warp, where only __syncwarp orders memory: shuffles and votes do not); shared memory read before it is written,
//     or out of bounds
//   - a __syncthreads that not all threads reach, or that they reach at different lines
//   - a warp operation whose mask names a lane that is gone, does not exist or never comes; a shuffle from a lane
//     outside the mask
//   - an address that is no multiple of what is loaded or stored there (with the flags in __init__.py: of any access)
//   - a launch with an empty or too large grid or block, too much shared memory
// Out of bounds of global memory is for AddressSanitizer, which is told of the fibers.
//
// Not here: several OS threads, atomics, textures, streams that overlap, __activemask, memory that is weakly ordered.
#pragma once

#include <math.h>  // C++'s, which has exp and its like for float as well, by their bare names
#include <sys/mman.h>

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define SIMT_ASAN 0
#endif

#if !defined(SIMT_UCONTEXT) && !(defined(__ELF__) && (defined(__x86_64__) || defined(__aarch64__)))
#define SIMT_UCONTEXT
#endif
#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#endif

// ---------------------------------------------------------------------------------------------------- vector types

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};

#define SIMT_VECTOR2(name, type)          \
  struct alignas(2 * sizeof(type)) name { \
    type x, y;                            \
  };                                      \
  inline name make_##name(type x, type y) { return {x, y}; }
#define SIMT_VECTOR4(name, type)          \
  struct alignas(4 * sizeof(type)) name { \
    type x, y, z, w;                      \
  };                                      \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }
SIMT_VECTOR2(uint2, unsigned)
SIMT_VECTOR2(float2, float)
SIMT_VECTOR2(double2, double)
SIMT_VECTOR4(uint4, unsigned)
SIMT_VECTOR4(float4, float)
#undef SIMT_VECTOR2
#undef SIMT_VECTOR4

inline uint3 threadIdx, blockIdx;  // set whenever a fiber goes on
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---------------------------------------------------------------------------------------------------- the machine

namespace simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Switching stacks. swapcontext() makes two system calls each time; a few instructions do the same.
#ifndef SIMT_UCONTEXT
extern "C" void simt_switch(void** save, void* load);  // keep this stack's pointer in *save, go on where `load` stopped
#if defined(__x86_64__)
asm(R"(
    .text
    .weak simt_switch
    .hidden simt_switch
    .type simt_switch, @function
simt_switch:
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
    .size simt_switch, .-simt_switch
)");
constexpr int kFrame = 8;  // words of a frame that has never run: six registers, where to start, one for alignment
constexpr int kFrameStart = 6;
#else
asm(R"(
    .text
    .weak simt_switch
    .hidden simt_switch
    .type simt_switch, %function
simt_switch:
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
    .size simt_switch, .-simt_switch
)");
constexpr int kFrame = 20;
constexpr int kFrameStart = 11;  // x30, the link register
#endif
#endif

constexpr size_t kStack = 256 << 10;  // address space; only what is touched becomes memory
constexpr size_t kGuard = 64 << 10;   // a page or more that cannot be touched, below each stack
constexpr size_t kSharedBytes = 48 << 10;
constexpr unsigned kMaxThreads = 1024;
enum class At { running, barrier, warp, exited };
enum class Op { none, syncthreads, syncwarp, shfl, shfl_up, shfl_down, shfl_xor, ballot };

inline const char* name_of(Op op) {
  static const char* const names[] = {"nothing",        "__syncthreads",    "__syncwarp",      "__shfl_sync",
                                      "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync", "a vote"};
  return names[static_cast<int>(op)];
}

#ifdef SIMT_UCONTEXT
using Context = ucontext_t;
#else
using Context = void*;  // the stack pointer; all else lies on the stack
#endif

using Value = uint64_t;  // the bits of what a shuffle hands over

struct Fiber {
  char *stack = nullptr, *top = nullptr;  // its lowest address, and where it begins
  Context context{};
  void* fake_stack = nullptr;  // AddressSanitizer's
  uint3 index{};
  unsigned thread = 0;  // its number in the block
  At at = At::exited;
  Op op = Op::none;  // what it waits in, and where
  int line = 0;
  unsigned mask = 0;
  int argument = 0, width = 32;  // of a shuffle: source lane, distance or lane mask; segment's width
  Value value = 0;               // brought to a warp operation, and taken from it
  unsigned seen[32] = {};        // what this lane has seen, through __syncwarp, of each lane of its warp; its own clock
};

struct Meeting {  // lanes of a warp that wait for the others in their mask
  unsigned mask, arrived;
  Op op;
  int line;
};

struct Warp {
  unsigned present = 0, exited = 0;
  std::vector<Meeting> meetings;
};

// Who touched an element of shared memory since the last __syncthreads. Epochs never repeat, so nothing is ever reset.
struct Access {
  unsigned thread, clock;
};
struct Cell {
  uint64_t block = 0, write_epoch = 0, read_epoch = 0;
  Access writer{};
  std::vector<Access> readers;
};
struct Buffer {
  const char* name;
  size_t count, element;
  unsigned char* data;
  std::vector<Cell> cells;
};
struct Site {  // a declaration of shared memory: every thread of a block that passes it gets the same buffer
  const char* name;
  uint64_t block = 0;
  Buffer* buffer = nullptr;
};

class Machine {
 public:
  void seed(uint64_t s) { random_ = s * 0x9E3779B97F4A7C15ull + 0x632BE59BD9B4E019ull; }

  void launch(dim3 grid, dim3 block, size_t dynamic_bytes, void (*body)(void*), void* argument) {
    if (running_) fail("a kernel was launched from a kernel");
    const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
    if (threads == 0 || blocks == 0) throw Error("invalid launch: an empty grid or block");
    if (threads > kMaxThreads || block.z > 64) throw Error("invalid launch: more than 1024 threads in a block");
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) throw Error("invalid launch: grid too large");
    if (dynamic_bytes > kSharedBytes) throw Error("invalid launch: more than 48 KiB of shared memory");
    body_ = body;
    argument_ = argument;
    dynamic_bytes_ = dynamic_bytes;
    gridDim = grid;
    blockDim = block;
    const Running running(running_);
    while (fibers_.size() < threads) {
      // Stacks that began at equal offsets from a power of two would all compete for the same lines of the cache.
      char* stack = new_stack();
      fibers_.push_back(new Fiber{.stack = stack, .top = stack + kStack - fibers_.size() * 1088 % (kStack / 4)});
    }
    threads_ = static_cast<unsigned>(threads);
    std::vector<unsigned> order(blocks);
    for (unsigned i = 0; i < blocks; ++i) order[i] = i;
    for (size_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[draw(static_cast<unsigned>(i))]);
    for (unsigned number : order) run_block(number);
  }

  void syncthreads(int line) {
    Fiber& me = *self();
    if (exited_) {
      fail("divergent __syncthreads: thread %u waits at line %d, but %u of the block's threads have returned",
           me.thread, line, exited_);
    }
    if (waiting_ && line != barrier_line_) {
      fail("divergent __syncthreads: thread %u waits at line %d, others at line %d", me.thread, line, barrier_line_);
    }
    barrier_line_ = line;
    me.line = line;
    me.op = Op::syncthreads;
    me.at = At::barrier;
    if (++waiting_ == threads_) {
      waiting_ = 0;
      ++epoch_;
      for (unsigned i = 0; i < threads_; ++i) wake(*fibers_[i]);
    }
    pause();
  }

  // Waits for the lanes of the mask; the last to come exchanges their values.
  Value warp(Op op, int line, unsigned mask, Value value = {}, int argument = 0, int width = 32) {
    Fiber& me = *self();
    const unsigned lane = me.thread % 32;
    Warp& warp = warps_[me.thread / 32];
    if (!(mask >> lane & 1)) {
      fail("%s at line %d: lane %u calls it with mask 0x%08x, which does not name it", name_of(op), line, lane, mask);
    }
    if (mask & ~warp.present) {
      fail("%s at line %d: mask 0x%08x names lane %d, but warp %u of the block has no such lane", name_of(op), line,
           mask, __builtin_ctz(mask & ~warp.present), me.thread / 32);
    }
    if (mask & warp.exited) {
      fail("%s at line %d: mask 0x%08x names lane %d of warp %u, which has returned", name_of(op), line, mask,
           __builtin_ctz(mask & warp.exited), me.thread / 32);
    }
    me.op = op;
    me.line = line;
    me.mask = mask;
    me.argument = argument;
    me.width = width;
    me.value = value;
    Meeting* meeting = nullptr;
    for (Meeting& m : warp.meetings) meeting = m.mask == mask ? &m : meeting;
    if (!meeting) {
      warp.meetings.push_back({mask, 0, op, line});
      meeting = &warp.meetings.back();
    }
    if (meeting->op != op || meeting->line != line) {
      fail(
          "lanes of warp %u with mask 0x%08x are in different operations: lane %u in %s at line %d, others in %s "
          "at line %d",
          me.thread / 32, mask, lane, name_of(op), line, name_of(meeting->op), meeting->line);
    }
    meeting->arrived |= 1u << lane;
    me.at = At::warp;
    if (meeting->arrived == mask) {
      *meeting = warp.meetings.back();
      warp.meetings.pop_back();
      exchange(op, line, mask, me.thread / 32 * 32);
      for (unsigned rest = mask; rest; rest &= rest - 1) wake(*fibers_[me.thread / 32 * 32 + __builtin_ctz(rest)]);
    }
    pause();
    return me.value;
  }

  Buffer* shared(Site& site, size_t count, size_t element, bool dynamic) {
    self();
    if (site.block == block_serial_) return site.buffer;
    site.block = block_serial_;
    if (dynamic) {
      if (dynamic_ && dynamic_->element != element) fail("dynamic shared memory declared with two types");
      if (!dynamic_) dynamic_ = new_buffer(site.name, dynamic_bytes_ / element, element);
      return site.buffer = dynamic_;
    }
    return site.buffer = new_buffer(site.name, count, element);
  }

  void read(Buffer& buffer, size_t i) {
    Cell& cell = cell_of(buffer, i);
    const Fiber& me = *self();
    if (cell.block != block_serial_) {
      fail("thread %u reads %s[%zu] of shared memory before anything was written there", me.thread, buffer.name, i);
    }
    if (cell.write_epoch == epoch_ && !ordered(cell.writer)) {
      fail("race in shared memory: thread %u reads %s[%zu], thread %u wrote it, no barrier between", me.thread,
           buffer.name, i, cell.writer.thread);
    }
    if (cell.read_epoch != epoch_) {
      cell.read_epoch = epoch_;
      cell.readers.clear();
    }
    if (cell.readers.empty() || cell.readers.back().thread != me.thread) cell.readers.push_back({me.thread, 0});
    cell.readers.back().clock = me.seen[me.thread % 32];
  }

  void write(Buffer& buffer, size_t i) {
    Cell& cell = cell_of(buffer, i);
    const Fiber& me = *self();
    if (cell.write_epoch == epoch_ && !ordered(cell.writer)) {
      fail("race in shared memory: threads %u and %u write %s[%zu], no barrier between", me.thread, cell.writer.thread,
           buffer.name, i);
    }
    if (cell.read_epoch == epoch_) {
      for (const Access& reader : cell.readers) {
        if (!ordered(reader)) {
          fail("race in shared memory: thread %u writes %s[%zu], thread %u read it, no barrier between", me.thread,
               buffer.name, i, reader.thread);
        }
      }
      cell.readers.clear();
    }
    cell.block = block_serial_;
    cell.write_epoch = epoch_;
    cell.writer = {me.thread, me.seen[me.thread % 32]};
  }

  // The end of the launch: the message goes to whoever launched; the stacks of the fibers are left as they are.
  [[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (!running_) throw Error(text);
    std::snprintf(error_, sizeof error_, "%s (block %u,%u,%u)", text, blockIdx.x, blockIdx.y, blockIdx.z);
    if (!current_) raise();
    go(current_, nullptr, true);
    std::abort();  // nobody comes back to a fiber that has failed
  }

 private:
  struct Running {
    bool& flag;
    explicit Running(bool& f) : flag(f) { flag = true; }
    ~Running() { flag = false; }
  };

  std::vector<Fiber*> fibers_;  // never freed: they and their stacks serve every launch of the process
  std::vector<Fiber*> ready_;
  Warp warps_[kMaxThreads / 32];
  Fiber* current_ = nullptr;
  bool running_ = false;
  char error_[640] = "";
  unsigned threads_ = 0, exited_ = 0, waiting_ = 0;
  int barrier_line_ = 0;
  uint64_t block_serial_ = 0, epoch_ = 0, random_ = 0x632BE59BD9B4E019ull;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  size_t dynamic_bytes_ = 0, shared_used_ = 0, buffers_used_ = 0;
  std::vector<Buffer*> buffers_;
  Buffer* dynamic_ = nullptr;
  alignas(16) unsigned char shared_[kSharedBytes];
  Context home_{};  // of whoever launched
  Fiber* came_from_ = nullptr;
  void* home_fake_stack_ = nullptr;
  const void* home_bottom_ = nullptr;
  size_t home_size_ = 0;

  Fiber* self() {
    if (!current_) throw Error("called outside of a kernel");
    return current_;
  }

  unsigned draw(unsigned n) {  // uniform in [0, n); splitmix64
    uint64_t z = random_ += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return static_cast<unsigned>(((z ^ (z >> 31)) >> 32) * n >> 32);
  }

  Fiber* draw_ready() {  // null if none can go on
    if (ready_.empty()) return nullptr;
    const unsigned i = draw(static_cast<unsigned>(ready_.size()));
    Fiber* next = ready_[i];
    ready_[i] = ready_.back();
    ready_.pop_back();
    return next;
  }

  void wake(Fiber& fiber) {
    fiber.at = At::running;
    ready_.push_back(&fiber);
  }

  void run_block(unsigned number) {
    blockIdx = {number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y};
    ++block_serial_;
    ++epoch_;
    exited_ = waiting_ = 0;
    shared_used_ = buffers_used_ = 0;
    dynamic_ = nullptr;
    ready_.clear();
    for (unsigned w = 0; w < (threads_ + 31) / 32; ++w) {
      const unsigned lanes = threads_ - 32 * w < 32 ? threads_ - 32 * w : 32;
      warps_[w].present = lanes == 32 ? ~0u : (1u << lanes) - 1;
      warps_[w].exited = 0;
      warps_[w].meetings.clear();
    }
    for (unsigned i = 0; i < threads_; ++i) {
      Fiber& fiber = *fibers_[i];
      fiber.thread = i;
      fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
      std::memset(fiber.seen, 0, sizeof fiber.seen);
      fiber.seen[i % 32] = 1;
      prepare(fiber);
      wake(fiber);
    }
    go(nullptr, draw_ready());
    if (error_[0]) raise();
    if (exited_ < threads_) report_deadlock();
  }

  [[noreturn]] void raise() {
    const Error error(error_);
    error_[0] = 0;
    throw error;
  }

  void report_deadlock() {
    for (unsigned i = 0; i < threads_; ++i) {
      const Fiber& fiber = *fibers_[i];
      if (fiber.at != At::warp) continue;
      for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(fiber.mask >> lane & 1)) continue;
        const Fiber& other = *fibers_[i / 32 * 32 + lane];
        if (other.at == At::warp && other.mask == fiber.mask) continue;
        fail(
            "deadlock: lane %u of warp %u waits in %s at line %d with mask 0x%08x for lane %u, which waits in "
            "%s at line %d",
            i % 32, i / 32, name_of(fiber.op), fiber.line, fiber.mask, lane, name_of(other.op), other.line);
      }
    }
    fail("deadlock: %u of %u threads wait at __syncthreads in line %d", waiting_, threads_, barrier_line_);
  }

  void exchange(Op op, int line, unsigned mask, unsigned first) {
    if (op == Op::syncwarp) {
      unsigned joined[32] = {};
      for (unsigned rest = mask; rest; rest &= rest - 1) {
        const Fiber& fiber = *fibers_[first + __builtin_ctz(rest)];
        for (int k = 0; k < 32; ++k) joined[k] = joined[k] > fiber.seen[k] ? joined[k] : fiber.seen[k];
      }
      for (unsigned rest = mask; rest; rest &= rest - 1) {
        const unsigned lane = __builtin_ctz(rest);
        std::memcpy(fibers_[first + lane]->seen, joined, sizeof joined);
        ++fibers_[first + lane]->seen[lane];
      }
      return;
    }
    if (op == Op::ballot) {
      unsigned votes = 0;
      for (unsigned rest = mask; rest; rest &= rest - 1) {
        votes |= static_cast<unsigned>(fibers_[first + __builtin_ctz(rest)]->value) << __builtin_ctz(rest);
      }
      for (unsigned rest = mask; rest; rest &= rest - 1) fibers_[first + __builtin_ctz(rest)]->value = votes;
      return;
    }
    Value values[32];
    for (unsigned rest = mask; rest; rest &= rest - 1) {
      values[__builtin_ctz(rest)] = fibers_[first + __builtin_ctz(rest)]->value;
    }
    for (unsigned rest = mask; rest; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      Fiber& fiber = *fibers_[first + lane];
      const int width = fiber.width, begin = lane & -width;
      if (width < 1 || width > 32 || (width & (width - 1))) {
        fail("%s at line %d: width %d is no power of two up to 32", name_of(op), line, width);
      }
      int source = lane;  // a source outside the segment means the lane's own value
      if (op == Op::shfl) source = begin + (fiber.argument & (width - 1));
      if (op == Op::shfl_down && lane + fiber.argument < begin + width) source = lane + fiber.argument;
      if (op == Op::shfl_up && lane - fiber.argument >= begin) source = lane - fiber.argument;
      if (op == Op::shfl_xor && (lane ^ fiber.argument) < begin + width) source = lane ^ fiber.argument;
      if (source < 0 || source > 31 || !(mask >> source & 1)) {
        fail("%s at line %d: lane %d reads from lane %d, which mask 0x%08x does not name", name_of(op), line, lane,
             source, mask);
      }
      fiber.value = values[source];
    }
  }

  bool ordered(const Access& access) const {  // in the same epoch: by program order, or by __syncwarp
    const unsigned me = current_->thread, other = access.thread;
    return other == me || (other / 32 == me / 32 && current_->seen[other % 32] >= access.clock);
  }

  Cell& cell_of(Buffer& buffer, size_t i) {
    if (i >= buffer.count) {
      fail("thread %u: %s[%lld] is outside the shared array of %zu", self()->thread, buffer.name,
           static_cast<long long>(i), buffer.count);
    }
    return buffer.cells[i];
  }

  Buffer* new_buffer(const char* name, size_t count, size_t element) {
    shared_used_ = (shared_used_ + 15) / 16 * 16;
    if (shared_used_ + count * element > kSharedBytes) fail("more than 48 KiB of shared memory in a block");
    if (buffers_used_ == buffers_.size()) buffers_.push_back(new Buffer{});
    Buffer* buffer = buffers_[buffers_used_++];
    buffer->name = name;
    buffer->count = count;
    buffer->element = element;
    buffer->data = shared_ + shared_used_;
    if (buffer->cells.size() < count) buffer->cells.resize(count);
    shared_used_ += count * element;
    return buffer;
  }

  static char* new_stack() {
    void* memory =
        mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE)) throw std::bad_alloc();
    return static_cast<char*>(memory) + kGuard;
  }

  static void main_of_fiber();  // what a fiber runs

  void prepare(Fiber& fiber) {
#if SIMT_ASAN
    __asan_unpoison_memory_region(fiber.stack, kStack);  // what a failed launch left there
#endif
    fiber.fake_stack = nullptr;
#ifdef SIMT_UCONTEXT
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = static_cast<size_t>(fiber.top - fiber.stack);
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Machine::main_of_fiber, 0);
#else
    auto* top = reinterpret_cast<uintptr_t*>(fiber.top) - kFrame;
    std::memset(top, 0, kFrame * sizeof *top);
    top[kFrameStart] = reinterpret_cast<uintptr_t>(&Machine::main_of_fiber);
    fiber.context = top;
#endif
  }

  // From one fiber to another; null stands for whoever launched. Comes back when somebody goes to `from`.
  void go(Fiber* from, Fiber* to, bool for_good = false) {
    if (from == to) return;
    current_ = to;
    came_from_ = from;
    if (to) threadIdx = to->index;
#if SIMT_ASAN
    __sanitizer_start_switch_fiber(for_good ? nullptr
                                   : from   ? &from->fake_stack
                                            : &home_fake_stack_,
                                   to ? to->stack : home_bottom_, to ? kStack : home_size_);
#endif
    (void)for_good;
    Context &save = from ? from->context : home_, &load = to ? to->context : home_;
#ifdef SIMT_UCONTEXT
    swapcontext(&save, &load);
#else
    simt_switch(&save, load);
#endif
    arrive(from ? from->fake_stack : home_fake_stack_);
  }

  void arrive(void* fake_stack) {
    (void)fake_stack;
#if SIMT_ASAN
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
    if (!came_from_) {
      home_bottom_ = bottom;
      home_size_ = size;
    }
#endif
  }

  void pause() { go(current_, draw_ready()); }

  void run_fiber() {
    arrive(nullptr);
    body_(argument_);
    Fiber& fiber = *current_;
    Warp& warp = warps_[fiber.thread / 32];
    if (waiting_) {
      fail("divergent __syncthreads: thread %u returned while %u threads wait at line %d", fiber.thread, waiting_,
           barrier_line_);
    }
    for (const Meeting& m : warp.meetings) {
      if (m.mask >> fiber.thread % 32 & 1) {
        fail("%s at line %d: mask 0x%08x names lane %u of warp %u, which has returned", name_of(m.op), m.line, m.mask,
             fiber.thread % 32, fiber.thread / 32);
      }
    }
    fiber.at = At::exited;
    fiber.op = Op::none;
    warp.exited |= 1u << fiber.thread % 32;
    ++exited_;
    go(current_, draw_ready(), true);
    std::abort();  // a fiber that has returned is never entered again
  }
};

inline Machine machine;

inline void Machine::main_of_fiber() { machine.run_fiber(); }

// ------------------------------------------------------------------------------------------------ what macros call

template <class... P, class... A>
void launch(dim3 grid, dim3 block, size_t dynamic_bytes, void* /*stream*/, void (*kernel)(P...), A&&... arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> parameters;
  } call{kernel, std::tuple<P...>(std::forward<A>(arguments)...)};
  machine.launch(
      grid, block, dynamic_bytes,
      [](void* c) { std::apply(static_cast<Call*>(c)->kernel, static_cast<Call*>(c)->parameters); }, &call);
}

// An element of shared memory. Reading it is a conversion, so `auto x = a[i]` would read later than a GPU does: it is
// an error to copy one.
template <class T>
class Element {
 public:
  Element(Buffer* buffer, size_t i) : buffer_(buffer), i_(i) {}
  Element(const Element&) = delete;
  operator T() const {
    machine.read(*buffer_, i_);
    T value;
    std::memcpy(&value, buffer_->data + i_ * sizeof(T), sizeof(T));
    return value;
  }
  T operator=(const T& value) const {
    machine.write(*buffer_, i_);
    std::memcpy(buffer_->data + i_ * sizeof(T), &value, sizeof(T));
    return value;
  }
  T operator=(const Element& other) const { return *this = static_cast<T>(other); }
  template <class U>
  T operator+=(const U& value) const {
    return *this = static_cast<T>(*this) + value;
  }

 private:
  Buffer* buffer_;
  size_t i_;
};

// What stands for `__shared__ T name[count]`, or for a pointer into it.
template <class T>
class Shared {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Shared(Site& site, size_t count, bool dynamic = false)
      : buffer_(machine.shared(site, count, sizeof(T), dynamic)), offset_(0) {}
  Element<T> operator[](long long i) const { return {buffer_, static_cast<size_t>(offset_ + i)}; }
  Element<T> operator*() const { return (*this)[0]; }
  Shared operator+(long long n) const { return {buffer_, offset_ + n}; }

 private:
  Shared(Buffer* buffer, long long offset) : buffer_(buffer), offset_(offset) {}
  Buffer* buffer_;
  long long offset_;
};

template <class T>
T shuffle(Op op, int line, unsigned mask, T value, int argument, int width = 32) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "CUDA shuffles values of up to 8 bytes");
  Value bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = machine.warp(op, line, mask, bits, argument, width);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned ballot(int line, unsigned mask, int predicate) {
  return static_cast<unsigned>(machine.warp(Op::ballot, line, mask, predicate != 0));
}

inline void syncwarp(int line, unsigned mask = 0xffffffffu) { machine.warp(Op::syncwarp, line, mask); }

template <class T>
const T* aligned(const T* p) {  // as the hardware demands; also where the compiler's own check is not asked for
  uintptr_t address = reinterpret_cast<uintptr_t>(p);
  asm("" : "+r"(address));  // or the compiler would take the answer from the type
  if (address % (sizeof(T) < 16 ? sizeof(T) : 16)) {
    machine.fail("misaligned access: %zu bytes at an address that is %zu past a multiple", sizeof(T),
                 static_cast<size_t>(address % (sizeof(T) < 16 ? sizeof(T) : 16)));
  }
  return p;
}

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace simt

// ------------------------------------------------------------------------------------------------- CUDA's own names

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define MINIRLHF_SHARED(type, name, count)      \
  static simt::Site simt_site_of_##name{#name}; \
  const simt::Shared<type> name(simt_site_of_##name, count)
#define MINIRLHF_DYNAMIC_SHARED(type, name)     \
  static simt::Site simt_site_of_##name{#name}; \
  const simt::Shared<type> name(simt_site_of_##name, 0, true)
#define MINIRLHF_LAUNCH(kernel, grid, block, stream, ...) \
  simt::launch((grid), (block), 0, (stream), (kernel)__VA_OPT__(, ) __VA_ARGS__)
#define MINIRLHF_LAUNCH_DYNAMIC(kernel, grid, block, bytes, stream, ...) \
  simt::launch((grid), (block), (bytes), (stream), (kernel)__VA_OPT__(, ) __VA_ARGS__)

#define __syncthreads() simt::machine.syncthreads(__LINE__)
#define __syncwarp(...) simt::syncwarp(__LINE__ __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(...) simt::shuffle(simt::Op::shfl, __LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) simt::shuffle(simt::Op::shfl_up, __LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) simt::shuffle(simt::Op::shfl_down, __LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) simt::shuffle(simt::Op::shfl_xor, __LINE__, __VA_ARGS__)
#define __ballot_sync(mask, predicate) simt::ballot(__LINE__, mask, predicate)
#define __any_sync(mask, predicate) static_cast<int>(simt::ballot(__LINE__, mask, predicate) != 0)
#define __all_sync(mask, predicate) static_cast<int>(simt::ballot(__LINE__, mask, !(predicate)) == 0)

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
// As on the GPU, and unlike the templates, these two take the number where the other is NaN.
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(double a, double b) { return fmin(a, b); }

#define SIMT_LOAD(name)       \
  template <class T>          \
  T name(const T* p) {        \
    return *simt::aligned(p); \
  }
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldcs)
#undef SIMT_LOAD
#define SIMT_STORE(name)                          \
  template <class T, class U>                     \
  void name(T* p, const U& value) {               \
    *const_cast<T*>(simt::aligned(p)) = T(value); \
  }
SIMT_STORE(__stcg)
SIMT_STORE(__stcs)
#undef SIMT_STORE

inline float __expf(float x) { return exp2f(x * 1.4426950408889634f); }  // how the hardware does it: 2^(x·log2 e)
inline float __logf(float x) { return log2f(x) * 0.6931471805599453f; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline unsigned __float_as_uint(float x) { return simt::bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return simt::bits<float>(x); }
inline long long __double_as_longlong(double x) { return simt::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return simt::bits<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
[[noreturn]] inline void __trap() { simt::machine.fail("__trap()"); }

// bfloat16 and half: stored as bits; a float is rounded to the nearest, ties to even; NaN becomes 0x7fff. They have
// neither arithmetic nor conversions of their own, as in a build against torch, which switches CUDA's off.
struct alignas(2) __nv_bfloat16 {
  unsigned short x;
};
struct alignas(2) __half {
  unsigned short x;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __bfloat162float(__nv_bfloat16 h) { return __uint_as_float(static_cast<unsigned>(h.x) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  if (f != f) return {0x7fff};
  const unsigned u = __float_as_uint(f);
  return {static_cast<unsigned short>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float f) { return __float2bfloat16_rn(f); }

inline float __half2float(__half h) {
  const unsigned sign = static_cast<unsigned>(h.x & 0x8000) << 16, exponent = h.x >> 10 & 31, fraction = h.x & 0x3ff;
  if (exponent == 0) {  // 0 and subnormals: units of 2^-24
    return __uint_as_float(sign | __float_as_uint(static_cast<float>(fraction) * 0x1p-24f));
  }
  return __uint_as_float(sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13);
}
inline __half __float2half_rn(float f) {
  if (f != f) return {0x7fff};
  const unsigned u = __float_as_uint(f), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  unsigned h;
  if (magnitude >= 0x477ff000) {  // 65520, halfway between the largest half and the next power of two, and above
    h = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: the float unit rounds to multiples of 2^-24
    h = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f);
  } else {
    h = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<unsigned short>(sign | h)};
}
inline __half __float2half(float f) { return __float2half_rn(f); }

inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16(x), __float2bfloat16(y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return {x}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 h) { return h.x; }
inline __half __ushort_as_half(unsigned short x) { return {x}; }
inline unsigned short __half_as_ushort(__half h) { return h.x; }

// The host's side. A launch that fails throws simt::Error at once.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

// With -fsanitize=alignment and no sanitizer library, this is where a misaligned access ends up.
#ifdef SIMT_ALIGNMENT
extern "C" {
struct SimtUbsanType {
  uint16_t kind, info;
  char name[1];
};
struct SimtUbsanMismatch {
  const char* file;
  uint32_t line, column;
  const SimtUbsanType* type;
  unsigned char log_alignment, access;
};
__attribute__((weak, noreturn)) void __ubsan_handle_type_mismatch_v1_abort(SimtUbsanMismatch* where,
                                                                           uintptr_t address) {
  simt::machine.fail("misaligned access at line %u: type %s needs a multiple of %u, the address is %u past one",
                     where->line, where->type->name, 1u << where->log_alignment,
                     static_cast<unsigned>(address & ((1u << where->log_alignment) - 1)));
}
}
#endif
