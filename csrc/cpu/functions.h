// Elementary functions of vectors, within about two units in the last place; NaN stays NaN.
//
// The polynomials are minimax fits, their coefficients in rising order. No step relies on a product
// being rounded before it is added to, nor on its not being: compilers differ in that.
#pragma once
#include <cstdint>

#include "vec.h"

namespace hyperconv {
namespace {

template <class T>
struct Numbers;
template <>
struct Numbers<float> {
  using Word = uint32_t;
  typedef Word Words __attribute__((vector_size(kBytes), aligned(4), may_alias));
  static constexpr int kMantissa = 23, kBias = 127, kSign = 31;
  // Added to a number below half of it, leaves the nearest integer in the lowest bits.
  static constexpr float kRounder = 0x1.8p23f;
  // pi / 2 in pieces, all but the last of which are exact when multiplied by 13 bits.
  static constexpr float kHalfPi[] = {1.5703125f, 0.000483751297f, 7.54953362e-08f, 2.56334407e-12f};
  // (sin x - x) / x^3 and (cos x - 1 + x^2 / 2) / x^4 by x^2, up to pi / 4.
  static constexpr float kSine[] = {-0.166666538f, 0.00833211932f, -0.000195091547f};
  static constexpr float kCosine[] = {0.0416666456f, -0.00138872338f, 2.44237053e-05f};
  // ln 2 in pieces, the first of which is exact when multiplied by an exponent.
  static constexpr float kLn2[] = {0.693145752f, 1.42860677e-06f};
  // (exp x - 1 - x) / x^2 by x, up to ln(2) / 2.
  static constexpr float kExp[] = {0.5f, 0.16666539f, 0.0416662693f, 0.00836715661f, 0.00139474415f};
  static constexpr float kExpLeast = -86.6f, kExpMost = 88.8f;  // still normal; infinite
  static constexpr float kTanhMost = 10;                        // 1
  // (exp(x^2) erfc(x) - 1) / 2t by t = x / (x + 3).
  static constexpr float kTail[] = {-1.6925689f,   2.80743837f,   -2.84812427f,    1.59267259f,
                                    -0.193488404f, -0.260033488f, -0.00979501102f, 0.2097193f,
                                    -0.134013772f, 0.0281937551f};
  static constexpr float kTailMost = 9.5f;  // exp(-x^2) is 0
};
template <>
struct Numbers<double> {
  using Word = uint64_t;
  typedef Word Words __attribute__((vector_size(kBytes), aligned(8), may_alias));
  static constexpr int kMantissa = 52, kBias = 1023, kSign = 63;
  static constexpr double kRounder = 0x1.8p52;
  static constexpr double kHalfPi[] = {1.5707963267923333, 2.5633441515839558e-12,
                                       1.0562999066987428e-23};
  static constexpr double kSine[] = {-0.16666666666666627,    0.008333333333320952,
                                     -0.0001984126982859737,  2.755731325990656e-06,
                                     -2.5050688833835466e-08, 1.589269628760855e-10};
  static constexpr double kCosine[] = {0.04166666666666658,    -0.0013888888888870959,
                                       2.48015872875178e-05,   -2.755731378799663e-07,
                                       2.0875646937331072e-09, -1.1355712458068701e-11};
  static constexpr double kLn2[] = {0.6931471805592082, 7.371002565167799e-13};
  static constexpr double kExp[] = {
      0.5,                    0.16666666666666677,    0.041666666666666706,   0.008333333333320788,
      0.0013888888888865297,  0.00019841269888519797, 2.4801587363600813e-05, 2.755724157351877e-06,
      2.7557240161366214e-07, 2.5110025880846915e-08, 2.0925244093229106e-09};
  static constexpr double kExpLeast = -707.9, kExpMost = 709.9;
  static constexpr double kTanhMost = 20;
  static constexpr double kTail[] = {
      -1.6925687506432798,    2.8074312493590106,    -2.8479812546708527,   1.59119374417274,
      -0.18452893591394715,   -0.2941165629871068,   0.073838944903127,     0.07876745270888383,
      -0.012459493571336131,  -0.019655265519870416, -0.02628647989466973,  0.07421511647586924,
      -0.15502287640296564,   0.2997177002167051,    -0.45132132059637137,  0.5276772932834051,
      -0.47901786872623947,   0.32649738375992643,   -0.15884269406314389,  0.05154543651015195,
      -0.009941270954922345,  0.000858452553261994};
  static constexpr double kTailMost = 27;
};
template <class T>
using Words = typename Numbers<T>::Words;

template <class T>
inline Words<T> words(Vec<T> x) {
  return reinterpret_cast<Words<T>>(x);
}
template <class T>
inline Vec<T> numbers(Words<T> bits) {
  return reinterpret_cast<Vec<T>>(bits);
}
template <class T>
inline Words<T> sign_bits() {
  return Words<T>{} + (typename Numbers<T>::Word(1) << Numbers<T>::kSign);
}
template <class T>
inline Vec<T> magnitude(Vec<T> x) {
  return numbers<T>(words<T>(x) & ~sign_bits<T>());
}

// sum_i coefficients[i] x^i
template <class T, int N>
inline Vec<T> polynomial(const T (&coefficients)[N], Vec<T> x) {
  Vec<T> sum = broadcast(coefficients[N - 1]);
  for (int i = N - 2; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

// Up to this magnitude `sine_and_cosine` is right; infinite and NaN are beyond.
constexpr int kSineMost = 10000;

template <class T>
struct SineAndCosine {
  Vec<T> sine, cosine;
};

template <class T>
inline SineAndCosine<T> sine_and_cosine(Vec<T> x) {
  using N = Numbers<T>;
  const Vec<T> rounded = x * T(0.63661977236758134) + N::kRounder;  // 2 / pi
  const Vec<T> quarters = rounded - N::kRounder;
  Vec<T> r = x;
  for (T piece : N::kHalfPi) r -= quarters * piece;
  const Vec<T> square = r * r;
  const Vec<T> s = r + r * square * polynomial<T>(N::kSine, square);
  const Vec<T> c = (1 - T(0.5) * square) + square * square * polynomial<T>(N::kCosine, square);
  // The quarter of the circle is in the two lowest bits.
  const Words<T> quarter = words<T>(rounded);
  const auto odd = (quarter & 1) != 0;
  const Words<T> s_sign = (quarter << (N::kSign - 1)) & sign_bits<T>();
  const Words<T> c_sign = ((quarter + 1) << (N::kSign - 1)) & sign_bits<T>();
  return {numbers<T>(words<T>(odd ? c : s) ^ s_sign), numbers<T>(words<T>(odd ? s : c) ^ c_sign)};
}

// exp(x) = 2^n (1 + more), |more| < 0.42, for x between kExpLeast and kExpMost.
template <class T>
struct Exponential {
  Vec<T> more;
  Vec<T> rounded;  // n + kRounder
};

template <class T>
inline Exponential<T> exponential(Vec<T> x) {
  using N = Numbers<T>;
  const Vec<T> rounded = x * T(1.4426950408889634) + N::kRounder;  // 1 / ln 2
  const Vec<T> n = rounded - N::kRounder;
  const Vec<T> r = (x - n * N::kLn2[0]) - n * N::kLn2[1];
  return {r + r * r * polynomial<T>(N::kExp, r), rounded};
}

// 2^(n + offset), if that is normal.
template <class T>
inline Vec<T> power_of_two(Vec<T> rounded, int offset) {
  using N = Numbers<T>;
  return numbers<T>((words<T>(rounded) + (N::kBias + offset)) << N::kMantissa);
}

// 0 instead of what is not normal.
template <class T>
inline Vec<T> exp(Vec<T> x) {
  using N = Numbers<T>;
  const Exponential<T> e = exponential<T>(x > N::kExpMost ? N::kExpMost - Vec<T>{} : x);
  // n goes up to where 2^n is infinite and 2^n (1 + more) may not be.
  const Vec<T> value = (2 + 2 * e.more) * power_of_two<T>(e.rounded, -1);
  return x < N::kExpLeast ? Vec<T>{} : value;
}

template <class T>
inline Vec<T> tanh(Vec<T> x) {
  using N = Numbers<T>;
  const Vec<T> size = magnitude<T>(x);
  const Exponential<T> e = exponential<T>(2 * (size > N::kTanhMost ? N::kTanhMost - Vec<T>{} : size));
  const Vec<T> power = power_of_two<T>(e.rounded, 0);
  const Vec<T> less_one = power * e.more + (power - 1);  // exp(2 |x|) - 1
  const Vec<T> value = less_one / (less_one + 2);
  return numbers<T>(words<T>(value) | (words<T>(x) & sign_bits<T>()));
}

// The probability that a standard normal variable is below x, (1 + erf(x / sqrt 2)) / 2;
// `bell` is exp(-x^2 / 2).
template <class T>
inline Vec<T> normal(Vec<T> x, Vec<T> bell) {
  using N = Numbers<T>;
  Vec<T> size = magnitude<T>(x) * T(0.70710678118654752);  // 1 / sqrt 2
  size = size > N::kTailMost ? N::kTailMost - Vec<T>{} : size;
  const Vec<T> t = size / (size + 3);
  const Vec<T> tail = bell * (T(0.5) + t * polynomial<T>(N::kTail, t));
  return x < 0 ? tail : 1 - tail;
}

}  // namespace
}  // namespace hyperconv
