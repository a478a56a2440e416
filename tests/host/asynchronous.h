// What Hopper does beside the threads, as an adversary: barriers in shared memory, the copy engine, and the
// products of warpgroups.
//
//  - A copy lands when nothing else can run; until then its destination is 0xFF. A store reads shared memory
//    when it is waited for.
//  - A wgmma reads its left operand and shared memory, and gives its result, when its group is waited for, and
//    not before: until then its accumulators are NaN. That a thread writes to any of these registers meanwhile
//    is an error.
//  - With HYPERCONV_HOST_EAGER=1 all of these are done at once instead.
//  - Every 16 bytes of shared memory remember who wrote them. It is an error if the copy engine or a
//    wgmma reads what a thread has written and not fenced; if a lane reads what a copy brings and has not itself waited for the
//    phase of the mbarrier that the copy counts for; if a warp overwrites what a store of another lane has
//    read without a __syncwarp(), or of another warp without a named barrier, after that lane's wait.
//  - Barriers: errors are arrivals beyond the count, bytes not announced, a phase that ends before all who
//    waited for the one before it went on, and threads that wait for ever.
//  - Named barriers: errors are threads that wait for ever, and other counts at the same one.
//  - wgmma: errors are a group without a fence before it, warps of a warpgroup that do not multiply the same,
//    what is left unwaited for, and descriptors other than the kinds implemented: without a swizzle and,
//    transposed, N-major, swizzled by 128 bytes.
//  - The shared window begins at a random multiple of 128.
//
// Stricter than the PTX ISA is that every group begins with a wgmma.fence, and that each lane waits itself.
// Not modelled are the registers that setmaxnreg moves (only that whole warpgroups ask), and the caches of
// global memory.
#pragma once

#include <cuda.h>

#include <array>

#include "runtime.h"

#pragma GCC visibility push(hidden)

namespace hyperconv_host {

using Coordinates = std::array<int, 4>;  // innermost first

uint32_t shared_address(const void* pointer);
void* shared_pointer(uint32_t address);

void mbarrier_init(uint32_t barrier, int count, Site site);
void mbarrier_arrive(uint32_t barrier, int bytes, Site site);
void mbarrier_wait(uint32_t barrier, uint32_t parity, Site site);
void named_barrier(int id, int threads, Site site);
void fence_proxy_async(Site site);

void bulk_load(uint32_t shared, const void* global, int bytes, uint32_t barrier, Site site);
void tensor_load(uint32_t shared, const CUtensorMap& map, Coordinates at, uint32_t barrier, Site site);
void tensor_store(uint32_t shared, const CUtensorMap& map, Coordinates at, Site site);
void store_commit(Site site);
void store_wait(bool read, Site site);

void stmatrix(bool transpose, void* row, const uint32_t* s, Site site);
uint32_t movmatrix(uint32_t pair, Site site);
void set_registers(bool more, int count, Site site);

void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(int pending, Site site);
void wgmma(Format format, int width, bool transposed, float* d, const uint32_t* a, uint64_t b, bool accumulate,
           Site site);

}  // namespace hyperconv_host

#pragma GCC visibility pop
