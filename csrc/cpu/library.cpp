// The functions that hyperconv_ext/backends/cpu/library.py calls, and the choice of the instructions.
#include <cstring>

#include "engine.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Level {
  const char* name;
  const hyperconv::Engine* engine;
  bool (*runs)();
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}
#endif

// Best first.
const Level kLevels[] = {
#if defined(__x86_64__)
#ifdef HYPERCONV_AVX512_BF16  // where the compiler knows them
    {"avx512_bf16", &hyperconv::kAvx512Bf16,
     [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }},
#endif
    {"avx512", &hyperconv::kAvx512, has_avx512},
    {"avx2", &hyperconv::kAvx2,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"baseline", &hyperconv::kBaseline, [] { return true; }},
};

const Level* level;
hyperconv::ParallelFor parallel_for;

}  // namespace

// The size in bytes of a structure of engine.h, in the order of its declaration; 0 after the last.
EXPORT int64_t hyperconv_cpu_size(int32_t which) {
  const int64_t sizes[] = {sizeof(hyperconv::Axis), sizeof(hyperconv::Circle), sizeof(hyperconv::Strides),
                           sizeof(hyperconv::Convolution), sizeof(hyperconv::Mlp)};
  return which >= 0 && which < 5 ? sizes[which] : 0;
}

// Take the level of that name, or the best that this processor runs if it is null; and PyTorch's threads.
// Returns the name of the level taken, or null if there is none of that name that this processor runs.
EXPORT const char* hyperconv_cpu_start(const char* name, void* threads) {
  parallel_for = reinterpret_cast<hyperconv::ParallelFor>(threads);
  for (const Level& choice : kLevels) {
    if (choice.runs() && (!name || !std::strcmp(name, choice.name))) {
      level = &choice;
      return choice.name;
    }
  }
  return nullptr;
}

EXPORT int32_t hyperconv_cpu_convolve(const hyperconv::Convolution* call) {
  return level->engine->convolve(*call, parallel_for);
}

EXPORT int32_t hyperconv_cpu_mlp_forward(const hyperconv::Mlp* call) {
  return level->engine->mlp_forward(*call, parallel_for);
}

EXPORT int32_t hyperconv_cpu_mlp_backward(const hyperconv::Mlp* call) {
  return level->engine->mlp_backward(*call, parallel_for);
}

EXPORT uint64_t hyperconv_cpu_digest(const void* const* blocks, const int64_t* bytes, int32_t count) {
  return level->engine->digest(blocks, bytes, count);
}
