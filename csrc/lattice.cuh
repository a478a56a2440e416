// From a block number to output and input coordinates. Every kernel goes through these functions; none
// knows whether it computes the forward operator or the input gradient.
#pragma once

#include "lattice.h"

namespace hyperconv {

__device__ __forceinline__ int floor_div(int a, int b) {
  int quotient = a / b;
  return quotient - (a % b != 0 && (a < 0) != (b < 0));
}

// `lattice.Axis`: num, tap0 and origin of a phase.
__device__ __forceinline__ int phase_number(const Axis& a, int phase) {
  return a.scale * phase + a.shift;
}
__device__ __forceinline__ int first_tap(const Axis& a, int number) {
  int tap = (floor_div(number, a.divisor) * a.inverse) % a.residues;
  return tap < 0 ? tap + a.residues : tap;
}
__device__ __forceinline__ int phase_origin(const Axis& a, int phase) {
  int number = phase_number(a, phase);
  return floor_div(number - first_tap(a, number) * a.dilation, a.modulus) - a.back;
}

// The kernel tap that meets patch position `l` at output `t` of a unit; -1 for none.
__device__ __forceinline__ int tap_at(const Axis& a, int residue, int l, int t) {
  int number = phase_number(a, residue);
  int j = l - a.stride * t;
  int tap = a.first + first_tap(a, number) + a.tap_step * j;
  bool meets = j >= 0 && j < a.taps && tap >= 0 && tap < a.kernel && number % a.divisor == 0;
  return meets ? tap : -1;
}

// Its inverse along the patch: the position where output 0 of a unit meets `tap`, output t meets it
// stride * t further on; -1 for none.
__device__ __forceinline__ int position_of(const Axis& a, int residue, int tap) {
  int number = phase_number(a, residue);
  int offset = tap - a.first - first_tap(a, number);
  int j = offset / a.tap_step;
  bool meets = j * a.tap_step == offset && j >= 0 && j < a.taps && number % a.divisor == 0;
  return meets ? j : -1;
}

// Where something lies relative to its block: image, depth, height, width. -1 in `batch`: nowhere.
struct __align__(8) Offset {
  int16_t batch, depth, height, width;
};

// One block of outputs of one phase: its first image, and per axis its phase, its first output within
// the phase and the input coordinate of its halo's first position.
struct Block {
  int batch, phase[3], output[3], input[3];
  int band;  // which banded matrix its phase uses
};

// Block `index` of the phases() * blocks() that cover the outputs, width fastest.
__device__ __forceinline__ Block locate(const Lattice& map, int index) {
  Block block;
  block.band = 0;
  int tile[3], phase[3];
#pragma unroll
  for (int d = 2; d >= 0; --d) {
    tile[d] = index % map.axis[d].blocks;
    index /= map.axis[d].blocks;
  }
  block.batch = index % map.batch_blocks * map.batch_units;
  index /= map.batch_blocks;
#pragma unroll
  for (int d = 2; d >= 0; --d) {
    phase[d] = index % map.axis[d].phases;
    index /= map.axis[d].phases;
  }
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    const Axis& a = map.axis[d];
    block.phase[d] = phase[d];
    block.output[d] = tile[d] * a.units * a.unit;
    block.input[d] = phase_origin(a, phase[d]) + a.step * a.stride * block.output[d];
    block.band = block.band * a.modulus + phase[d] % a.modulus;
  }
  return block;
}

// Position `p` of a block's halo.
__device__ __forceinline__ Offset halo_offset(const Lattice& map, int p) {
  Offset at;
  at.width = p % map.axis[2].halo;
  p /= map.axis[2].halo;
  at.height = p % map.axis[1].halo;
  p /= map.axis[1].halo;
  at.depth = p % map.axis[0].halo;
  at.batch = p / map.axis[0].halo;
  return at;
}

// First output of unit `u` of a block, counted in units: multiply by `Axis::unit` for outputs.
__device__ __forceinline__ Offset unit_offset(const Lattice& map, int u) {
  Offset at;
  at.width = u % map.axis[2].units;
  u /= map.axis[2].units;
  at.height = u % map.axis[1].units;
  u /= map.axis[1].units;
  at.depth = u % map.axis[0].units;
  at.batch = u / map.axis[0].units;
  return at;
}

// Output `p` of a block: unit p / 16, position p % 16 in it.
__device__ __forceinline__ Offset output_offset(const Lattice& map, int p) {
  Offset at = unit_offset(map, p / kUnit);
  int t = p % kUnit;
  const Axis *depth = &map.axis[0], *height = &map.axis[1], *width = &map.axis[2];
  at.width = at.width * width->unit + t % width->unit;
  t /= width->unit;
  at.height = at.height * height->unit + t % height->unit;
  at.depth = at.depth * depth->unit + t / height->unit;
  return at;
}

// Halo position of the first input of unit `u`.
__device__ __forceinline__ int unit_halo(const Lattice& map, int u) {
  Offset at = unit_offset(map, u);
  int depth = at.depth * map.axis[0].unit * map.axis[0].stride;
  int height = at.height * map.axis[1].unit * map.axis[1].stride;
  int width = at.width * map.axis[2].unit * map.axis[2].stride;
  int row = (at.batch * map.axis[0].halo + depth) * map.axis[1].halo + height;
  return row * map.axis[2].halo + width;
}

// Halo position of patch position `l`, relative to the unit's first; -1 for the padding.
__device__ __forceinline__ int patch_halo(const Lattice& map, int l) {
  if (l >= map.patch()) return -1;
  int width = l % map.axis[2].patch;
  l /= map.axis[2].patch;
  int height = l % map.axis[1].patch;
  int depth = l / map.axis[1].patch;
  return (depth * map.axis[1].halo + height) * map.axis[2].halo + width;
}

// Element offset of input `at` of a block, channel 0; whether it lies inside the input.
__device__ __forceinline__ bool input_element(const Lattice& map, const Block& block,
                                              const Strides& strides, Offset at, int64_t* element) {
  int batch = block.batch + at.batch;
  int depth = block.input[0] + at.depth * map.axis[0].step;
  int height = block.input[1] + at.height * map.axis[1].step;
  int width = block.input[2] + at.width * map.axis[2].step;
  *element = batch * strides.batch + depth * strides.depth + height * strides.height +
             width * strides.width;
  return batch < map.batch && depth >= 0 && depth < map.axis[0].in_size && height >= 0 &&
         height < map.axis[1].in_size && width >= 0 && width < map.axis[2].in_size;
}

// Element offset of output `at` of a block, channel 0; whether it lies inside the output.
__device__ __forceinline__ bool output_element(const Lattice& map, const Block& block,
                                               const Strides& strides, Offset at,
                                               int64_t* element) {
  int batch = block.batch + at.batch;
  int depth = block.phase[0] + map.axis[0].phases * (block.output[0] + at.depth);
  int height = block.phase[1] + map.axis[1].phases * (block.output[1] + at.height);
  int width = block.phase[2] + map.axis[2].phases * (block.output[2] + at.width);
  *element = batch * strides.batch + depth * strides.depth + height * strides.height +
             width * strides.width;
  return batch < map.batch && depth < map.axis[0].out_size && height < map.axis[1].out_size &&
         width < map.axis[2].out_size;
}

}  // namespace hyperconv
