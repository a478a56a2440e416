// The engine for one level of instructions: compiled once for each, with HYPERCONV_LEVEL its name.
// Everything but that name has internal linkage, so that no function compiled for one processor is ever
// taken for another; hence also no template of the standard library.
#include "engine.h"
#include "vec.h"
#include "threads.h"
#include "convolve.h"
#include "mlp.h"

namespace hyperconv {
const Engine HYPERCONV_LEVEL = {convolve, mlp_forward, mlp_backward};
}
