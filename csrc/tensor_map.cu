#include "tensor_map.h"

namespace hyperconv {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function: found through the runtime, for the library not to depend on a driver to be loaded.
cudaError_t find_encode(Encode* encode) {
  static void* found = nullptr;
  if (!found) {
    cudaDriverEntryPointQueryResult result;
    void* function = nullptr;
    constexpr unsigned kSince = 12000;  // CUDA 12.0
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kSince,
                                                               cudaEnableDefault, &result);
    if (error != cudaSuccess) return reported(error);
    if (result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    found = function;
  }
  *encode = reinterpret_cast<Encode>(found);
  return cudaSuccess;
}

}  // namespace

Status encode_map(CUtensorMap* map, bool bfloat16, const void* data, const int (&sizes)[4],
                  const Strides& strides, const int (&box)[3]) {
  constexpr int kWidth = 2;  // bytes of a number
  if (strides.channel != 1) return kUnknownPlan;
  Encode encode;
  const cudaError_t error = find_encode(&encode);
  if (error != cudaSuccess) return {error};
  cuuint64_t extents[4], steps[3];
  const int64_t elements[3] = {strides.width, strides.height, strides.batch};
  for (int d = 0; d < 4; ++d) extents[d] = sizes[d];
  for (int d = 0; d < 3; ++d) {  // that of an axis of one position is anything
    steps[d] = sizes[d + 1] > 1 ? elements[d] * kWidth : static_cast<int64_t>(sizes[0]) * kWidth;
  }
  const cuuint32_t sides[4] = {static_cast<cuuint32_t>(box[0]), static_cast<cuuint32_t>(box[1]),
                               static_cast<cuuint32_t>(box[2]), 1};
  const cuuint32_t ones[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
             const_cast<void*>(data), extents, steps, sides, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return {result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue};
}

cudaError_t multiprocessors(int* count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return reported(error);
  return reported(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device));
}

}  // namespace hyperconv
