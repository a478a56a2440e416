#pragma once
#include "vec.h"
#include "threads.h"
namespace hyperconv {
namespace {
Status mlp_forward(const Mlp&, ParallelFor) { return kUnknown; }
Status mlp_backward(const Mlp&, ParallelFor) { return kUnknown; }
}
}
