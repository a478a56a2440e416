// What runs: the threads, warps and block of a launch, shared by runtime.cpp, which schedules them, warp.cpp, and
// asynchronous.cpp, which does what the hardware does beside them.
#pragma once

#include <cuda.h>

#include <cstring>
#include <deque>
#include <sstream>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"
#include "runtime.h"

#pragma GCC visibility push(hidden)

namespace hyperconv_host {

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

inline const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash == nullptr ? path : slash + 1;
}

inline bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

inline std::string describe(Site site) { return text(base_name(site.file), ":", site.line); }

// splitmix64
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  size_t below(size_t n) { return next() % n; }

 private:
  uint64_t state_;
};

// One lane's part in a collective; which of the pointers mean what is the collective's business.
struct Operands {
  const void *first, *second;
  void* result;
};
struct Thread;

struct Collective {
  const char* name;
  void (*perform)(Thread* const (&lanes)[kWarp]);
};

struct Copy {
  void* shared;
  const void* global;  // null: zeros
};

struct Thread {
  Fiber fiber;
  uint3 index;
  Operands operands;
  Site site;  // where it waits, or called what is being performed
  std::vector<Copy> copies;
  // While it waits for a phase of an mbarrier: that one, the phase's parity, and whether it is complete.
  struct Barrier* awaited;
  uint32_t parity;
  bool arrived;
};

// The lanes in `order` run once, until each has come to a collective, a barrier or an mbarrier or has exited.
// Those that wait for an mbarrier run again when they may.
struct Warp {
  Thread* lanes[kWarp];
  int size;
  int order[kWarp], count, running;  // an index into `order`
  int waiting;                       // for an mbarrier
  const Collective* collective;
  Site site;  // of the first lane that came to a collective
  int at_collective, at_barrier, exited;
  bool differ;  // in their collectives
};

struct Block {
  std::deque<Thread> threads;  // at least as many as the block has; they keep their stacks
  size_t size;
  std::vector<Warp> warps;
  std::vector<Warp*> ready;   // for a barrier they have not come to
  std::vector<Warp*> parked;  // some of whose lanes wait for an mbarrier
  Warp* warp;                // that runs
  Thread* thread;            // that runs
  size_t at_barrier, exited;
  Site barrier;  // where the first thread waits
  bool barriers_differ;
  unsigned char* shared;
  size_t shared_bytes;
};

extern Random rng;
extern Block block;
extern bool eager;

// Ends the launch.
[[noreturn]] void fail(const Thread& thread, const std::string& message);
[[noreturn]] void fail_at(const Thread& thread, const char* function, const std::string& message);
// Whether the call at `site` is to do nothing.
bool skipped(Site site);
// The running thread's part in a collective; returns when it has been performed.
void collect(const Collective& collective, const Operands& operands, Site site);
// Lets others run until this thread's `arrived` is set.
void wait_for_arrival();

// Whether 16 bytes of shared memory are at `pointer`, aligned.
void check_shared(const Thread& thread, const char* function, const void* pointer);

// Of asynchronous.cpp.
void begin_block();
// Lets one of the copies under way land; false if there is none.
bool land_one();
// What the running thread left unfinished, or ''.
std::string unfinished();
// What the block left unfinished, or ''.
std::string unfinished_block();
// Of warpgroup.cpp: the same of its products.
void begin_block_products();
std::string unfinished_products();
std::string unfinished_block_products();
// Notes that a lane of the warp overwrites the 16 bytes at `pointer`.
void check_overwritable(const Warp& warp, const Thread& lane, const char* function, void* pointer);
// The running warp passed a __syncwarp().
void warp_synchronized(const Warp& warp);
// `address` in the shared window with its 16-byte chunks permuted.
uint32_t swizzled(uint32_t address, CUtensorMapSwizzle mode);
// Whether the same copy, or none, brings the 16 bytes at both.
bool brought_together(const void* one, const void* other);
// Whether what reads beside the threads may read the 16 bytes at `pointer`, which threads may have written.
void check_fenced(const Thread& issuer, const char* function, const void* pointer);
// Whether lane `lane` may read the 16 bytes at `pointer`, which an asynchronous copy may have brought.
void check_landed(const Thread& lane, const char* function, const void* pointer);

}  // namespace hyperconv_host

#pragma GCC visibility pop
