// Launching: the only calls of the CUDA runtime, but for making a device current in library.cpp.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <utility>

#include "launchers.h"
#include "tile.cuh"

namespace hyperconv {

// All the shared memory that a block of this device can have, allowed to a kernel: once for each kernel and
// device, whatever the threads that launch it.
template <auto kKernel>
cudaError_t allow_shared_memory() {
  constexpr int kDevices = 64;
  static std::atomic<uint64_t> allowed{0};  // a bit for each device; beyond them, at every launch
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t bit = device < kDevices ? uint64_t{1} << device : 0;
  if (allowed.load(std::memory_order_acquire) & bit) return cudaSuccess;
  int bytes = 0;
  error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_release);
  return error;
}

template <auto kKernel, class... Arguments>
Status launch(int64_t blocks, int threads, int shared_bytes, cudaStream_t stream,
              Arguments&&... arguments) {
  if (blocks == 0) return {cudaSuccess};
  if (blocks > INT32_MAX) return {cudaErrorInvalidConfiguration};
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = reported(allow_shared_memory<kKernel>());
    if (error != cudaSuccess) return {error};
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return {reported(cudaLaunchKernelEx(&config, kKernel, std::forward<Arguments>(arguments)...))};
}

// Calls function(N{}) with the number format's type.
template <class Function>
Status with_number(Number number, const Function& function) {
  switch (number) {
    case Number::kHalf:
      return function(Half<__half>{});
    case Number::kBfloat16:
      return function(Half<__nv_bfloat16>{});
    case Number::kTf32:
      return function(Tf32{});
    case Number::kIeee:
      return function(Ieee{});
  }
  return kUnknownPlan;
}

}  // namespace hyperconv
