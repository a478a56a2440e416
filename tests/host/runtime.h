// Executes CUDA C++ kernels on the CPU, to prove their index maps, barriers and edges without a GPU. The
// kernels are compiled by the host compiler against this folder's cuda_runtime.h, cuda_fp16.h,
// cuda_bf16.h and host_ptx.h instead of CUDA's headers and csrc/ptx.cuh's inline assembly.
//
// A launch runs at once, in the calling thread, its blocks one after another in random order. The
// threads of a block are fibers:
//  - Between block barriers one warp, chosen at random, runs as far as it can before the next one does;
//    between warp collectives its lanes run one after another, in an order that changes each time. A
//    missing barrier thus shows as a wrong result rather than going unnoticed.
//  - A collective (shuffle, ldmatrix, mma, __syncwarp) waits until all 32 lanes have come to the same
//    call, then is computed for all of them as the PTX ISA says.
//  - Shared memory is a fresh heap block of exactly the launch's size for every thread block, filled
//    with 0xFF: NaN as a number, -1 as an index. Address sanitizer sees what lies beyond it.
//  - cp.async lands when its thread waits for it and not before; until then its 16 bytes are 0xFF.
//
// Errors end the launch and are what cudaLaunchKernelEx and, once, cudaGetLastError return;
// cudaGetErrorString has the details. Reported: lanes of a warp at different collectives, threads at
// different barriers, either while others have exited; addresses that are misaligned or outside shared
// memory in ldmatrix and cp.async; copies that nobody waited for; C++ exceptions.
//
// Environment, read at every launch:
//   HYPERCONV_HOST_SEED=n        the schedule's seed (default 0), to which the launches so far are added
//   HYPERCONV_HOST_SKIP=file:n   the __syncthreads() in line n of that file does nothing
//   HYPERCONV_HOST_EXECUTE=0     launches are checked and counted, and leave their output as it was
//   HYPERCONV_HOST_REFUSE=n      launches fail with the cudaError_t n, as those of a driver can
#pragma once

#include <cstddef>
#include <cstdint>

#pragma GCC visibility push(hidden)

namespace hyperconv_host {

// Where in the sources a thread waits. As a default argument: where the function was called.
struct Site {
  const char* file;
  int line;
};

constexpr int kWarp = 32;

struct Launch {
  unsigned grid[3], block[3];
  size_t shared_bytes;
  const void* kernel;          // its address: whose attributes apply
  void (*run)(const void* arguments);  // the kernel, once
  const void* arguments;
};

// cudaError_t values as ints, so that this header needs none of CUDA's names.
int launch(const Launch& launch);
int allow_shared_bytes(const void* kernel, int bytes);

// Below: for running kernels only.

void block_barrier(Site site);
void warp_barrier(unsigned mask, Site site);

enum class Shuffle { kIndex, kDown, kXor };
uint32_t shuffle(Shuffle kind, unsigned mask, uint32_t value, int operand, int width, Site site);

enum class Format { kHalf, kBfloat16, kTf32 };
void mma(Format format, float* c, const uint32_t* a, const uint32_t* b, Site site);
void ldmatrix(bool transpose, uint32_t* d, const void* row, Site site);

unsigned char* dynamic_shared();
void copy_async(void* shared, const void* global, bool inside, Site site);
void wait_for_copies();

}  // namespace hyperconv_host

#pragma GCC visibility pop
