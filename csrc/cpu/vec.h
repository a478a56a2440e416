// Vectors as wide as the level's registers, by the compiler's own vector types.
#pragma once
#include <cstdint>

namespace hyperconv {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kBytes = 16, kRegisters = 32;
#else
constexpr int kBytes = 16, kRegisters = 16;
#endif

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kBytes), aligned(4), may_alias));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kBytes), aligned(8), may_alias));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kLanes = kBytes / sizeof(T);

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<Vec<T>*>(p) = v;
}
template <class T>
inline Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

// The first `lanes` of a vector, zeros behind them.
template <class T>
inline Vec<T> load_part(const T* p, int lanes) {
  Vec<T> v = {};
  for (int l = 0; l < lanes; ++l) v[l] = p[l];
  return v;
}

}  // namespace
}  // namespace hyperconv
