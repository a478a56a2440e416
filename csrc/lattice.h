// The numbers of the row map of hyperconv_ext/backends/lattice.py.
//
// A *unit* is 16 neighbouring outputs of one phase, the rows of a banded matrix; a *block* is a box of
// units, over images too; the *patch* of a unit and the *halo* of a block are the inputs they read.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hyperconv {

constexpr int kUnit = 16;

// One spatial axis. The field names and formulas are those of `lattice.Axis`.
struct Axis {
  int out_size, in_size, kernel, phases, step, stride, taps;
  int scale, shift, divisor, inverse, residues, dilation, modulus, back, first, tap_step;
  int unit;    // outputs of a unit
  int units;   // units of a block
  int blocks;  // blocks of a phase
  int patch;   // (unit - 1) * stride + taps
  int halo;    // (units * unit - 1) * stride + taps
  int bands;
};

struct Lattice {
  Axis axis[3];      // depth, height, width
  int batch;         // images
  int batch_units;   // images of a block
  int batch_blocks;  // blocks over the images

  __host__ __device__ int taps() const {
    return axis[0].kernel * axis[1].kernel * axis[2].kernel;
  }
  __host__ __device__ int patch() const { return axis[0].patch * axis[1].patch * axis[2].patch; }
  // 16-row tiles of the patch, the last one padded with zeros.
  __host__ __device__ int chunks() const { return (patch() + 15) / 16; }
  __host__ __device__ int halo_image() const { return axis[0].halo * axis[1].halo * axis[2].halo; }
  __host__ __device__ int halo() const { return batch_units * halo_image(); }
  __host__ __device__ int units() const {
    return batch_units * axis[0].units * axis[1].units * axis[2].units;
  }
  __host__ __device__ int phases() const {
    return axis[0].phases * axis[1].phases * axis[2].phases;
  }
  __host__ __device__ int bands() const {
    return axis[0].bands * axis[1].bands * axis[2].bands;
  }
  __host__ __device__ int blocks() const {
    return batch_blocks * axis[0].blocks * axis[1].blocks * axis[2].blocks;
  }
};

// An activation [B, C, depth, height, width] by its strides in elements; any layout.
struct Strides {
  int64_t batch, depth, height, width, channel;
};

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace hyperconv
