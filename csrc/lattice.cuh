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
    block.band = block.band * a.bands + phase[d] % a.bands;
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

// Halo position of patch position `l`, relative to the unit's first. The padding of the last 16-row tile
// meets zeros of the bands, and reads the unit's first input again.
__device__ __forceinline__ int patch_halo(const Lattice& map, int l) {
  if (l >= map.patch()) return 0;
  int width = l % map.axis[2].patch;
  l /= map.axis[2].patch;
  int height = l % map.axis[1].patch;
  int depth = l / map.axis[1].patch;
  return (depth * map.axis[1].halo + height) * map.axis[2].halo + width;
}

// Elements from a block's first input to that at `at`.
__device__ __forceinline__ int64_t input_distance(const Lattice& map, const Strides& strides,
                                                  Offset at) {
  return at.batch * strides.batch + at.depth * map.axis[0].step * strides.depth +
         at.height * map.axis[1].step * strides.height + at.width * map.axis[2].step * strides.width;
}

// Element offset of a block's first input, channel 0; it may lie outside the input.
__device__ __forceinline__ int64_t first_input(const Block& block, const Strides& strides) {
  return block.batch * strides.batch + block.input[0] * strides.depth +
         block.input[1] * strides.height + block.input[2] * strides.width;
}

// Whether input `at` of a block lies inside the input.
__device__ __forceinline__ bool is_input(const Lattice& map, const Block& block, Offset at) {
  const int place[3] = {at.depth, at.height, at.width};
  bool inside = block.batch + at.batch < map.batch;
#pragma unroll
  for (int d = 0; d < 3; ++d) {  // unsigned: below zero is beyond the size
    const unsigned coordinate = block.input[d] + place[d] * map.axis[d].step;
    inside = inside && coordinate < static_cast<unsigned>(map.axis[d].in_size);
  }
  return inside;
}

// Elements from a block's first output to that at `at`.
__device__ __forceinline__ int64_t output_distance(const Lattice& map, const Strides& strides,
                                                   Offset at) {
  return at.batch * strides.batch + at.depth * map.axis[0].phases * strides.depth +
         at.height * map.axis[1].phases * strides.height +
         at.width * map.axis[2].phases * strides.width;
}

// Element offset of a block's first output, channel 0.
__device__ __forceinline__ int64_t first_output(const Lattice& map, const Block& block,
                                                const Strides& strides) {
  const auto coordinate = [&](int d) -> int64_t {
    return block.phase[d] + map.axis[d].phases * block.output[d];
  };
  return block.batch * strides.batch + coordinate(0) * strides.depth +
         coordinate(1) * strides.height + coordinate(2) * strides.width;
}

// Whether output `at` of a block lies inside the output.
__device__ __forceinline__ bool is_output(const Lattice& map, const Block& block, Offset at) {
  const int place[3] = {at.depth, at.height, at.width};
  bool inside = block.batch + at.batch < map.batch;
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    const int coordinate = block.phase[d] + map.axis[d].phases * (block.output[d] + place[d]);
    inside = inside && coordinate < map.axis[d].out_size;
  }
  return inside;
}

}  // namespace hyperconv
