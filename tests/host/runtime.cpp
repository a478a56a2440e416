// In every variant: most of the tests' time is spent here.
#pragma GCC optimize("O3")

#include "runtime.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "block.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace hyperconv_host {

Random rng(0);
Block block;
bool eager;

namespace {

// Of an H100, as of every GPU since sm_70 except for the shared memory.
constexpr size_t kSharedByDefault = 48 * 1024, kSharedAtMost = 227 * 1024;
constexpr unsigned kThreadsAtMost = 1024, kBlockAtMost[3] = {1024, 1024, 64};
constexpr unsigned kGridAtMost[3] = {0x7fffffff, 65535, 65535};

// One launch at a time; each uses all of this.
std::mutex launching;
std::map<const void*, size_t> allowed_shared_bytes;
uint64_t launches = 0, attribute_calls = 0;
Fiber launcher;
const Launch* launched;
bool failed;
std::string failure;
const char* skipped_file;  // null: none
size_t skipped_length;
int skipped_line;

thread_local cudaError_t last_error = cudaSuccess, detailed_error = cudaSuccess;
thread_local std::string details;

int report(cudaError_t error, std::string message) {
  last_error = detailed_error = error;
  details = std::move(message);
  return error;
}

template <typename Coordinates>
std::string describe(const Coordinates& c) {
  return text("(", c.x, ", ", c.y, ", ", c.z, ")");
}

}  // namespace

// Its fibers are never continued.
void fail(const Thread& thread, const std::string& message) {
  failure = text("block ", describe(blockIdx), ", thread ", describe(thread.index), ": ", message);
  failed = true;
  block.thread->fiber.switch_to(launcher, true);
  __builtin_unreachable();
}

namespace {

void start_segment(Warp& warp) {
  // Affine maps modulo 32 put any two lanes in either order equally often.
  const uint64_t random = rng.next();
  const int factor = static_cast<int>(random & 31) | 1, first = static_cast<int>(random >> 5 & 31);
  int count = 0;
  for (int i = 0; i < kWarp; ++i) {
    const int lane = (factor * i + first) % kWarp;
    if (lane < warp.size) warp.order[count++] = lane;
  }
  warp.count = count;
  warp.running = warp.waiting = 0;
  warp.collective = nullptr;
  warp.at_collective = warp.at_barrier = warp.exited = 0;
  warp.differ = false;
}

void perform(Warp& warp) {
  if (warp.differ || warp.at_collective < kWarp) {
    fail(*warp.lanes[warp.order[0]],
         text("divergent collective: ", warp.at_collective, " lanes wait at ",
              warp.differ ? "different collectives, one of them " : "", warp.collective->name, " (",
              describe(warp.site), "), ", warp.at_barrier, " at a barrier, ", warp.exited,
              " have exited, ", kWarp - warp.size, " never were"));
  }
  warp.collective->perform(warp.lanes);
}

// All threads of the block have come to a barrier or exited, not all of them the latter.
void pass_barrier() {
  if (block.exited != 0 || block.barriers_differ) {
    fail(*block.thread, text("divergent barrier: ", block.at_barrier, " threads wait at ",
                             block.barriers_differ ? "different lines, one of them " : "",
                             describe(block.barrier), ", ", block.exited, " have exited"));
  }
  block.at_barrier = 0;
  for (Warp& warp : block.warps) block.ready.push_back(&warp);
}

// Whether lanes of the warp may go on from their mbarriers.
bool resumable(const Warp* warp) {
  return std::any_of(warp->lanes, warp->lanes + warp->size, [](const Thread* t) { return t->arrived; });
}

// Those lanes, as what runs next of the warp.
void resume(Warp& warp) {
  warp.count = warp.running = 0;
  for (int lane = 0; lane < warp.size; ++lane) {
    if (warp.lanes[lane]->arrived) warp.order[warp.count++] = lane;
  }
  for (int i = warp.count; i > 1; --i) std::swap(warp.order[i - 1], warp.order[rng.below(i)]);
  warp.waiting -= warp.count;
}

// A warp that can run, ready to; null if there is none.
Warp* take_warp() {
  std::vector<Warp*>& parked = block.parked;
  const auto awake = std::partition(parked.begin(), parked.end(), [](Warp* w) { return !resumable(w); });
  const size_t awakened = parked.end() - awake;
  if (block.ready.empty() && awakened == 0) return nullptr;
  const size_t choice = rng.below(block.ready.size() + awakened);
  std::vector<Warp*>& from = choice < awakened ? parked : block.ready;
  Warp** taken = choice < awakened ? &*awake + choice : &from[choice - awakened];
  std::swap(*taken, from.back());
  Warp* warp = from.back();
  from.pop_back();
  if (choice < awakened) {
    resume(*warp);
  } else {
    start_segment(*warp);
  }
  return warp;
}

// The thread to run next; null when the block is done.
Thread* schedule() {
  Warp* warp = block.warp;
  if (warp != nullptr && ++warp->running == warp->count) {
    if (warp->waiting != 0) {
      block.parked.push_back(warp);
      warp = nullptr;
    } else if (warp->at_collective != 0) {
      perform(*warp);
      start_segment(*warp);
    } else {
      warp = nullptr;
    }
  }
  while (warp == nullptr) {
    warp = take_warp();
    if (warp != nullptr) continue;
    if (block.exited == block.size) return nullptr;
    if (land_one()) continue;
    if (!block.parked.empty()) {
      for (const Thread& thread : block.threads) {
        if (thread.awaited) fail_at(thread, "barrier", "waits for ever");
      }
    }
    pass_barrier();
  }
  block.warp = warp;
  return warp->lanes[warp->order[warp->running]];
}

// Lets others run.
void yield(bool forever = false) {
  Thread* self = block.thread;
  Thread* next = schedule();
  if (next == self) return;
  if (next != nullptr) {
    block.thread = next;
    threadIdx = next->index;
  }
  self->fiber.switch_to(next != nullptr ? next->fiber : launcher, forever);
}

__attribute__((no_sanitize("address"))) void run_thread() {
  Fiber::entered();
  std::string exception;
  try {
    launched->run(launched->arguments);
  } catch (const std::exception& error) {
    exception = error.what();
    if (exception.empty()) exception = "without a message";
  } catch (...) {
    exception = "of an unknown type";
  }
  const Thread& self = *block.thread;
  if (!exception.empty()) fail(self, "exception: " + exception);
  if (const std::string left = unfinished(); !left.empty()) fail(self, "exited with " + left);
  if (!self.copies.empty()) {
    fail(self, text("exited with ", self.copies.size(), " cp_async_16 that it never waited for"));
  }
  ++block.warp->exited;
  ++block.exited;
  yield(true);
}

}  // namespace

void collect(const Collective& collective, const Operands& operands, Site site) {
  Warp& warp = *block.warp;
  block.thread->operands = operands;
  block.thread->site = site;
  if (warp.at_collective++ == 0) {
    warp.collective = &collective;
    warp.site = site;
  } else if (warp.collective != &collective || !same(warp.site, site)) {
    warp.differ = true;
  }
  yield();
}

void wait_for_arrival() {
  ++block.warp->waiting;
  yield();
}

void fail_at(const Thread& thread, const char* function, const std::string& message) {
  fail(thread, text(function, " (", describe(thread.site), "): ", message));
}

void check_shared(const Thread& thread, const char* function, const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const auto begin = reinterpret_cast<uintptr_t>(block.shared);
  if (address % 16 != 0) fail_at(thread, function, "shared memory address not a multiple of 16");
  if (address < begin || address - begin + 16 > block.shared_bytes) {
    fail_at(thread, function, text("16 bytes at offset ", static_cast<int64_t>(address - begin),
                                   " of ", block.shared_bytes, " bytes of shared memory"));
  }
}

namespace {

void run_block() {
  std::unique_ptr<void, void (*)(void*)> shared(nullptr, std::free);
  if (block.shared_bytes != 0) {
    void* memory;
    if (posix_memalign(&memory, 128, block.shared_bytes) != 0) throw std::bad_alloc();
    std::memset(memory, 0xff, block.shared_bytes);
    shared.reset(memory);
  }
  block.shared = static_cast<unsigned char*>(shared.get());
  for (size_t i = 0; i < block.size; ++i) {
    block.threads[i].fiber.prepare(run_thread, static_cast<int>(i));
  }
  begin_block();
  block.ready.clear();
  block.parked.clear();
  for (Warp& warp : block.warps) block.ready.push_back(&warp);
  block.warp = nullptr;
  block.at_barrier = block.exited = 0;
  block.thread = schedule();
  threadIdx = block.thread->index;
  launcher.switch_to(block.thread->fiber);
  if (failed) return;
  if (const std::string left = unfinished_block(); !left.empty()) {
    failure = text("block ", describe(blockIdx), ": ended with ", left);
    failed = true;
  }
}

void run_grid(const Launch& launch) {
  const unsigned *grid = launch.grid, *shape = launch.block;
  gridDim = dim3(grid[0], grid[1], grid[2]);
  blockDim = dim3(shape[0], shape[1], shape[2]);
  launched = &launch;
  failed = false;
  block.size = size_t{shape[0]} * shape[1] * shape[2];
  block.shared_bytes = launch.shared_bytes;
  while (block.threads.size() < block.size) block.threads.emplace_back();
  for (Thread& thread : block.threads) thread.awaited = nullptr;  // also what a larger block left
  block.warps.assign((block.size + kWarp - 1) / kWarp, Warp());
  for (unsigned i = 0; i < block.size; ++i) {
    Warp& warp = block.warps[i / kWarp];
    warp.lanes[warp.size++] = &block.threads[i];
    block.threads[i].index = {i % shape[0], i / shape[0] % shape[1], i / shape[0] / shape[1]};
    block.threads[i].copies.clear();
    block.threads[i].arrived = false;
  }
  std::vector<uint64_t> order(uint64_t{grid[0]} * grid[1] * grid[2]);
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[rng.below(i)]);
  for (const uint64_t i : order) {
    blockIdx = {static_cast<unsigned>(i % grid[0]), static_cast<unsigned>(i / grid[0] % grid[1]),
                static_cast<unsigned>(i / grid[0] / grid[1])};
    run_block();
    if (failed) break;
  }
  if (failed) {
    for (Thread& thread : block.threads) thread.fiber.forget_frames();
  }
}

void read_environment() {
  const char* seed = std::getenv("HYPERCONV_HOST_SEED");
  rng = Random((seed == nullptr ? 0 : std::strtoull(seed, nullptr, 10)) + launches++);
  const char* hurry = std::getenv("HYPERCONV_HOST_EAGER");
  eager = hurry != nullptr && std::strcmp(hurry, "0") != 0;
  const char* skip = std::getenv("HYPERCONV_HOST_SKIP");
  const char* colon = skip == nullptr ? nullptr : std::strchr(skip, ':');
  skipped_file = colon == nullptr ? nullptr : skip;
  skipped_length = colon == nullptr ? 0 : colon - skip;
  skipped_line = colon == nullptr ? 0 : std::atoi(colon + 1);
}

}  // namespace

bool skipped(Site site) {
  if (skipped_file == nullptr || site.line != skipped_line) return false;
  const char* file = base_name(site.file);
  return std::strlen(file) == skipped_length &&
         std::memcmp(file, skipped_file, skipped_length) == 0;
}

int launch(const Launch& launch) {
  uint64_t threads = 1;
  for (int d = 0; d < 3; ++d) {
    if (launch.grid[d] == 0 || launch.grid[d] > kGridAtMost[d]) {
      return report(cudaErrorInvalidConfiguration,
                    text("invalid configuration: gridDim[", d, "] is ", launch.grid[d]));
    }
    if (launch.block[d] == 0 || launch.block[d] > kBlockAtMost[d]) {
      return report(cudaErrorInvalidConfiguration,
                    text("invalid configuration: blockDim[", d, "] is ", launch.block[d]));
    }
    threads *= launch.block[d];
  }
  if (threads > kThreadsAtMost) {
    return report(cudaErrorInvalidConfiguration,
                  text("invalid configuration: ", threads, " threads in a block"));
  }
  const std::lock_guard<std::mutex> lock(launching);
  const auto allowed = allowed_shared_bytes.find(launch.kernel);
  const size_t limit = allowed == allowed_shared_bytes.end() ? kSharedByDefault : allowed->second;
  if (launch.shared_bytes > limit) {
    return report(cudaErrorInvalidValue, text("invalid argument: ", launch.shared_bytes,
                                              " bytes of shared memory where ", limit,
                                              " are allowed"));
  }
  read_environment();
  const char* refuse = std::getenv("HYPERCONV_HOST_REFUSE");
  if (refuse != nullptr) return report(static_cast<cudaError_t>(std::atoi(refuse)), "refused as told");
  const char* execute = std::getenv("HYPERCONV_HOST_EXECUTE");
  if (execute != nullptr && std::strcmp(execute, "0") == 0) return cudaSuccess;
  try {
    run_grid(launch);
  } catch (const std::exception& error) {
    return report(cudaErrorLaunchFailure, error.what());
  }
  return failed ? report(cudaErrorLaunchFailure, failure) : cudaSuccess;
}

int allow_shared_bytes(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > kSharedAtMost) {
    return report(cudaErrorInvalidValue, text("invalid argument: a maximum of ", bytes,
                                              " bytes of shared memory; a block has at most ",
                                              kSharedAtMost));
  }
  const std::lock_guard<std::mutex> lock(launching);
  ++attribute_calls;
  allowed_shared_bytes[kernel] = std::max<size_t>(bytes, kSharedByDefault);
  return cudaSuccess;
}

void block_barrier(Site site) {
  if (skipped(site)) return;
  ++block.warp->at_barrier;
  if (block.at_barrier++ == 0) {
    block.barrier = site;
    block.barriers_differ = false;
  } else if (!same(block.barrier, site)) {
    block.barriers_differ = true;
  }
  yield();
}

unsigned char* dynamic_shared() { return block.shared; }

void copy_async(void* shared, const void* global, bool inside, Site site) {
  Thread& self = *block.thread;
  self.site = site;
  check_shared(self, "cp_async_16", shared);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail_at(self, "cp_async_16", "global memory address not a multiple of 16");
  }
  std::memset(shared, 0xff, 16);
  self.copies.push_back({shared, inside ? global : nullptr});
}

void wait_for_copies() {
  std::vector<Copy>& copies = block.thread->copies;
  for (const Copy& copy : copies) {
    if (copy.global == nullptr) {
      std::memset(copy.shared, 0, 16);
    } else {
      std::memcpy(copy.shared, copy.global, 16);
    }
  }
  copies.clear();
}

}  // namespace hyperconv_host

cudaError_t cudaPeekAtLastError() { return hyperconv_host::last_error; }

cudaError_t cudaGetLastError() {
  return std::exchange(hyperconv_host::last_error, cudaSuccess);
}

const char* cudaGetErrorString(cudaError_t error) {
  using namespace hyperconv_host;
  if (error == cudaSuccess) return "no error";
  return error == detailed_error ? details.c_str() : "unspecified error";
}

namespace {
thread_local int current_device = 0;
}

cudaError_t cudaSetDevice(int device) {
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
// So few multiprocessors that persistent blocks have more than one round of work.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const bool memory = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin;
  *value = memory ? static_cast<int>(hyperconv_host::kSharedAtMost) : 3;
  return cudaSuccess;
}

// Leaves an error behind, as a call of other code would.
extern "C" __attribute__((visibility("default"))) void hyperconv_host_leave_error(int error) {
  hyperconv_host::last_error = static_cast<cudaError_t>(error);
}
extern "C" __attribute__((visibility("default"))) int hyperconv_host_last_error() {
  return cudaGetLastError();
}
// How often a kernel's shared memory was allowed.
extern "C" __attribute__((visibility("default"))) uint64_t hyperconv_host_attribute_calls() {
  return hyperconv_host::attribute_calls;
}
// Launches so far, executed or not.
extern "C" __attribute__((visibility("default"))) uint64_t hyperconv_host_launches() {
  return hyperconv_host::launches;
}
