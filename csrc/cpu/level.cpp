// The engine for one level of instructions: compiled once for each, with HYPERCONV_LEVEL its name.
// Everything but that name has internal linkage, so that no function compiled for one processor is ever
// taken for another; hence also no template of the standard library.
#include "engine.h"
#include "vec.h"
#include "threads.h"
#include "planes_worker.h"
#include "worker.h"
#include "mlp.h"
#include "digest.h"

namespace hyperconv {
namespace {

Status convolve(const Convolution& call, ParallelFor parallel_for) {
  switch (call.dtype) {
    case kFloat:
      return Convolver<float>(call, kAccess<kFloat>, parallel_for).run();
    case kDouble:
      return Convolver<double>(call, kAccess<kDouble>, parallel_for).run();
    case kBfloat16:
      return Convolver<float>(call, kAccess<kBfloat16>, parallel_for).run();
    case kHalf:
      return Convolver<float>(call, kAccess<kHalf>, parallel_for).run();
  }
  return kUnknown;
}

}  // namespace

const Engine HYPERCONV_LEVEL = {convolve, mlp_forward, mlp_backward, digest};
}
