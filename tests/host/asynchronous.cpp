// mbarriers, and the copies that count for them. See asynchronous.h.
#pragma GCC optimize("O3")

#include "asynchronous.h"

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "block.h"

namespace hyperconv_host {

struct Barrier {
  int count, pending;
  int64_t bytes;      // announced and not landed
  uint64_t phase;     // that is not complete
};

namespace {

constexpr int kChunk = 16, kMostArrivals = (1 << 20) - 1;

// 16 bytes of shared memory.
struct Chunk {
  const Barrier* barrier;  // that the copy which brings them counts for; null: no copy
  uint64_t phase;          // of it
  uint32_t unfenced;       // lanes that have not fenced what their warp has written
  const Warp* writer;
  int stores;         // that have yet to read them
  const Warp* reader;  // that waited for the last that did
  uint64_t read_at;    // what `synchronized` of it has to be for any warp to write to them again
};

struct Load {
  Barrier* barrier;
  uint64_t phase;
  std::vector<std::pair<void*, const void*>> pieces;  // 16 bytes each, from null: zeros
  Thread thread;  // that issued it, for messages
};

// A box of a tensor, chunk by chunk: where in shared memory, and where in global memory or null outside.
using Pieces = std::vector<std::pair<void*, const void*>>;

struct Store {
  Pieces pieces;
  bool committed;
};

uint32_t window;  // where shared memory begins
std::map<uint32_t, Barrier> barriers;
std::map<int, Barrier> named_barriers;  // by number
std::map<int, std::set<const Warp*>> arrived;  // at each of these
std::vector<Chunk> chunks;
std::vector<std::unique_ptr<Load>> loads;
std::map<const Thread*, std::vector<Store>> stores;
// Phases of a barrier that a thread knows to be complete.
std::map<std::pair<const Thread*, const Barrier*>, uint64_t> known;
// How often a warp passed a __syncwarp() or a named barrier; and that number of the second warp when both last
// passed the same one.
std::map<const Warp*, uint64_t> synchronized;
std::map<std::pair<const Warp*, const Warp*>, uint64_t> met;

Chunk& chunk_at(const void* pointer) {
  return chunks[(static_cast<const unsigned char*>(pointer) - block.shared) / kChunk];
}

// The shared memory at `address`, if it is all inside.
unsigned char* inside(const char* function, uint32_t address, size_t bytes, uint32_t alignment) {
  const Thread& self = *block.thread;
  if (address % alignment != 0) {
    fail_at(self, function, text("shared memory address not a multiple of ", alignment));
  }
  if (address < window || address - window + bytes > block.shared_bytes) {
    fail_at(self, function, text(bytes, " bytes at ", static_cast<int64_t>(address) - window, " of ",
                                 block.shared_bytes, " bytes of shared memory"));
  }
  return block.shared + (address - window);
}

Barrier& find(const char* function, uint32_t address) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail_at(*block.thread, function, "no mbarrier was initialised there");
  return found->second;
}

void complete_if_done(Barrier& barrier, const char* function) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  for (Thread& thread : block.threads) {
    if (thread.awaited != &barrier) continue;
    if (thread.arrived) {
      fail_at(thread, function, "a phase ended before this thread went on from the one before");
    }
    thread.arrived = (barrier.phase & 1) != thread.parity;
  }
}

// Until the phase of this parity, which is not complete, is.
void wait_for(Barrier& barrier, uint32_t parity) {
  Thread& self = *block.thread;
  self.awaited = &barrier;
  self.parity = parity;
  self.arrived = false;
  wait_for_arrival();
  self.awaited = nullptr;
  self.arrived = false;
}

void land(Load& load) {
  for (const auto& [shared, global] : load.pieces) {
    if (global == nullptr) {
      std::memset(shared, 0, kChunk);
    } else {
      std::memcpy(shared, global, kChunk);
    }
  }
  Barrier& barrier = *load.barrier;
  barrier.bytes -= static_cast<int64_t>(load.pieces.size()) * kChunk;
  if (barrier.phase != load.phase || barrier.bytes < 0) {
    fail_at(load.thread, "mbarrier", "more bytes landed than were announced");
  }
  complete_if_done(barrier, "mbarrier");
}

void start(const char* function, Pieces pieces, uint32_t address) {
  const Thread& self = *block.thread;
  Barrier& barrier = find(function, address);
  if (chunk_at(block.shared + (address - window)).unfenced != 0) {
    fail_at(self, function, "the mbarrier was initialised without a fence_proxy_async()");
  }
  for (const auto& [shared, global] : pieces) {
    Chunk& chunk = chunk_at(shared);
    if (chunk.stores != 0) fail_at(self, function, "a store has yet to read what this overwrites");
    chunk = {&barrier, barrier.phase, 0, nullptr, 0, nullptr, 0};
    std::memset(shared, 0xff, kChunk);
  }
  auto load = std::make_unique<Load>();
  load->barrier = &barrier;
  load->phase = barrier.phase;
  load->pieces = std::move(pieces);
  load->thread.index = self.index;
  load->thread.site = self.site;
  if (eager) {
    land(*load);
  } else {
    loads.push_back(std::move(load));
  }
}

Pieces box_of(const char* function, uint32_t address, const CUtensorMap& map, const Coordinates& at) {
  const uint32_t row = map.box[0] * 2;
  const size_t rows = size_t{map.box[1]} * map.box[2] * map.box[3];
  inside(function, address, rows * row, 128);
  Pieces pieces;
  for (size_t r = 0; r < rows; ++r) {
    const int64_t place[3] = {
        at[1] + static_cast<int64_t>(r % map.box[1]),
        at[2] + static_cast<int64_t>(r / map.box[1] % map.box[2]),
        at[3] + static_cast<int64_t>(r / map.box[1] / map.box[2]),
    };
    bool within = true;
    const unsigned char* data = map.data;
    for (int d = 0; d < 3; ++d) {
      within = within && place[d] >= 0 && place[d] < static_cast<int64_t>(map.sizes[d + 1]);
      if (within) data += place[d] * map.strides[d];
    }
    for (uint32_t b = 0; b < row; b += kChunk) {
      const int64_t element = at[0] + b / 2;
      const bool present =
          within && element >= 0 && element + kChunk / 2 <= static_cast<int64_t>(map.sizes[0]);
      if (within && !present && element > -kChunk / 2 && element < static_cast<int64_t>(map.sizes[0])) {
        fail_at(*block.thread, function, "16 bytes partly outside the tensor are not implemented");
      }
      const auto offset = static_cast<uint32_t>(r * row + b);
      pieces.emplace_back(shared_pointer(swizzled(address + offset, map.swizzle)),
                          present ? data + element * 2 : nullptr);
    }
  }
  return pieces;
}

// What a store writes is read when it is waited for.
void perform(const Store& store) {
  for (const auto& [shared, global] : store.pieces) {
    if (global != nullptr) std::memcpy(const_cast<void*>(global), shared, kChunk);
    --chunk_at(shared).stores;
  }
}

bool enter(Site site) {
  if (skipped(site)) return false;
  block.thread->site = site;
  return true;
}

}  // namespace

void begin_block() {
  window = static_cast<uint32_t>(1024 + 128 * rng.below(8));
  barriers.clear();
  named_barriers.clear();
  chunks.assign((block.shared_bytes + kChunk - 1) / kChunk, Chunk());
  loads.clear();
  stores.clear();
  known.clear();
  synchronized.clear();
  met.clear();
  arrived.clear();
  begin_block_products();
}

// The swizzle permutes 16-byte chunks by the address bits above those of a row: PTX ISA, "Swizzling modes".
uint32_t swizzled(uint32_t address, CUtensorMapSwizzle mode) {
  const uint32_t bits = mode == CU_TENSOR_MAP_SWIZZLE_128B  ? 7
                        : mode == CU_TENSOR_MAP_SWIZZLE_64B ? 3
                        : mode == CU_TENSOR_MAP_SWIZZLE_32B ? 1
                                                            : 0;
  return address ^ (address >> 7 & bits) << 4;
}

bool land_one() {
  if (loads.empty()) return false;
  std::swap(loads[rng.below(loads.size())], loads.back());
  const std::unique_ptr<Load> load = std::move(loads.back());
  loads.pop_back();
  land(*load);
  return true;
}

std::string unfinished() {
  const auto own = stores.find(block.thread);
  if (own != stores.end() && !own->second.empty()) {
    return text(own->second.size(), " tensor_store that it never waited for");
  }
  return unfinished_products();
}

std::string unfinished_block() {
  for (const auto& [address, barrier] : barriers) {
    if (barrier.bytes != 0) {
      return text(barrier.bytes, " bytes under way to the mbarrier at ", address - window);
    }
  }
  return loads.empty() ? unfinished_block_products() : "copies under way";
}

void warp_synchronized(const Warp& warp) { ++synchronized[&warp]; }

bool brought_together(const void* one, const void* other) {
  const Chunk &a = chunk_at(one), &b = chunk_at(other);
  return a.barrier == b.barrier && a.phase == b.phase;
}

void check_fenced(const Thread& issuer, const char* function, const void* pointer) {
  if (chunk_at(pointer).unfenced != 0) {
    fail_at(issuer, function, "reads what threads have written without a fence_proxy_async()");
  }
}

void check_landed(const Thread& lane, const char* function, const void* pointer) {
  const Chunk& chunk = chunk_at(pointer);
  if (chunk.barrier == nullptr) return;
  const auto found = known.find({&lane, chunk.barrier});
  if (found == known.end() || found->second <= chunk.phase) {
    fail_at(lane, function, "reads what a copy brings, without having waited for its mbarrier");
  }
}

void check_overwritable(const Warp& warp, const Thread& lane, const char* function, void* pointer) {
  Chunk& chunk = chunk_at(pointer);
  if (chunk.stores != 0) fail_at(lane, function, "a store has yet to read what this overwrites");
  if (chunk.reader == &warp && synchronized[&warp] < chunk.read_at) {
    fail_at(lane, function, "no __syncwarp() since a lane waited for the store that reads this");
  }
  if (chunk.reader != &warp && met[{&warp, chunk.reader}] < chunk.read_at) {
    fail_at(lane, function, "no named_barrier() since another warp waited for the store that reads this");
  }
  chunk = {nullptr, 0, 0xffffffffu, &warp, 0, chunk.reader, chunk.read_at};
}

uint32_t shared_address(const void* pointer) {
  return window + static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - block.shared);
}

// May lie outside: those who use it check.
void* shared_pointer(uint32_t address) {
  return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(block.shared) + address - window);
}

void mbarrier_init(uint32_t address, int count, Site site) {
  if (!enter(site)) return;
  void* memory = inside("mbarrier_init", address, 8, 8);
  if (count < 1 || count > kMostArrivals) {
    fail_at(*block.thread, "mbarrier_init", text("a count of ", count));
  }
  barriers[address] = {count, count, 0, 0};
  Chunk& chunk = chunk_at(memory);
  chunk.writer = block.warp;
  chunk.unfenced |= 1u << block.warp->order[block.warp->running];
}

void mbarrier_arrive(uint32_t address, int bytes, Site site) {
  if (!enter(site)) return;
  Barrier& barrier = find("mbarrier_arrive", address);
  if (bytes < 0 || barrier.bytes + bytes > kMostArrivals) {
    fail_at(*block.thread, "mbarrier_expect", text(barrier.bytes, " and ", bytes, " bytes announced"));
  }
  if (barrier.pending == 0) {
    fail_at(*block.thread, "mbarrier_arrive", text("more than ", barrier.count, " arrivals in a phase"));
  }
  barrier.bytes += bytes;
  --barrier.pending;
  complete_if_done(barrier, "mbarrier_arrive");
}

void mbarrier_wait(uint32_t address, uint32_t parity, Site site) {
  if (!enter(site)) return;
  Thread& self = *block.thread;
  Barrier& barrier = find("mbarrier_wait", address);
  if (parity > 1) fail_at(self, "mbarrier_wait", text("a parity of ", parity));
  if ((barrier.phase & 1) == parity) wait_for(barrier, parity);
  known[{&self, &barrier}] = barrier.phase;
}

// PTX ISA, barrier: of `threads` threads, the same number at every call until all of them have come.
void named_barrier(int id, int threads, Site site) {
  if (!enter(site)) return;
  const Thread& self = *block.thread;
  if (id < 1 || id > 15 || threads <= 0 || threads % kWarp != 0) {
    fail_at(self, "named_barrier", text("number ", id, " for ", threads, " threads"));
  }
  Barrier& barrier = named_barriers.try_emplace(id, Barrier{threads, threads, 0, 0}).first->second;
  if (barrier.pending == barrier.count) barrier.count = barrier.pending = threads;
  if (barrier.count != threads) {
    fail_at(self, "named_barrier", text(threads, " threads where others expect ", barrier.count));
  }
  const uint32_t parity = barrier.phase & 1;
  std::set<const Warp*>& warps = arrived[id];
  warps.insert(block.warp);
  if (--barrier.pending == 0) {
    for (const Warp* warp : warps) ++synchronized[warp];
    for (const Warp* one : warps) {
      for (const Warp* other : warps) met[{one, other}] = synchronized[other];
    }
    warps.clear();
  }
  complete_if_done(barrier, "named_barrier");
  if ((barrier.phase & 1) == parity) wait_for(barrier, parity);
}

void fence_proxy_async(Site site) {
  if (!enter(site)) return;
  const uint32_t others = ~(1u << block.warp->order[block.warp->running]);
  for (Chunk& chunk : chunks) {
    if (chunk.writer == block.warp) chunk.unfenced &= others;
  }
}

void bulk_load(uint32_t shared, const void* global, int bytes, uint32_t barrier, Site site) {
  if (!enter(site)) return;
  const Thread& self = *block.thread;
  if (bytes <= 0 || bytes % kChunk != 0) fail_at(self, "bulk_load", text(bytes, " bytes"));
  if (reinterpret_cast<uintptr_t>(global) % kChunk != 0) {
    fail_at(self, "bulk_load", "global memory address not a multiple of 16");
  }
  unsigned char* to = inside("bulk_load", shared, bytes, kChunk);
  Pieces pieces;
  for (int b = 0; b < bytes; b += kChunk) {
    pieces.emplace_back(to + b, static_cast<const unsigned char*>(global) + b);
  }
  start("bulk_load", std::move(pieces), barrier);
}

void tensor_load(uint32_t shared, const CUtensorMap& map, Coordinates at, uint32_t barrier, Site site) {
  if (!enter(site)) return;
  start("tensor_load", box_of("tensor_load", shared, map, at), barrier);
}

void tensor_store(uint32_t shared, const CUtensorMap& map, Coordinates at, Site site) {
  if (!enter(site)) return;
  Pieces pieces = box_of("tensor_store", shared, map, at);
  for (const auto& [from, global] : pieces) {
    check_fenced(*block.thread, "tensor_store", from);
    check_landed(*block.thread, "tensor_store", from);
    ++chunk_at(from).stores;
  }
  Store store = {std::move(pieces), false};
  if (eager) {
    for (const auto& [from, global] : store.pieces) {
      if (global != nullptr) std::memcpy(const_cast<void*>(global), from, kChunk);
    }
  }
  stores[block.thread].push_back(std::move(store));
}

void store_commit(Site site) {
  if (!enter(site)) return;
  for (Store& store : stores[block.thread]) store.committed = true;
}

// Waiting for what they have read is, here, waiting for what they have written.
void store_wait(bool, Site site) {
  if (!enter(site)) return;
  std::vector<Store>& own = stores[block.thread];
  const auto left = std::stable_partition(own.begin(), own.end(), [](Store& s) { return !s.committed; });
  for (auto store = left; store != own.end(); ++store) {
    if (eager) {
      for (const auto& piece : store->pieces) --chunk_at(piece.first).stores;
    } else {
      perform(*store);
    }
    for (const auto& piece : store->pieces) {
      chunk_at(piece.first).reader = block.warp;
      chunk_at(piece.first).read_at = synchronized[block.warp] + 1;
    }
  }
  own.erase(left, own.end());
}

}  // namespace hyperconv_host

// The limits are those that the driver's documentation gives for a map without interleaving.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill) {
  constexpr uint32_t kSpan[] = {256 * 2, 32, 64, 128};  // bytes along the innermost axis
  bool valid = rank == 4 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && box[0] * 2 % 16 == 0 &&
               box[0] * 2 <= kSpan[swizzle];
  for (cuuint32_t d = 0; valid && d < rank; ++d) {
    valid = sizes[d] >= 1 && sizes[d] <= uint64_t{1} << 32 && box[d] >= 1 && box[d] <= 256 &&
            element_strides[d] == 1;
    if (d > 0) {
      valid = valid && strides[d - 1] % 16 == 0 && strides[d - 1] < uint64_t{1} << 40;
    }
  }
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  map->data = static_cast<unsigned char*>(data);
  std::copy_n(sizes, 4, map->sizes);
  std::copy_n(strides, 3, map->strides);
  std::copy_n(box, 4, map->box);
  map->swizzle = swizzle;
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  if (std::strcmp(symbol, "cuTensorMapEncodeTiled") != 0) return cudaErrorInvalidValue;
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
