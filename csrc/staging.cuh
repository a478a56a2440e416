// What the convolution kernels share: filling shared memory from global memory, and the tables that say
// what lies where in it. All of a block's threads call these functions together.
#pragma once

#include "lattice.cuh"
#include "tile.cuh"

namespace hyperconv {

constexpr int kChannels = 16;  // input channels of one step

template <class N>
using Halo = Rows<N, kChannels>;

// One activation: its data, its strides, how many channels a group of it has.
template <class N>
struct Source {
  const typename N::Element* data;
  Strides strides;
  int channels;  // per group
  bool aligned;  // neighbouring channels are neighbours, and 16 bytes of them start at 16 bytes
};

// Hands out the block's shared memory piece by piece.
class Arena {
 public:
  __host__ __device__ __forceinline__ explicit Arena(unsigned char* base) : base_(base) {}

  // Only measures. (A test for a null pointer in `take` would cost the compiler the knowledge that the
  // pieces are in shared memory.)
  static __host__ Arena measuring() { return Arena(reinterpret_cast<unsigned char*>(kAlignment)); }

  template <typename T>
  __host__ __device__ __forceinline__ T* take(int count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<int>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }
  __host__ __device__ int used() const { return used_; }

 private:
  static constexpr int kAlignment = 128;

  unsigned char* base_;
  int used_ = 0;
};

// 16 bytes at a time: neighbouring threads copy the chunks of one row.
template <class N, int kWidth, class Where>
__device__ __forceinline__ void copy_rows_aligned(const Rows<N, kWidth>& rows, int count,
                                                  const Where& where, const Source<N>& source,
                                                  int64_t group, int channel) {
  constexpr int kChunks = Rows<N, kWidth>::kChunks;
  static_assert(32 % kChunks == 0, "a thread keeps to one chunk");
  const int chunk = threadIdx.x % kChunks;
  const int offset = channel + chunk * Rows<N, kWidth>::kPerChunk;
  const typename N::Element* data = source.data + group * source.channels + offset;
  const bool present = offset < source.channels;
  for (int i = threadIdx.x / kChunks; i < count; i += blockDim.x / kChunks) {
    int64_t element;
    const bool inside = where(i, &element) && present;
    ptx::cp_async_16(rows.chunk(i, chunk), inside ? data + element : source.data, inside);
  }
}

// One element at a time, whatever the strides.
template <class N, int kWidth, class Where>
__device__ __forceinline__ void copy_rows_anyhow(const Rows<N, kWidth>& rows, int count,
                                                 const Where& where, const Source<N>& source,
                                                 int64_t group, int channel) {
  using Element = typename N::Element;
  constexpr int kChunks = Rows<N, kWidth>::kChunks, kPerChunk = Rows<N, kWidth>::kPerChunk;
  for (int i = threadIdx.x; i < count * kChunks; i += blockDim.x) {
    const int position = i / kChunks, offset = channel + i % kChunks * kPerChunk;
    int64_t element;
    const bool inside = where(position, &element);
    const int64_t first = element + (group * source.channels + offset) * source.strides.channel;
    alignas(16) Element chunk[kPerChunk];
#pragma unroll
    for (int e = 0; e < kPerChunk; ++e) {
      const bool present = inside && offset + e < source.channels;
      chunk[e] = present ? source.data[first + e * source.strides.channel] : ptx::from_float<Element>(0);
    }
    *reinterpret_cast<uint4*>(rows.chunk(position, i % kChunks)) =
        *reinterpret_cast<const uint4*>(chunk);
  }
}

// Channels channel .. channel + kWidth - 1 (counted within the group) of `count` positions, one a row; zeros
// outside. where(i, &element) gives the element of position i, and whether it lies inside the activation.
template <class N, int kWidth, class Where>
__device__ __forceinline__ void copy_rows(const Rows<N, kWidth>& rows, int count, const Where& where,
                                          const Source<N>& source, int64_t group, int channel) {
  if (source.aligned) {
    copy_rows_aligned(rows, count, where, source, group, channel);
  } else {
    copy_rows_anyhow(rows, count, where, source, group, channel);
  }
}

// `count` packed tiles, consecutive in shared memory; source(n) is the n-th in global memory.
template <class N, class Source>
__device__ __forceinline__ void copy_tiles(typename N::Element* shared, int count,
                                           const Source& source) {
  constexpr unsigned kPerChunk = 16 / sizeof(typename N::Element);
  constexpr unsigned kChunks = kTileElements / kPerChunk;
  for (unsigned i = threadIdx.x; i < count * kChunks; i += blockDim.x) {
    ptx::cp_async_16(shared + i * kPerChunk, source(i / kChunks) + i % kChunks * kPerChunk, true);
  }
}

// A position of a halo or of the outputs, relative to a block that changes from item to item.
struct __align__(16) Position {
  int64_t element;
  Offset at;
};
__device__ __forceinline__ void fill_halo_table(Position* table, const Lattice& map,
                                                const Strides& strides) {
  for (int i = threadIdx.x; i < map.halo(); i += blockDim.x) {
    const Offset at = halo_offset(map, i);
    table[i] = {input_distance(map, strides, at), at};
  }
}
__device__ __forceinline__ void fill_output_table(Position* table, const Lattice& map,
                                                  const Strides& strides) {
  for (int i = threadIdx.x; i < map.units() * kUnit; i += blockDim.x) {
    const Offset at = output_offset(map, i);
    table[i] = {output_distance(map, strides, at), at};
  }
}
// The halo's positions as elements of the input, for a block that stays; -1 outside.
__device__ __forceinline__ void fill_element_table(int64_t* table, const Lattice& map,
                                                   const Block& block, const Strides& strides) {
  for (int i = threadIdx.x; i < map.halo(); i += blockDim.x) {
    const Offset at = halo_offset(map, i);
    const bool inside = is_input(map, block, at);
    table[i] = inside ? first_input(block, strides) + input_distance(map, strides, at) : -1;
  }
}
__device__ __forceinline__ void fill_patch_table(int* table, const Lattice& map) {
  for (int i = threadIdx.x; i < map.chunks() * 16; i += blockDim.x) table[i] = patch_halo(map, i);
}

// Halo rows of 16 patch positions of one unit.
struct PatchRows {
  const int* table;  // of the 16 positions
  int first;         // halo position of the unit's first input
  __device__ __forceinline__ int operator()(int row) const { return first + table[row]; }
};

// 16 consecutive rows.
struct ConsecutiveRows {
  int first;
  __device__ __forceinline__ int operator()(int row) const { return first + row; }
};

// Where one item of a gradient's work lies: its block of outputs, its input channels and its group.
struct __align__(16) Item {
  Block block;
  int in_block, group;
};

// The items from `begin` on that a block works through, in shared memory: 32 at a time are located by the
// lanes of one warp, long before they are needed, since each takes a dozen divisions.
class ItemTable {
 public:
  static constexpr int kBatch = 32, kItems = 2 * kBatch;

  __device__ __forceinline__ ItemTable(Item* items, int begin) : items_(items), begin_(begin) {}

  // where(item) for the batch that begins with `item`; those beyond the end are never read. Before a
  // barrier and all use of that batch, after all use of the one before the last.
  template <class Locate>
  __device__ __forceinline__ void locate(int item, const Locate& where) const {
    if (threadIdx.x >= kBatch) return;
    item += threadIdx.x;
    items_[static_cast<unsigned>(item - begin_) % kItems] = where(item);
  }
  __device__ __forceinline__ const Item& operator[](int item) const {
    return items_[static_cast<unsigned>(item - begin_) % kItems];
  }

 private:
  Item* items_;
  int begin_;
};

// One step of a pipeline: slice `slice` of turn `turn` of `item`. `turns` and `steps` count all turns and
// steps of the block, for the halves of what is double-buffered.
struct Step {
  int item, turn, slice, turns, steps;
};

// Items begin .. end - 1, each in `turns` turns of `slices` steps: compute(s) for each in order, on what
// copy(s) has brought while the step before was computed. An item's activations are brought by
// copy_item(item), with its first step; where shared memory holds those of one item only, not before the
// last item is done. If kBatch is not 0, begin_batch(item) is called before the first step of every kBatch
// items, in a loop of its own, to which what it does is charged; and at the end no copy is under way, not even
// one from before the pipeline where there is no item: shared memory may be used for something else.
template <int kBatch, class BeginBatch, class CopyItem, class Copy, class Compute>
__device__ __forceinline__ void pipeline(int begin, int end, int turns, int slices, bool one_item,
                                         const BeginBatch& begin_batch,
                                         const CopyItem& copy_item, const Copy& copy,
                                         const Compute& compute) {
  Step s = {begin, 0, 0, 0, 0};
  if (s.item < end) {
    copy_item(s.item);
    copy(s);
    ptx::cp_async_commit();
  }
  const auto take_step = [&] {
    ptx::cp_async_wait_all();
    __syncthreads();  // this step's data is there, and nobody reads the last step's any more
    const bool first = s.turn == 0 && s.slice == 0;
    if (one_item && first && s.item > begin) {
      copy_item(s.item);
      ptx::cp_async_wait_all();
      __syncthreads();  // the only item's
    }
    Step next = {s.item, s.turn, s.slice + 1, s.turns, s.steps + 1};
    if (next.slice == slices) {
      ++next.turn;
      ++next.turns;
      next.slice = 0;
    }
    if (next.turn == turns) {
      ++next.item;
      next.turn = 0;
    }
    if (next.item < end) {
      if (next.item != s.item && !one_item) copy_item(next.item);
      copy(next);
      ptx::cp_async_commit();
    }
    compute(s);
    s = next;
  };
  if constexpr (kBatch == 0) {
    while (s.item < end) take_step();
  } else {
    while (s.item < end) {
      begin_batch(s.item);
      const int stop = min(end, s.item + kBatch);
      while (s.item < stop) take_step();
    }
    ptx::cp_async_wait_all();
  }
}

// sum[i] = the sum over the block's warps, in their order, of value(i), for every i that they enumerate:
// visit(add) calls add(i, value) for each. Warps may enumerate the same i in any order.
template <class Visit>
__device__ __forceinline__ void sum_over_warps(float* sum, const Visit& visit) {
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) / 32 == warp) {
      visit([&](int i, float value) { sum[i] = warp == 0 ? value : sum[i] + value; });
    }
  }
  __syncthreads();
}

// Bands in shared memory: all of them once where they fit, else slice by slice, two slices at a time.
struct Slices {
  int size;   // 16-row tiles of the patch in a slice
  int count;  // slices of the patch

  __device__ __forceinline__ Slices(int slice, int chunks)
      : size(slice), count(ceil_div(chunks, slice)) {}
  __device__ __forceinline__ int tiles(int slice, int chunks) const {
    return min(size, chunks - slice * size);
  }
};

}  // namespace hyperconv
