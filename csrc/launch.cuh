// Launching: the only calls of the CUDA runtime.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "launchers.h"
#include "tile.cuh"

namespace hyperconv {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
                   cudaStream_t stream, Arguments&&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  return cudaGetLastError();
}

// Calls function(N{}) with the number format's type.
template <class Function>
cudaError_t with_number(Number number, const Function& function) {
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
  return cudaErrorInvalidValue;
}

}  // namespace hyperconv
