// Runs a GPU grid on the CPU: one fibre per thread of a block, blocks one after another.
//
// A fibre runs until it meets a barrier or a warp operation. Then the scheduler starts the next one, in an
// order that the caller picks, so code that lacks a barrier gives another result in another order.
// Everything is static: one library per kernel source, one launch at a time (the caller holds a lock).
#pragma once
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define AWQ_NOINLINE __attribute__((noinline))
#define AWQ_MAX_THREADS 1024
#define AWQ_WARP 32
#define AWQ_STACK_BYTES (256 * 1024)
#define AWQ_SHARED_LIMIT (256 * 1024)
#define AWQ_POISON 0xCD

struct awq_index {
  unsigned x, y, z;
};

// What went wrong, first thing wins. The Python side (simt.py) has the same layout.
enum awq_outcome { AWQ_DONE = 0, AWQ_FAULT = 1, AWQ_DIVERGED = 2, AWQ_TIMEOUT = 3, AWQ_WARP_DIVERGED = 4 };
struct awq_report {
  int32_t outcome;
  int32_t signal;
  uint64_t address;
  awq_index block, thread, other;
  int32_t line, other_line;  // 0: that thread had finished
};

enum awq_state { AWQ_READY, AWQ_AT_BARRIER, AWQ_AT_WARP_OP, AWQ_FINISHED };
#define AWQ_SLOT_BYTES 128

struct awq_async_copy {
  void* to;
  const void* from;
  unsigned bytes, group;
};

struct awq_fiber {
  void* sp;
  int state, line;
  uint32_t mask;      // lanes named by the operation; 0: whichever lanes are there
  uint32_t together;  // lanes that met in the operation just done
  int posted, released;
  awq_index index;
  unsigned linear;
  unsigned async_count, async_group;
  awq_async_copy async[64];  // cp.async not yet waited for: nothing is copied before the wait
  alignas(16) unsigned char slot[2][AWQ_SLOT_BYTES];
};

static awq_fiber awq_fibers[AWQ_MAX_THREADS];
static awq_fiber* awq_current;
static void* awq_scheduler_sp;
static awq_index awq_block, awq_block_size, awq_grid_size;
static unsigned awq_thread_count;
static char* awq_stacks;
static char* awq_shared_end;  // end of dynamic shared memory, before a page that nobody may touch
static char* awq_shared_start;
static void (*awq_body)(void**);
static void** awq_body_arguments;
static awq_report* awq_outcome_report;
static sigjmp_buf awq_escape;
static volatile pid_t awq_launching_thread;

extern "C" void awq_switch(void** save_sp, void* load_sp) __attribute__((visibility("hidden")));
#if defined(__x86_64__)
__asm__(
    ".text\n.hidden awq_switch\n.globl awq_switch\n.type awq_switch,@function\nawq_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  retq\n"
    ".size awq_switch, .-awq_switch\n");
static void* awq_new_stack(char* top, void (*entry)()) {
  void** sp = (void**)top - 2;  // at entry the stack is 8 off 16, as after a call
  *sp = (void*)entry;
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  return sp;
}
#elif defined(__aarch64__)
__asm__(
    ".text\n.hidden awq_switch\n.globl awq_switch\n.type awq_switch,%function\nawq_switch:\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n  ret\n"
    ".size awq_switch, .-awq_switch\n");
static void* awq_new_stack(char* top, void (*entry)()) {
  char* sp = top - 160;
  memset(sp, 0, 160);
  *(void**)(sp + 88) = (void*)entry;  // x30
  return sp;
}
#else
#error "the SIMT shim knows x86-64 and AArch64"
#endif

// ---- what kernels call ----

static AWQ_NOINLINE void awq_pause(int state, int line) {
  awq_current->state = state;
  awq_current->line = line;
  awq_switch(&awq_current->sp, awq_scheduler_sp);
}

// At the head of a loop: in the shuffled order, another thread may come first. Else the last thread of a block to run
// always sees what all others wrote, and hides a missing barrier by writing last.
static unsigned awq_preempting;  // 0, or the state of a generator
static unsigned awq_random(unsigned* state) {
  *state ^= *state << 13;
  *state ^= *state >> 17;
  *state ^= *state << 5;
  return *state;
}
static inline void awq_preempt() {
  if (awq_preempting && (awq_random(&awq_preempting) & 7) == 0) awq_pause(AWQ_READY, 0);
}

static inline void awq_barrier(int line) { awq_pause(AWQ_AT_BARRIER, line); }

// Meets the other lanes of the warp, each leaving `bytes` bytes for the rest. Returns the lanes that met.
static AWQ_NOINLINE uint32_t awq_meet(int line, uint32_t mask, const void* data, size_t bytes) {
  awq_fiber* self = awq_current;
  self->posted ^= 1;
  if (bytes) memcpy(self->slot[self->posted], data, bytes);
  self->mask = mask;
  awq_pause(AWQ_AT_WARP_OP, line);
  return awq_current->together;
}

static inline unsigned awq_lane() { return awq_current->linear % AWQ_WARP; }

// What a lane left at the meeting just done; poison when it was not there.
template <class T>
static inline T awq_from_lane(unsigned lane) {
  static_assert(sizeof(T) <= AWQ_SLOT_BYTES, "too large for an exchange");
  T value;
  if (lane < AWQ_WARP && (awq_current->together >> lane & 1)) {
    awq_fiber* peer = &awq_fibers[awq_current->linear / AWQ_WARP * AWQ_WARP + lane];
    memcpy((void*)&value, peer->slot[peer->released], sizeof(T));
  } else {
    memset((void*)&value, AWQ_POISON, sizeof(T));
  }
  return value;
}

template <class T>
static inline T awq_shuffle(int line, uint32_t mask, T value, unsigned from) {
  awq_meet(line, mask, &value, sizeof(T));
  return awq_from_lane<T>(from);
}

// `p` as a pointer to a vector, which must be aligned to its size as on the device.
template <class T, class P>
static inline T* awq_at(P* p) {
  if ((uintptr_t)p % alignof(T)) __builtin_trap();
  return (T*)p;
}

static inline void* awq_dynamic_shared() { return awq_shared_start; }

static inline void awq_async_copy_later(void* to, const void* from, unsigned bytes) {
  awq_fiber* self = awq_current;
  if (self->async_count == 64) __builtin_trap();
  memset(to, 0xFF, bytes);  // it may arrive at once: whoever still reads what was there finds NaN
  self->async[self->async_count++] = {to, from, bytes, self->async_group};
}
// Completes all but the `pending` youngest committed groups.
static inline void awq_async_wait(unsigned pending) {
  awq_fiber* self = awq_current;
  unsigned kept = 0;
  for (unsigned i = 0; i < self->async_count; ++i) {
    awq_async_copy copy = self->async[i];
    if (copy.group + pending >= self->async_group) {
      self->async[kept++] = copy;
    } else if (copy.from) {
      memcpy(copy.to, copy.from, copy.bytes);
    } else {
      memset(copy.to, 0, copy.bytes);
    }
  }
  self->async_count = kept;
}

// ---- scheduler ----

static AWQ_NOINLINE void awq_fiber_main() {
  awq_body(awq_body_arguments);
  for (;;) awq_pause(AWQ_FINISHED, 0);
}

static void awq_diverged(int outcome, const awq_fiber& a, const awq_fiber& b) {
  awq_report* r = awq_outcome_report;
  r->outcome = outcome;
  r->block = awq_block;
  r->thread = a.index;
  r->other = b.index;
  r->line = a.line;
  r->other_line = b.state == AWQ_FINISHED ? 0 : b.line;
}

// Releases the lanes of a warp that wait in the same operation with all that it names. Returns how many.
static unsigned awq_release_warp(unsigned first) {
  unsigned lanes = awq_thread_count - first < AWQ_WARP ? awq_thread_count - first : AWQ_WARP, released = 0;
  for (unsigned lane = 0; lane < lanes; ++lane)
    if (awq_fibers[first + lane].state == AWQ_READY) return 0;  // who meets is known when all have arrived somewhere
  uint32_t exist = 0, done = 0;  // a mask may name lanes that have finished
  for (unsigned lane = 0; lane < lanes; ++lane) exist |= (uint32_t)(awq_fibers[first + lane].state != AWQ_FINISHED) << lane;
  for (unsigned lane = 0; lane < lanes; ++lane) {
    const awq_fiber& f = awq_fibers[first + lane];
    if (f.state != AWQ_AT_WARP_OP || (done >> lane & 1)) continue;
    uint32_t group = 0;
    for (unsigned other = lane; other < lanes; ++other) {
      const awq_fiber& g = awq_fibers[first + other];
      if (g.state == AWQ_AT_WARP_OP && g.line == f.line && g.mask == f.mask) group |= 1u << other;
    }
    done |= group;
    uint32_t named = f.mask ? f.mask & exist : group;
    if ((group & named) != named || (group & ~named)) continue;  // some are elsewhere, or not named
    for (unsigned other = 0; other < lanes; ++other) {
      if (!(group >> other & 1)) continue;
      awq_fiber& g = awq_fibers[first + other];
      g.together = group;
      g.released = g.posted;
      g.state = AWQ_READY;
      ++released;
    }
  }
  return released;
}

static void awq_shuffle_numbers(unsigned* numbers, unsigned count, unsigned* seed) {
  for (unsigned i = count; i > 1; --i) {
    unsigned j = awq_random(seed) % i, t = numbers[i - 1];
    numbers[i - 1] = numbers[j];
    numbers[j] = t;
  }
}

// Threads in an order that keeps those of a warp together.
static void awq_shuffle_order(unsigned* order, unsigned count, unsigned* seed) {
  unsigned warps[AWQ_MAX_THREADS / AWQ_WARP], warp_count = (count + AWQ_WARP - 1) / AWQ_WARP, at = 0;
  for (unsigned w = 0; w < warp_count; ++w) warps[w] = w;
  awq_shuffle_numbers(warps, warp_count, seed);
  for (unsigned w = 0; w < warp_count; ++w) {
    unsigned start = at;
    for (unsigned i = warps[w] * AWQ_WARP; i < count && i < (warps[w] + 1) * AWQ_WARP; ++i) order[at++] = i;
    awq_shuffle_numbers(order + start, at - start, seed);
  }
}

// One block. Order 0 is ascending, 1 descending, others are shuffled anew after each barrier.
static bool awq_run_block(int order_kind, unsigned* order, unsigned* seed) {
  unsigned n = awq_thread_count;
  for (unsigned i = 0; i < n; ++i) {
    awq_fiber& f = awq_fibers[i];
    // Tops at different distances from the end of their memory, or all would share a few lines of the cache.
    f.sp = awq_new_stack(awq_stacks + (size_t)(i + 1) * AWQ_STACK_BYTES - i % 61 * 704 / 16 * 16, awq_fiber_main);
    f.state = AWQ_READY;
    f.line = f.posted = f.released = 0;
    f.async_count = f.async_group = 0;
    f.linear = i;
    f.index = {i % awq_block_size.x, i / awq_block_size.x % awq_block_size.y, i / awq_block_size.x / awq_block_size.y};
  }
  for (;;) {
    // A warp runs ahead of the others as far as it can: to the barrier, through its own warp operations.
    for (unsigned start = 0, end; start < n; start = end) {
      unsigned warp = order[start] / AWQ_WARP;
      for (end = start; end < n && order[end] / AWQ_WARP == warp;) ++end;
      do {
        for (unsigned i = start; i < end; ++i) {
          awq_fiber& f = awq_fibers[order[i]];
          if (f.state != AWQ_READY) continue;
          awq_current = &f;
          awq_switch(&awq_scheduler_sp, f.sp);
        }
      } while (awq_release_warp(warp * AWQ_WARP));
    }
    unsigned finished = 0, ready = 0;
    for (unsigned i = 0; i < n; ++i) ready += awq_fibers[i].state == AWQ_READY;
    if (ready) continue;
    const awq_fiber *barrier = nullptr, *warp_op = nullptr, *end = nullptr;
    for (unsigned i = 0; i < n; ++i) {
      const awq_fiber& f = awq_fibers[i];
      if (f.state == AWQ_FINISHED) ++finished, end = &f;
      if (f.state == AWQ_AT_BARRIER && !barrier) barrier = &f;
      if (f.state == AWQ_AT_WARP_OP && !warp_op) warp_op = &f;
    }
    if (finished == n) return true;
    if (warp_op) {
      const awq_fiber* other = barrier ? barrier : end ? end : warp_op;
      unsigned first = warp_op->linear / AWQ_WARP * AWQ_WARP;
      for (unsigned i = first; i < n && i < first + AWQ_WARP; ++i) {
        const awq_fiber& f = awq_fibers[i];
        if (f.state != AWQ_AT_WARP_OP || f.line != warp_op->line) other = &f;
      }
      awq_diverged(AWQ_WARP_DIVERGED, *warp_op, *other);
      return false;
    }
    for (unsigned i = 0; i < n; ++i) {
      awq_fiber& f = awq_fibers[i];
      if (f.state == AWQ_FINISHED || f.line != barrier->line) {
        awq_diverged(AWQ_DIVERGED, *barrier, f);
        return false;
      }
    }
    for (unsigned i = 0; i < n; ++i) awq_fibers[i].state = AWQ_READY;
    if (order_kind > 1) awq_shuffle_order(order, n, seed);
  }
}

static void awq_on_signal(int number, siginfo_t* info, void* context) {
  (void)context;
  if ((pid_t)syscall(SYS_gettid) != awq_launching_thread) {  // not ours: let it be fatal
    signal(number, SIG_DFL);
    raise(number);
    return;
  }
  awq_report* r = awq_outcome_report;
  r->outcome = info->si_code == SI_TIMER ? AWQ_TIMEOUT : AWQ_FAULT;
  r->signal = number;
  r->address = (uint64_t)info->si_addr;
  r->block = awq_block;
  r->thread = awq_current ? awq_current->index : awq_index{0, 0, 0};
  r->line = awq_current ? awq_current->line : 0;
  siglongjmp(awq_escape, 1);
}

static void awq_set_up_shared() {
  if (awq_shared_end) return;
  size_t page = (size_t)sysconf(_SC_PAGESIZE);
  char* shared = (char*)mmap(nullptr, AWQ_SHARED_LIMIT + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mprotect(shared + page, AWQ_SHARED_LIMIT, PROT_READ | PROT_WRITE);
  awq_shared_end = shared + page + AWQ_SHARED_LIMIT;
}

struct awq_kernel {
  void (*body)(void**);
  char *shared, *shared_stop;
  const char* signature;
};

// Runs one grid in one order, on `stacks` (AWQ_MAX_THREADS, each AWQ_STACK_BYTES with a forbidden page at its low
// end). Returns the outcome, with its detail in `report`.
extern "C" int awq_launch(const awq_kernel* kernel, void* stacks, void** arguments, const unsigned* grid, const unsigned* block,
                          unsigned dynamic_shared, int order_kind, unsigned seed, double cpu_seconds,
                          awq_report* report) {
  static unsigned order[AWQ_MAX_THREADS];
  static char signal_stack[64 * 1024];
  memset(report, 0, sizeof(*report));
  awq_set_up_shared();
  awq_stacks = (char*)stacks;
  awq_outcome_report = report;
  awq_body = kernel->body;
  awq_body_arguments = arguments;
  awq_block_size = {block[0], block[1], block[2]};
  awq_grid_size = {grid[0], grid[1], grid[2]};
  awq_thread_count = block[0] * block[1] * block[2];
  awq_shared_start = awq_shared_end - (dynamic_shared + 63) / 64 * 64;
  awq_current = nullptr;
  awq_launching_thread = (pid_t)syscall(SYS_gettid);

  stack_t alternate = {}, old_alternate;
  alternate.ss_sp = signal_stack;
  alternate.ss_size = sizeof signal_stack;
  sigaltstack(&alternate, &old_alternate);
  const int caught[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGRTMIN + 7};
  struct sigaction action = {}, old_actions[6];
  action.sa_sigaction = awq_on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < 6; ++i) sigaction(caught[i], &action, &old_actions[i]);
  struct sigevent event = {};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = SIGRTMIN + 7;
  event._sigev_un._tid = awq_launching_thread;
  timer_t timer;
  bool timed = cpu_seconds > 0 && timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer) == 0;
  if (timed) {
    struct itimerspec limit = {};
    limit.it_value.tv_sec = (time_t)cpu_seconds;
    limit.it_value.tv_nsec = (long)((cpu_seconds - (double)(time_t)cpu_seconds) * 1e9);
    timer_settime(timer, 0, &limit, nullptr);
  }

  if (sigsetjmp(awq_escape, 1) == 0) {
    unsigned n = awq_thread_count;
    unsigned long long blocks = (unsigned long long)grid[0] * grid[1] * grid[2];
    seed = seed * 2654435761u + 1;
    awq_preempting = order_kind > 1 ? seed : 0;
    for (unsigned i = 0; i < n; ++i) order[i] = order_kind == 1 ? n - 1 - i : i;
    if (order_kind > 1) awq_shuffle_order(order, n, &seed);
    for (unsigned long long i = 0; i < blocks; ++i) {
      unsigned long long at = order_kind == 1 ? blocks - 1 - i : i;
      awq_block = {(unsigned)(at % grid[0]), (unsigned)(at / grid[0] % grid[1]), (unsigned)(at / grid[0] / grid[1])};
      if (kernel->shared) memset(kernel->shared, AWQ_POISON, (size_t)(kernel->shared_stop - kernel->shared));
      memset(awq_shared_start, AWQ_POISON, (size_t)(awq_shared_end - awq_shared_start));
      if (!awq_run_block(order_kind, order, &seed)) break;
    }
  }
  if (timed) timer_delete(timer);
  awq_launching_thread = 0;
  for (int i = 0; i < 6; ++i) sigaction(caught[i], &old_actions[i], nullptr);
  sigaltstack(&old_alternate, nullptr);
  return report->outcome;
}

// ---- calling a kernel with arguments that are known at run time only ----

template <size_t... I>
struct awq_indices {};
template <size_t N, size_t... I>
struct awq_make_indices : awq_make_indices<N - 1, N - 1, I...> {};
template <size_t... I>
struct awq_make_indices<0, I...> {
  using type = awq_indices<I...>;
};
template <class T>
struct awq_code {
  static constexpr char value = 's';  // a struct by value
};
template <class T>
struct awq_code<T*> {
  static constexpr char value = 'p';
};
#define AWQ_CODE(type, letter)                \
  template <>                                 \
  struct awq_code<type> {                     \
    static constexpr char value = letter;     \
  };
AWQ_CODE(bool, 'b')
AWQ_CODE(signed char, '1')
AWQ_CODE(unsigned char, '1')
AWQ_CODE(char, '1')
AWQ_CODE(short, '2')
AWQ_CODE(unsigned short, '2')
AWQ_CODE(int, '4')
AWQ_CODE(unsigned, '4')
AWQ_CODE(long, '8')
AWQ_CODE(unsigned long, '8')
AWQ_CODE(long long, '8')
AWQ_CODE(unsigned long long, '8')
AWQ_CODE(float, 'f')
AWQ_CODE(double, 'd')
AWQ_CODE(_Float16, 'h')

// The function, what it keeps in static shared memory, and the kinds of its parameters.
#define AWQ_KERNEL(name, CALLER)                                                                      \
  extern "C" char __start_awq_shared_##name[] __attribute__((weak, visibility("hidden")));            \
  extern "C" char __stop_awq_shared_##name[] __attribute__((weak, visibility("hidden")));             \
  static void awq_body_of_##name(void** arguments) { CALLER<decltype(name)>::call(&name, arguments); } \
  extern "C" const awq_kernel awq_kernel_##name = {awq_body_of_##name, __start_awq_shared_##name,     \
                                                   __stop_awq_shared_##name, CALLER<decltype(name)>::signature};
