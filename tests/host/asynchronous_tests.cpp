// Small kernels through which tests/test_host_asynchronous.py tests the twins of csrc/ptx_sm90.cuh. Each entry
// point returns the launch's error; 0 is success.
#include <cuda.h>
#include <cuda_runtime.h>

#include "ptx_sm90.cuh"

#define HYPERCONV_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace hyperconv;

constexpr int kShared = 64 * 1024;

template <typename... Parameters, typename... Arguments>
int launch(int threads, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  cudaLaunchConfig_t config = {};
  config.gridDim = 1;
  config.blockDim = threads;
  config.dynamicSmemBytes = kShared;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// A 1024-byte aligned address behind the barrier, which is the first thing in shared memory.
uint32_t barrier_address() { return ptx::shared_address(ptx::dynamic_shared()); }
uint32_t data_address() { return (barrier_address() + 8 + 1023) & ~1023u; }
unsigned char* at(uint32_t address) { return ptx::dynamic_shared() + (address - barrier_address()); }

void make_barrier(int count) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier_address(), count);
    ptx::fence_proxy_async();
  }
  __syncthreads();
}

// d [128, kWidth / 2] (+)= a [128, 4] by the operand `b`, in cores or, without a `k_stride`, swizzled, with what the
// lanes see before the wait.
template <typename T, int kWidth, int kTransposed = 0>
__global__ void wgmma_kernel(const uint32_t* a, const void* b, int k_stride, int n_stride, bool accumulate,
                             float* d, float* before) {
  constexpr int kCount = kWidth / 2;
  make_barrier(1);
  const int bytes = kWidth * 32, i = threadIdx.x;
  if (i == 0) {
    ptx::mbarrier_expect(barrier_address(), bytes);
    ptx::bulk_load(data_address(), b, bytes, barrier_address());
  }
  ptx::mbarrier_wait(barrier_address(), 0);
  uint32_t left[4];
  float sum[kCount];
  for (int n = 0; n < 4; ++n) left[n] = a[i * 4 + n];
  for (int n = 0; n < kCount; ++n) sum[n] = d[i * kCount + n];
  ptx::wgmma_fence();
  const uint64_t right = k_stride == 0 ? ptx::swizzled_descriptor(data_address())
                                       : ptx::core_descriptor(data_address(), k_stride, n_stride);
  ptx::Wgmma<T, kWidth, kTransposed>::multiply(sum, left, right, accumulate);
  ptx::Wgmma<T, kWidth, kTransposed>::multiply(sum, left, right, true);
  ptx::wgmma_commit();
  for (int n = 0; n < kCount; ++n) before[i * kCount + n] = sum[n];
  ptx::wgmma_wait<0>();
  for (int n = 0; n < kCount; ++n) d[i * kCount + n] = sum[n];
}

__global__ void movmatrix_kernel(const uint32_t* pairs, uint32_t* turned) {
  turned[threadIdx.x] = ptx::movmatrix_trans(pairs[threadIdx.x]);
}

// registers [32, 4] to rows of 16 bytes, lane l's at rows[l].
__global__ void stmatrix_kernel(bool transpose, const int* rows, const uint32_t* registers, uint32_t* stored) {
  const int i = threadIdx.x;
  const uint32_t s[4] = {registers[i * 4], registers[i * 4 + 1], registers[i * 4 + 2],
                         registers[i * 4 + 3]};
  if (transpose) {
    ptx::stmatrix_x4_trans(data_address() + 16 * rows[i], s);
  } else {
    ptx::stmatrix_x4(data_address() + 16 * rows[i], s);
  }
  std::memcpy(stored + 4 * i, at(data_address() + 16 * i), 16);
}

// A box as it lies in shared memory once it has been issued, and once it has been waited for.
__global__ void load_kernel(const CUtensorMap map, const int* place, int bytes, unsigned char* issued,
                            unsigned char* landed) {
  make_barrier(1);
  if (threadIdx.x == 0) {
    ptx::mbarrier_expect(barrier_address(), bytes);
    ptx::tensor_load(data_address(), &map, place[0], place[1], place[2], place[3], barrier_address());
    std::memcpy(issued, at(data_address()), bytes);
  }
  ptx::mbarrier_wait(barrier_address(), 0);
  if (threadIdx.x == 0) std::memcpy(landed, at(data_address()), bytes);
}

// `box` to the tensor. If `late`, it is overwritten with ones before it is waited for.
__global__ void store_kernel(const CUtensorMap map, const int* place, int bytes, const unsigned char* box,
                             bool late) {
  if (threadIdx.x != 0) return;
  std::memcpy(at(data_address()), box, bytes);
  ptx::fence_proxy_async();
  ptx::tensor_store(data_address(), &map, place[0], place[1], place[2], place[3]);
  ptx::store_commit();
  if (late) std::memset(at(data_address()), 1, bytes);
  ptx::store_wait();
}

// The phase in which each of two warps reads what thread 0 has put there for it, `rounds` times.
__global__ void phases_kernel(int rounds, int* read) {
  const uint32_t full = barrier_address(), empty = full + 8;
  volatile int* box = reinterpret_cast<volatile int*>(at(data_address()));
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init(empty, 2);
    ptx::fence_proxy_async();
  }
  __syncthreads();
  const int warp = threadIdx.x / 32 - 1;
  if (threadIdx.x == 0) {
    for (int round = 0; round < rounds; ++round) {
      ptx::mbarrier_wait(empty, (round & 1) ^ 1);
      *box = round;
      ptx::mbarrier_arrive(full);
    }
  } else if (warp >= 0) {
    for (int round = 0; round < rounds; ++round) {
      ptx::mbarrier_wait(full, round & 1);
      if (threadIdx.x % 32 == 0) read[warp * rounds + round] = *box;
      __syncwarp();
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty);
    }
  }
}

// What each of 96 threads finds once each of three warps has added one, `rounds` times.
__global__ void named_kernel(int rounds, int* read) {
  volatile int* sum = reinterpret_cast<volatile int*>(at(data_address()));
  if (threadIdx.x == 0) *sum = 0;
  __syncthreads();
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x % 32 == 0) *sum = *sum + 1;
    ptx::named_barrier<96>(1);
    read[round * 96 + threadIdx.x] = *sum;
    ptx::named_barrier<96>(1);
  }
}

enum class Fault {
  kNone,
  kNoBarrier,
  kBarrierUnfenced,
  kBarrierCount,
  kBarrierMisaligned,
  kBarrierOutside,
  kOverArrival,
  kWaitForEver,
  kLapped,
  kUnannounced,
  kUnawaited,
  kBulkBytes,
  kBulkMisaligned,
  kBulkGlobal,
  kBulkOutside,
  kReadUnawaited,
  kReadByAnother,
  kLoadMisaligned,
  kStoreUnfenced,
  kStoreUnwaited,
  kStoreUncommitted,
  kOverwriteUnread,
  kOverwriteUnsynchronized,
  kOverwriteByAnother,
  kLoadOverStore,
  kWgmmaUnfenced,
  kWgmmaUnwaited,
  kWgmmaUncommitted,
  kWgmmaLeftChanged,
  kWgmmaSumChanged,
  kWgmmaDescriptor,
  kWgmmaOutside,
  kWgmmaRightUnfenced,
  kWgmmaRightMisaligned,
  kWgmmaLanes,
  kWgmmaWarps,
  kRegisters,
  kRegistersWarps,
  kNamedForEver,
  kNamedCount,
  kNamedNumber,
};

// 128 threads. What is right but for `fault`: a core operand is brought, multiplied by, and stored.
__global__ void faulty_kernel(Fault fault, const unsigned char* global, const CUtensorMap map) {
  const int i = threadIdx.x, warp = i / 32, lane = i % 32;
  const uint32_t barrier = barrier_address(), data = data_address(), staged = data + 4096;
  const auto is = [&](Fault which) { return fault == which; };
  if (i == 0) {
    if (!is(Fault::kNoBarrier)) {
      const uint32_t address = barrier + (is(Fault::kBarrierMisaligned) ? 4 : 0) +
                               (is(Fault::kBarrierOutside) ? kShared : 0);
      ptx::mbarrier_init(address, is(Fault::kBarrierCount) ? 0 : 1);
    }
    if (!is(Fault::kBarrierUnfenced)) ptx::fence_proxy_async();
    if (is(Fault::kLapped)) ptx::mbarrier_init(barrier + 8, 128);
  }
  __syncthreads();
  if (is(Fault::kLapped)) {  // thread 0 goes round while others have yet to go on
    if (i == 0) {
      ptx::mbarrier_wait(barrier + 8, 1);
      for (int n = 0; n < 128; ++n) ptx::mbarrier_arrive(barrier);
    } else {
      ptx::mbarrier_wait(barrier, 0);
    }
    return;
  }
  if (is(Fault::kRegisters)) ptx::more_registers<100>();
  if (!is(Fault::kRegistersWarps) || warp < 2) {
    ptx::more_registers<240>();
  } else {
    ptx::more_registers<232>();
  }

  if (is(Fault::kNamedNumber)) ptx::named_barrier<128>(16);
  if (is(Fault::kNamedCount) && warp == 0) {
    ptx::named_barrier<96>(2);
  } else if (!(is(Fault::kNamedForEver) && i == 3)) {
    ptx::named_barrier<128>(2);
  }

  constexpr int kBytes = 64 * 32;
  if (i == 0) {
    if (!is(Fault::kUnannounced)) {
      ptx::mbarrier_expect(barrier, kBytes + (is(Fault::kWaitForEver) ? 16 : 0));
    }
    const uint32_t to = data + (is(Fault::kBulkMisaligned) ? 8 : 0) + (is(Fault::kBulkOutside) ? kShared : 0);
    ptx::bulk_load(to, global + (is(Fault::kBulkGlobal) ? 8 : 0), kBytes - (is(Fault::kBulkBytes) ? 8 : 0),
                   barrier);
    if (is(Fault::kOverArrival)) ptx::mbarrier_arrive(barrier);
  }
  if (is(Fault::kUnawaited)) return;
  if (!is(Fault::kReadUnawaited) && !(is(Fault::kReadByAnother) && lane == 5)) {
    ptx::mbarrier_wait(barrier, 0);
  }
  uint32_t left[4] = {1, 2, 3, 4}, extra[4];
  ptx::ldmatrix_x4_trans(extra, data + 16 * lane);
  float sum[32] = {};
  if (!is(Fault::kWgmmaUnfenced)) ptx::wgmma_fence();
  uint64_t right = ptx::core_descriptor(data, 1024);
  if (is(Fault::kWgmmaDescriptor)) right |= uint64_t{1} << 62;
  if (is(Fault::kWgmmaOutside)) right = ptx::core_descriptor(data, 1024 * 100);
  if (is(Fault::kWgmmaLanes) && lane == 7) right += 1;
  if (is(Fault::kWgmmaWarps) && warp == 3) right += 8;
  if (is(Fault::kWgmmaRightUnfenced)) ptx::stmatrix_x4(data + 16 * lane, left);
  if (is(Fault::kWgmmaRightMisaligned)) {
    ptx::Wgmma<__half, 64, 1>::multiply(sum, left, ptx::swizzled_descriptor(data + 128), true);
  }
  ptx::Wgmma<__half, 64>::multiply(sum, left, right, true);
  if (!is(Fault::kWgmmaUncommitted)) ptx::wgmma_commit();
  if (is(Fault::kWgmmaLeftChanged)) left[2] = 5;
  if (is(Fault::kWgmmaSumChanged)) sum[3] = 6;
  if (is(Fault::kWgmmaUnwaited)) {
    ptx::wgmma_wait<1>();
  } else {
    ptx::wgmma_wait<0>();
  }

  const bool both = is(Fault::kOverwriteByAnother);
  if (both && warp == 1) {
    ptx::named_barrier<64>(3);
    ptx::stmatrix_x4(staged + 16 * lane, left);
  }
  if (warp != 0) return;
  ptx::stmatrix_x4(staged + 16 * lane, left);
  ptx::stmatrix_x4(staged + 512 + 16 * lane, left);
  if (!is(Fault::kStoreUnfenced)) ptx::fence_proxy_async();
  __syncwarp();
  if (lane == 0) {
    ptx::tensor_store(staged, &map, 0, 0, 0, 0);
    if (!is(Fault::kStoreUncommitted)) ptx::store_commit();
    if (is(Fault::kLoadMisaligned)) ptx::tensor_load(data + 16, &map, 0, 0, 0, 0, barrier);
    if (is(Fault::kLoadOverStore)) ptx::tensor_load(staged, &map, 0, 0, 0, 0, barrier);
  }
  if (both) ptx::named_barrier<64>(3);
  if (lane == 0) {
    if (!is(Fault::kStoreUnwaited) && !is(Fault::kOverwriteUnread)) ptx::store_wait_read();
  }
  if (!is(Fault::kOverwriteUnsynchronized)) __syncwarp();
  ptx::stmatrix_x4(staged + 16 * lane, left);
  if (is(Fault::kOverwriteUnread) && lane == 0) ptx::store_wait();
}

}  // namespace

HYPERCONV_EXPORT int leaf_wgmma(int half, int width, int transposed, const void* a, const void* b, int k_stride,
                                int n_stride, int accumulate, float* d, float* before) {
  const auto with = [&](auto* kernel) {
    return launch(128, kernel, static_cast<const uint32_t*>(a), b, k_stride, n_stride, accumulate != 0, d,
                  before);
  };
  const auto of = [&](auto element) {
    using T = decltype(element);
    if (transposed != 0) return with(wgmma_kernel<T, 64, 1>);
    if (width == 32) return with(wgmma_kernel<T, 32>);
    if (width == 48) return with(wgmma_kernel<T, 48>);
    if (width == 64) return with(wgmma_kernel<T, 64>);
    if (width == 80) return with(wgmma_kernel<T, 80>);
    return with(wgmma_kernel<T, 128>);
  };
  return half != 0 ? of(__half()) : of(__nv_bfloat16());
}
HYPERCONV_EXPORT int leaf_movmatrix(const uint32_t* pairs, uint32_t* turned) {
  return launch(32, movmatrix_kernel, pairs, turned);
}
HYPERCONV_EXPORT int leaf_stmatrix(int transpose, const int* rows, const uint32_t* registers,
                                   uint32_t* stored) {
  return launch(32, stmatrix_kernel, transpose != 0, rows, registers, stored);
}
HYPERCONV_EXPORT int leaf_encode(CUtensorMap* map, void* data, const cuuint64_t* sizes,
                                 const cuuint64_t* strides, const cuuint32_t* box, int swizzle) {
  const cuuint32_t ones[4] = {1, 1, 1, 1};
  return cuTensorMapEncodeTiled(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, data, sizes, strides, box, ones,
                                CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(swizzle),
                                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}
HYPERCONV_EXPORT int leaf_load(const CUtensorMap* map, const int* place, int bytes, unsigned char* issued,
                               unsigned char* landed) {
  return launch(32, load_kernel, *map, place, bytes, issued, landed);
}
HYPERCONV_EXPORT int leaf_store(const CUtensorMap* map, const int* place, int bytes,
                                const unsigned char* box, int late) {
  return launch(1, store_kernel, *map, place, bytes, box, late != 0);
}
HYPERCONV_EXPORT int leaf_phases(int rounds, int* read) {
  return launch(96, phases_kernel, rounds, read);
}
HYPERCONV_EXPORT int leaf_named(int rounds, int* read) { return launch(96, named_kernel, rounds, read); }
HYPERCONV_EXPORT int leaf_faulty(int fault, const unsigned char* global, const CUtensorMap* map) {
  return launch(128, faulty_kernel, static_cast<Fault>(fault), global, *map);
}
HYPERCONV_EXPORT int leaf_last_error() { return cudaGetLastError(); }
HYPERCONV_EXPORT const char* leaf_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
