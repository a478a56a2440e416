// Tensor maps of activations, for the copy engine of compute capability 9.0.
#pragma once

#include <cuda.h>

#include "launchers.h"

namespace hyperconv {

// Of an activation [batch, height, width, channels] of 16-bit numbers: `sizes` are channels, width, height and
// images, `box` the channels (128 bytes of them), width and height of a copy. Strides in elements, the
// channels' 1. Boxes are swizzled by 128 bytes; what they have outside the activation is zero.
Status encode_map(CUtensorMap* map, bool bfloat16, const void* data, const int (&sizes)[4],
                  const Strides& strides, const int (&box)[3]);

// Multiprocessors of the current device.
cudaError_t multiprocessors(int* count);

}  // namespace hyperconv
