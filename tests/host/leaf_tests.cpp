// Small kernels through which tests/test_host_runtime.py tests the runtime and the leaf functions'
// twins. Each entry point returns the launch's error; 0 is success.
#include <cuda_runtime.h>

#include <stdexcept>

#include "ptx.cuh"

#define HYPERCONV_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace hyperconv;

constexpr uint32_t kAll = 0xffffffffu;

template <typename... Parameters, typename... Arguments>
int launch(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(Parameters...),
           Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// matrix [32, 8] in shared memory, lane l pointing at row rows[l]; registers [32, 4].
__global__ void ldmatrix_kernel(bool transpose, const uint16_t* matrix, const int* rows,
                                uint32_t* registers) {
  auto* shared = reinterpret_cast<uint16_t*>(ptx::dynamic_shared());
  for (int column = 0; column < 8; ++column) {
    shared[threadIdx.x * 8 + column] = matrix[threadIdx.x * 8 + column];
  }
  __syncthreads();
  uint32_t d[4];
  const uint16_t* row = shared + rows[threadIdx.x] * 8;
  if (transpose) {
    ptx::ldmatrix_x4_trans(d, row);
  } else {
    ptx::ldmatrix_x4(d, row);
  }
  for (int m = 0; m < 4; ++m) registers[threadIdx.x * 4 + m] = d[m];
}

// Lane by lane: a [32, 4], b [32, 2], c [32, 4].
__global__ void mma_kernel(int format, const uint32_t* a, const uint32_t* b, float* c) {
  const int lane = threadIdx.x;
  const uint32_t left[4] = {a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]};
  const uint32_t right[2] = {b[lane * 2], b[lane * 2 + 1]};
  float sum[4] = {c[lane * 4], c[lane * 4 + 1], c[lane * 4 + 2], c[lane * 4 + 3]};
  if (format == 0) ptx::mma_m16n8k16<__half>(sum, left, right);
  if (format == 1) ptx::mma_m16n8k16<__nv_bfloat16>(sum, left, right);
  if (format == 2) ptx::mma_m16n8k8_tf32(sum, left, right);
  for (int i = 0; i < 4; ++i) c[lane * 4 + i] = sum[i];
}

// What 16 bytes of shared memory hold when a copy has been issued, and when it has been waited for.
// Even threads copy from source, odd threads are outside, with a pointer to nowhere.
__global__ void copy_kernel(const uint4* source, uint4* issued, uint4* landed) {
  auto* shared = reinterpret_cast<uint4*>(ptx::dynamic_shared());
  const int i = threadIdx.x;
  const bool inside = i % 2 == 0;
  shared[i] = make_uint4(1, 2, 3, 4);
  ptx::cp_async_16(shared + i, inside ? source + i : reinterpret_cast<const uint4*>(16), inside);
  ptx::cp_async_commit();
  issued[i] = shared[i];
  ptx::cp_async_wait_all();
  landed[i] = shared[i];
}

enum class Fault {
  kBarrierLines,
  kBarrierExited,
  kBarrierExitedInWarp,
  kCollectiveBarrier,
  kCollectives,
  kCollectiveLines,
  kCollectiveExited,
  kPartialWarp,
  kPartialMask,
  kCopyUnwaited,
  kCopyMisalignedShared,
  kCopyMisalignedGlobal,
  kCopyOutside,
  kLdmatrixMisaligned,
  kLdmatrixOutside,
  kException,
  kOverrun,
  kMisalignedLoad,
};

// 64 threads, 512 bytes of shared memory. `which`: threads that differ from the others.
__global__ void faulty_kernel(Fault fault, const unsigned char* global) {
  const int i = threadIdx.x;
  unsigned char* shared = ptx::dynamic_shared();
  const bool odd = i % 2 == 1;
  uint32_t d[4];
  switch (fault) {
    case Fault::kBarrierLines:
      if (i < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case Fault::kBarrierExited:
      if (i < 32) __syncthreads();
      break;
    case Fault::kBarrierExitedInWarp:
      if (i != 7) __syncthreads();
      break;
    case Fault::kCollectiveBarrier:
      if (odd) {
        __syncthreads();
      } else {
        __syncwarp();
      }
      break;
    case Fault::kCollectives:
      odd ? __shfl_xor_sync(kAll, i, 1) : __shfl_sync(kAll, i, 1);
      break;
    case Fault::kCollectiveLines:
      if (odd) {
        __syncwarp();
      } else {
        __syncwarp();
      }
      break;
    case Fault::kCollectiveExited:
    case Fault::kPartialWarp:
      if (fault == Fault::kPartialWarp || odd) __syncwarp();
      break;
    case Fault::kPartialMask:
      if (i < 16) __shfl_sync(0xffffu, i, 0);
      break;
    case Fault::kCopyUnwaited:
      ptx::cp_async_16(shared, global, i == 40);
      if (i != 40) ptx::cp_async_wait_all();
      break;
    case Fault::kCopyMisalignedShared:
      ptx::cp_async_16(shared + 8, global, true);
      break;
    case Fault::kCopyMisalignedGlobal:
      ptx::cp_async_16(shared, global + 8, true);
      break;
    case Fault::kCopyOutside:
      ptx::cp_async_16(shared + 16 * i, global, true);  // from thread 32 on
      ptx::cp_async_wait_all();
      break;
    case Fault::kLdmatrixMisaligned:
      ptx::ldmatrix_x4(d, shared + (i == 9 ? 24 : 16));
      break;
    case Fault::kLdmatrixOutside:
      ptx::ldmatrix_x4_trans(d, shared + (i == 9 ? -16 : 16));
      break;
    case Fault::kException:
      if (i == 40) throw std::runtime_error("thrown by thread 40");
      break;
    case Fault::kOverrun:
      shared[512 + i] = 0;
      break;
    case Fault::kMisalignedLoad:
      d[0] = *reinterpret_cast<const uint32_t*>(shared + 4 * i + 2);
      shared[i] = static_cast<unsigned char>(d[0]);
      break;
  }
}

// Every thread replaces its number by its right neighbour's plus 1, `rounds` times.
__global__ void exchange_kernel(float* numbers, int rounds) {
  auto* shared = reinterpret_cast<float*>(ptx::dynamic_shared());
  const int i = threadIdx.x;
  float mine = numbers[i];
  for (int round = 0; round < rounds; ++round) {
    shared[i] = mine;
    __syncthreads();  // written
    mine = shared[(i + 1) % blockDim.x] + 1;
    __syncthreads();  // read
  }
  numbers[i] = mine;
}

// The same within a warp.
__global__ void warp_exchange_kernel(float* numbers, int rounds, bool synchronized) {
  auto* shared = reinterpret_cast<float*>(ptx::dynamic_shared());
  const int i = threadIdx.x;
  float mine = numbers[i];
  for (int round = 0; round < rounds; ++round) {
    shared[i] = mine;
    if (synchronized) __syncwarp();
    mine = shared[(i + 1) % 32] + 1;
    if (synchronized) __syncwarp();
  }
  numbers[i] = mine;
}

__global__ void shuffle_kernel(int kind, int width, const int* operands, const float* values,
                               float* shuffled) {
  const int i = threadIdx.x;
  if (kind == 0) shuffled[i] = __shfl_sync(kAll, values[i], operands[i], width);
  if (kind == 1) shuffled[i] = __shfl_down_sync(kAll, values[i], operands[i], width);
  if (kind == 2) shuffled[i] = __shfl_xor_sync(kAll, values[i], operands[i], width);
}

// [blocks * threads] each: the place of every block and thread in the order in which they ran; how often
// each thread ran; and its coordinates in a grid of three dimensions.
__global__ void order_kernel(int* clock, int* order, int* runs, uint3* blocks, uint3* threads) {
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int i = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
  order[i] = atomicAdd(clock, 1);
  atomicAdd(runs + i, 1);
  blocks[i] = blockIdx;
  threads[i] = threadIdx;
}

__global__ void add_kernel(float* sum, float* before) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  before[i] = atomicAdd(sum, 0.5f);
}

__global__ void poison_kernel(float* shared_at_start, int count) {
  auto* shared = reinterpret_cast<float*>(ptx::dynamic_shared());
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    shared_at_start[blockIdx.x * count + i] = shared[i];
    shared[i] = 0;
  }
}

__global__ void nothing_kernel() {}
__global__ void nothing_either_kernel() {}

__global__ void mma_loop_kernel(int rounds, float* c) {
  const uint32_t a[4] = {threadIdx.x, 1, 2, 3}, b[2] = {4, 5};
  float sum[4] = {};
  for (int round = 0; round < rounds; ++round) ptx::mma_m16n8k16<__half>(sum, a, b);
  c[blockIdx.x * blockDim.x + threadIdx.x] = sum[0];
}

__global__ void syncwarp_loop_kernel(int rounds) {
  for (int round = 0; round < rounds; ++round) __syncwarp();
}

__global__ void convert_kernel(int count, const float* values, uint16_t* halves, uint16_t* bfloats,
                               uint32_t* tf32, uint32_t* packed_halves, uint32_t* packed_bfloats) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const float next = values[(i + 1) % count];
    halves[i] = ptx::from_float<__half>(values[i]).bits;
    bfloats[i] = ptx::from_float<__nv_bfloat16>(values[i]).bits;
    tf32[i] = ptx::to_tf32(values[i]);
    packed_halves[i] = ptx::pack<__half>(values[i], next);
    packed_bfloats[i] = ptx::pack<__nv_bfloat16>(values[i], next);
  }
}

// [65536] each: the float of every bit pattern.
__global__ void widen_kernel(float* halves, float* bfloats) {
  for (unsigned i = threadIdx.x; i < 65536; i += blockDim.x) {
    halves[i] = ptx::to_float(__half{static_cast<uint16_t>(i)});
    bfloats[i] = ptx::to_float(__nv_bfloat16{static_cast<uint16_t>(i)});
  }
}

}  // namespace

HYPERCONV_EXPORT int leaf_ldmatrix(int transpose, const uint16_t* matrix, const int* rows,
                                   uint32_t* registers) {
  return launch(1, 32, 512, ldmatrix_kernel, transpose != 0, matrix, rows, registers);
}
HYPERCONV_EXPORT int leaf_mma(int format, const uint32_t* a, const uint32_t* b, float* c) {
  return launch(1, 32, 0, mma_kernel, format, a, b, c);
}
HYPERCONV_EXPORT int leaf_copy(int threads, const void* source, void* issued, void* landed) {
  return launch(1, threads, threads * 16, copy_kernel, static_cast<const uint4*>(source),
                static_cast<uint4*>(issued), static_cast<uint4*>(landed));
}
HYPERCONV_EXPORT int leaf_faulty(int fault) {
  alignas(16) static const unsigned char global[32] = {};
  const bool partial = static_cast<Fault>(fault) == Fault::kPartialWarp;
  return launch(1, partial ? 48 : 64, 512, faulty_kernel, static_cast<Fault>(fault), global);
}
HYPERCONV_EXPORT int leaf_exchange(int threads, int rounds, float* numbers) {
  return launch(1, threads, threads * sizeof(float), exchange_kernel, numbers, rounds);
}
HYPERCONV_EXPORT int leaf_warp_exchange(int synchronized, int rounds, float* numbers) {
  return launch(1, 32, 32 * sizeof(float), warp_exchange_kernel, numbers, rounds,
                synchronized != 0);
}
HYPERCONV_EXPORT int leaf_shuffle(int kind, int width, const int* operands, const float* values,
                                  float* shuffled) {
  return launch(1, 32, 0, shuffle_kernel, kind, width, operands, values, shuffled);
}
HYPERCONV_EXPORT int leaf_order(const unsigned* grid, const unsigned* block, int* clock, int* order,
                                int* runs, void* blocks, void* threads) {
  return launch(dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), 0,
                order_kernel, clock, order, runs, static_cast<uint3*>(blocks),
                static_cast<uint3*>(threads));
}
HYPERCONV_EXPORT int leaf_add(int blocks, int threads, float* sum, float* before) {
  return launch(blocks, threads, 0, add_kernel, sum, before);
}
HYPERCONV_EXPORT int leaf_poison(int blocks, int count, float* shared_at_start) {
  return launch(blocks, 64, count * sizeof(float), poison_kernel, shared_at_start, count);
}
HYPERCONV_EXPORT int leaf_configure(const unsigned* grid, const unsigned* block,
                                    uint64_t shared_bytes) {
  return launch(dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), shared_bytes,
                nothing_kernel);
}
HYPERCONV_EXPORT int leaf_allow(int other, int shared_bytes) {
  return cudaFuncSetAttribute(other != 0 ? nothing_either_kernel : nothing_kernel,
                              cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
}
HYPERCONV_EXPORT int leaf_mma_loop(int blocks, int threads, int rounds, float* c) {
  return launch(blocks, threads, 0, mma_loop_kernel, rounds, c);
}
HYPERCONV_EXPORT int leaf_syncwarp_loop(int blocks, int threads, int rounds) {
  return launch(blocks, threads, 0, syncwarp_loop_kernel, rounds);
}
HYPERCONV_EXPORT int leaf_convert(int count, const float* values, uint16_t* halves,
                                  uint16_t* bfloats, uint32_t* tf32, uint32_t* packed_halves,
                                  uint32_t* packed_bfloats) {
  return launch(1, 32, 0, convert_kernel, count, values, halves, bfloats, tf32, packed_halves,
                packed_bfloats);
}
HYPERCONV_EXPORT int leaf_widen(float* halves, float* bfloats) {
  return launch(1, 32, 0, widen_kernel, halves, bfloats);
}
HYPERCONV_EXPORT int leaf_last_error() { return cudaGetLastError(); }
HYPERCONV_EXPORT int leaf_peek_error() { return cudaPeekAtLastError(); }
HYPERCONV_EXPORT const char* leaf_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
