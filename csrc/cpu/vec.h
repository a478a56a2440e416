// Vectors as wide as the level's registers, by the compiler's own vector types, and the numbers in memory
// that they are read from and written to.
#pragma once
#include <cstdint>
#include <cstring>

#include "engine.h"

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

// What the numbers of a dtype are computed in, how kLanes of them are read from memory and written to it.
template <Dtype>
struct Stored;

template <class T>
struct AsItIs {
  using Number = T;
  using Compute = T;
  static Vec<T> read(const T* p) { return load(p); }
  static void write(T* p, Vec<T> v) { store(p, v); }
  static T read_one(const T* p) { return *p; }
  static void write_one(T* p, T value) { *p = value; }
};
template <>
struct Stored<kFloat> : AsItIs<float> {};
template <>
struct Stored<kDouble> : AsItIs<double> {};

typedef uint16_t Bits16 __attribute__((vector_size(kBytes / 2), aligned(2), may_alias));
typedef uint32_t Bits32 __attribute__((vector_size(kBytes), aligned(4), may_alias));

inline Bits32 select(Bits32 condition, Bits32 a, Bits32 b) { return (condition & a) | (~condition & b); }
inline Bits32 bits_of(Vec<float> v) { return reinterpret_cast<Bits32>(v); }
inline Vec<float> float_of(Bits32 bits) { return reinterpret_cast<Vec<float>>(bits); }
inline Bits32 read16(const uint16_t* p) {
  return __builtin_convertvector(*reinterpret_cast<const Bits16*>(p), Bits32);
}
inline void write16(uint16_t* p, Bits32 bits) {
  *reinterpret_cast<Bits16*>(p) = __builtin_convertvector(bits, Bits16);
}

template <class S>
void write_first(uint16_t* p, float value) {
  uint16_t numbers[kLanes<float>];
  S::write(numbers, broadcast(value));
  *p = numbers[0];
}

template <>
struct Stored<kBfloat16> {
  using Number = uint16_t;
  using Compute = float;
  static Vec<float> read(const uint16_t* p) { return float_of(read16(p) << 16); }
  static void write(uint16_t* p, Vec<float> v) {
    const Bits32 bits = bits_of(v), nan = (Bits32)((bits & 0x7fffffffu) > 0x7f800000u);
    const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to even
    write16(p, select(nan, (bits >> 16) | 0x40u, rounded));
  }
  static float read_one(const uint16_t* p) {
    const uint32_t bits = static_cast<uint32_t>(*p) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  static void write_one(uint16_t* p, float value) { write_first<Stored>(p, value); }
};

template <>
struct Stored<kHalf> {
  using Number = uint16_t;
  using Compute = float;
  // The exponent is moved by a multiplication, which also normalises subnormal numbers.
  static Vec<float> read(const uint16_t* p) {
    const Bits32 bits = read16(p), magnitude = (bits & 0x7fffu) << 13;
    const Bits32 finite = bits_of(float_of(magnitude) * 0x1p112f);
    const Bits32 special = (Bits32)(magnitude >= 0x0f800000u);
    return float_of(select(special, magnitude | 0x7f800000u, finite) | ((bits & 0x8000u) << 16));
  }
  // To the nearest, ties to even: normal numbers by integers, subnormal ones by adding the number whose
  // last place is theirs.
  static void write(uint16_t* p, Vec<float> v) {
    const Bits32 bits = bits_of(v), magnitude = bits & 0x7fffffffu;
    const Bits32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const Bits32 subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    Bits32 result = select((Bits32)(magnitude < 0x38800000u), subnormal, normal);
    result = select((Bits32)(magnitude >= 0x47800000u), Bits32{} + 0x7c00u, result);
    result = select((Bits32)(magnitude > 0x7f800000u), Bits32{} + 0x7e00u, result);
    write16(p, result | ((bits >> 16) & 0x8000u));
  }
  static float read_one(const uint16_t* p) {
    uint16_t numbers[kLanes<float>] = {*p};
    return read(numbers)[0];
  }
  static void write_one(uint16_t* p, float value) { write_first<Stored>(p, value); }
};

// Pairs of vectors whose numbers differ by W: f(of both the lanes without bit W, those with it), in the
// place of the first, and of the second.
template <class T, int W, class F>
inline void pair_lanes(Vec<T>* v, const F& f) {
  constexpr int V = kLanes<T>;
  typedef T Aligned __attribute__((vector_size(kBytes)));
  using Index = decltype(Aligned{} == Aligned{});
  if constexpr (W < V) {
    Index low, high;
    for (int l = 0; l < V; ++l) {
      low[l] = l & W ? V + (l ^ W) : l;
      high[l] = l & W ? V + l : l | W;
    }
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) {
      if (i & W) continue;
      const Aligned a = v[i], b = v[i + W];
      f(v[i], v[i + W], Vec<T>(__builtin_shuffle(a, b, low)), Vec<T>(__builtin_shuffle(a, b, high)));
    }
    pair_lanes<T, 2 * W>(v, f);
  }
}

// Lane l of v[0] becomes the sum of v[l]'s lanes.
template <class T>
inline void add_lanes(Vec<T>* v) {
  pair_lanes<T, 1>(v, [](Vec<T>& first, Vec<T>&, Vec<T> low, Vec<T> high) { first = low + high; });
}

// Lane l of v[n] becomes lane n of v[l].
template <class T>
inline void transpose(Vec<T>* v) {
  pair_lanes<T, 1>(v, [](Vec<T>& first, Vec<T>& second, Vec<T> low, Vec<T> high) {
    first = low;
    second = high;
  });
}

// The first `count` of fewer than 2 N numbers, by pieces of constant size.
template <int N, class Number>
inline void copy_part(Number* to, const Number* from, int count) {
  if (count & N) {
    std::memcpy(to, from, N * sizeof(Number));
    to += N;
    from += N;
  }
  if constexpr (N > 1) copy_part<N / 2>(to, from, count);
}

// The first `lanes` of a vector, not all, zeros behind them.
template <Dtype D>
inline Vec<typename Stored<D>::Compute> read_part(const typename Stored<D>::Number* p, int lanes) {
  constexpr int V = kLanes<typename Stored<D>::Compute>;
  typename Stored<D>::Number numbers[V] = {};
  copy_part<V / 2>(numbers, p, lanes);
  return Stored<D>::read(numbers);
}
template <Dtype D>
inline void write_part(typename Stored<D>::Number* p, Vec<typename Stored<D>::Compute> v, int lanes) {
  constexpr int V = kLanes<typename Stored<D>::Compute>;
  typename Stored<D>::Number numbers[V];
  Stored<D>::write(numbers, v);
  copy_part<V / 2>(p, numbers, lanes);
}

}  // namespace
}  // namespace hyperconv
