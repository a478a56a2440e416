// Discrete Fourier transforms of vectors of complex numbers: lanes are channels, so nothing is shuffled.
// A circle of n points is n = N1 N2 ..., radices 3, 4, 5, 6 and 8; each stage is a loop of small transforms.
#pragma once
#include "vec.h"

namespace hyperconv {
namespace {

template <class T>
struct Complex {
  Vec<T> re, im;
};

template <class T>
inline Complex<T> operator+(Complex<T> a, Complex<T> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class T>
inline Complex<T> operator-(Complex<T> a, Complex<T> b) {
  return {a.re - b.re, a.im - b.im};
}
// times (c + i s)
template <class T>
inline Complex<T> turned(Complex<T> a, T c, T s) {
  return {a.re * c - a.im * s, a.im * c + a.re * s};
}
// times S i, S = 1 or -1
template <int S, class T>
inline Complex<T> quarter(Complex<T> a) {
  if (S > 0) return {-a.im, a.re};
  return {a.im, -a.re};
}

template <class T>
inline Complex<T> load_complex(const T* p) {
  return {load(p), load(p + kLanes<T>)};
}
template <class T>
inline void store_complex(T* p, Complex<T> v) {
  store(p, v.re);
  store(p + kLanes<T>, v.im);
}

// cos and sin of 2 pi m / N for the odd radices.
template <int N>
struct Roots;
template <>
struct Roots<3> {
  static constexpr double cos[3] = {1, -.5, -.5}, sin[3] = {0, .86602540378443865, -.86602540378443865};
};
template <>
struct Roots<5> {
  static constexpr double cos[5] = {1, .30901699437494742, -.80901699437494742, -.80901699437494742,
                                    .30901699437494742};
  static constexpr double sin[5] = {0, .95105651629515357, .58778525229247313, -.58778525229247313,
                                    -.95105651629515357};
};

// a[k] = sum_n a[n] exp(S 2 pi i n k / N)
template <int N, int S, class T>
inline void dft(Complex<T>* a) {
  if constexpr (N == 4) {
    const Complex<T> p = a[0] + a[2], m = a[0] - a[2], q = a[1] + a[3], t = quarter<S>(a[1] - a[3]);
    a[0] = p + q;
    a[1] = m + t;
    a[2] = p - q;
    a[3] = m - t;
  } else if constexpr (N % 2) {  // n and N - n together: cosines of their sum, sines of their difference
    Complex<T> sum[N / 2], difference[N / 2];
    for (int n = 1; n <= N / 2; ++n) {
      sum[n - 1] = a[n] + a[N - n];
      difference[n - 1] = quarter<S>(a[n] - a[N - n]);
    }
    const Complex<T> first = a[0];
    for (int n = 0; n < N / 2; ++n) a[0] = a[0] + sum[n];
#pragma GCC unroll 4
    for (int k = 1; k <= N / 2; ++k) {
      Complex<T> even = first, odd = {};
#pragma GCC unroll 4
      for (int n = 1; n <= N / 2; ++n) {
        const T c = static_cast<T>(Roots<N>::cos[n * k % N]), s = static_cast<T>(Roots<N>::sin[n * k % N]);
        even = {even.re + sum[n - 1].re * c, even.im + sum[n - 1].im * c};
        odd = {odd.re + difference[n - 1].re * s, odd.im + difference[n - 1].im * s};
      }
      a[k] = even + odd;
      a[N - k] = even - odd;
    }
  } else {  // 6 and 8 by even and odd elements
    constexpr int H = N / 2;
    constexpr T c1 = static_cast<T>(N == 8 ? .70710678118654752 : .5);
    constexpr T s1 = static_cast<T>(N == 8 ? .70710678118654752 : .86602540378443865);
    Complex<T> even[H], odd[H];
    for (int n = 0; n < H; ++n) {
      even[n] = a[2 * n];
      odd[n] = a[2 * n + 1];
    }
    dft<H, S>(even);
    dft<H, S>(odd);
    odd[1] = turned(odd[1], c1, S * s1);
    if constexpr (N == 8) {
      odd[2] = quarter<S>(odd[2]);
      odd[3] = turned(odd[3], -c1, S * s1);
    } else {
      odd[2] = turned(odd[2], -c1, S * s1);
    }
    for (int n = 0; n < H; ++n) {
      a[n] = even[n] + odd[n];
      a[n + H] = even[n] - odd[n];
    }
  }
}

// Where a transform reads: numbers `pitch` apart, zeros but for first <= n < last.
template <class T>
struct Strided {
  const T* from;
  int64_t pitch;
  int first, last;
  Complex<T> operator()(int n) const {
    return n >= first && n < last ? load_complex(from + n * pitch) : Complex<T>{};
  }
};

// The product with a spectrum of real and imaginary parts, the same for all lanes.
template <class T>
struct Product {
  const T *from, *spectrum;
  Complex<T> operator()(int n) const {
    return turned(load_complex(from + n * int64_t{2} * kLanes<T>), spectrum[2 * n], spectrum[2 * n + 1]);
  }
};

// Where it writes: the first `kept` numbers, `pitch` apart.
template <class T>
struct Kept {
  T* to;
  int64_t pitch;
  int kept;
  void operator()(int k, Complex<T> v) const {
    if (k < kept) store_complex(to + k * pitch, v);
  }
};

// conj(u) x.
template <class T>
struct Correlated {
  const T* x;
  T* to;
  void operator()(int k, Complex<T> u) const {
    const int64_t at = k * int64_t{2} * kLanes<T>;
    const Complex<T> v = load_complex(x + at);
    store_complex(to + at, Complex<T>{u.re * v.re + u.im * v.im, u.re * v.im - u.im * v.re});
  }
};

// Points i * rest + j, i < N, of each of `blocks` neighbours: transformed over i and turned.
template <int N, int S, class T, class In>
void stage(int blocks, int rest, const T* roots, const In& in, T* work) {
  constexpr int kPoint = 2 * kLanes<T>;
  for (int block = 0; block < blocks; ++block) {
    for (int j = 0; j < rest; ++j) {
      const int at = block * N * rest + j;
      Complex<T> a[N];
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) a[i] = in(at + i * rest);
      dft<N, S>(a);
      store_complex(work + at * kPoint, a[0]);
#pragma GCC unroll 8
      for (int i = 1; i < N; ++i) {
        const T* root = roots + 2 * ((i - 1) * rest + j);
        store_complex(work + (at + i * rest) * kPoint, turned(a[i], root[0], S * root[1]));
      }
    }
  }
}

template <int S, class T, class In>
void any_stage(int radix, int blocks, int rest, const T* roots, const In& in, T* work) {
  switch (radix) {
    case 3:
      return stage<3, S>(blocks, rest, roots, in, work);
    case 4:
      return stage<4, S>(blocks, rest, roots, in, work);
    case 5:
      return stage<5, S>(blocks, rest, roots, in, work);
    case 6:
      return stage<6, S>(blocks, rest, roots, in, work);
    default:
      return stage<8, S>(blocks, rest, roots, in, work);
  }
}

// The last stage of all blocks. The first digit of a result's number is that of the first stage.
template <int N, int S, class T, class In, class Out>
void last_stage(const int32_t* radix, int stages, const In& in, const Out& out) {
  const int n1 = stages > 1 ? radix[0] : 1, n2 = stages > 2 ? radix[1] : 1, n3 = stages > 3 ? radix[2] : 1;
  const int pitch = n1 * n2 * n3;
  int at = 0;
  for (int i1 = 0; i1 < n1; ++i1) {
    for (int i2 = 0; i2 < n2; ++i2) {
      for (int i3 = 0; i3 < n3; ++i3, at += N) {
        const int first = i1 + n1 * (i2 + n2 * i3);
        Complex<T> a[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) a[i] = in(at + i);
        dft<N, S>(a);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) out(first + i * pitch, a[i]);
      }
    }
  }
}

template <int S, class T, class In, class Out>
void any_last_stage(const int32_t* radix, int stages, const In& in, const Out& out) {
  switch (radix[stages - 1]) {
    case 3:
      return last_stage<3, S, T>(radix, stages, in, out);
    case 4:
      return last_stage<4, S, T>(radix, stages, in, out);
    case 5:
      return last_stage<5, S, T>(radix, stages, in, out);
    case 6:
      return last_stage<6, S, T>(radix, stages, in, out);
    default:
      return last_stage<8, S, T>(radix, stages, in, out);
  }
}

// out(k, sum_n in(n) exp(S 2 pi i n k / size)), in no particular order of k, after all of `in`.
// `work` has room for the circle; `roots` has those of each stage but the last, see tiles.py.
template <int S, class T, class In, class Out>
void transform(const Circle& circle, const T* roots, T* work, const In& in, const Out& out) {
  int stages = 0;
  while (stages < 4 && circle.radices[stages]) ++stages;
  const int32_t* radix = circle.radices;
  const Strided<T> from_work = {work, 2 * kLanes<T>, 0, circle.size};
  if (stages == 0) {
    out(0, in(0));
  } else if (stages == 1) {
    for (int n = 0; n < circle.size; ++n) store_complex(work + n * 2 * kLanes<T>, in(n));
    any_last_stage<S, T>(radix, stages, from_work, out);
  } else {
    int blocks = 1, rest = circle.size / radix[0];
    any_stage<S>(radix[0], blocks, rest, roots, in, work);
    for (int s = 1; s + 1 < stages; ++s) {
      roots += 2 * (radix[s - 1] - 1) * rest;
      blocks *= radix[s - 1];
      rest /= radix[s];
      any_stage<S>(radix[s], blocks, rest, roots, from_work, work);
    }
    any_last_stage<S, T>(radix, stages, from_work, out);
  }
}

// Transforms over up to three axes of complex vectors. Frequencies are ordered [w][h][d]: the axis that is
// transformed last is contiguous, so that its transform takes each number to where it is used. Leading
// axes that are not there have circles of one point.
template <class T>
class Transforms {
  static constexpr int64_t kPoint = 2 * kLanes<T>;

 public:
  // Numbers of scratch memory.
  static int64_t room(const Circle* circle) {
    return (longest(circle) + rows_room(circle) + planes_room(circle)) * kPoint;
  }
  static int longest(const Circle* circle) {
    int longest = 1;
    for (int axis = 0; axis < 3; ++axis)
      longest = circle[axis].size > longest ? circle[axis].size : longest;
    return longest;
  }

  Transforms(const Circle* circle, const T* roots, T* scratch) : circle_(circle) {
    for (int axis = 0; axis < 3; ++axis) {
      roots_[axis] = roots;
      int rest = circle[axis].size;
      for (int s = 0; s < 3 && circle[axis].radices[s + 1]; ++s) {
        rest /= circle[axis].radices[s];
        roots += 2 * (circle[axis].radices[s] - 1) * rest;
      }
    }
    rows_ = scratch;
    planes_ = rows_ + rows_room(circle) * kPoint;
    work_ = planes_ + planes_room(circle) * kPoint;
  }

  // The transform of row (d, h) along the last axis; columns() does the rest. emit.out(base) takes the
  // frequencies from `base` on, after which emit.finish(base, their number) is called.
  template <class Emit>
  void row(int d, int h, const Strided<T>& in, Emit& emit) {
    if (flat()) {
      transform<-1>(circle_[2], roots_[2], work_, in, emit.out(0, width()));
      emit.finish(0, width());
    } else {
      transform<-1>(circle_[2], roots_[2], work_, in, Kept<T>{row_at(d, h), kPoint, width()});
    }
  }

  // Rows d0 <= d < d1, h0 <= h < h1 have been transformed; the others are zero.
  template <class Emit>
  void columns(int d0, int d1, int h0, int h1, Emit& emit) {
    if (flat()) return;
    if (!deep()) {
      for (int w = 0; w < width(); ++w) {
        const Strided<T> in = {row_at(0, 0) + w * kPoint, row_pitch(), h0, h1};
        const int64_t base = int64_t{1} * w * height();
        transform<-1>(circle_[1], roots_[1], work_, in, emit.out(base, height()));
        emit.finish(base, height());
      }
      return;
    }
    for (int d = d0; d < d1; ++d)
      for (int w = 0; w < width(); ++w) {
        const Strided<T> in = {row_at(d, 0) + w * kPoint, row_pitch(), h0, h1};
        transform<-1>(circle_[1], roots_[1], work_, in, Kept<T>{plane_at(d, w), kPoint, height()});
      }
    for (int w = 0; w < width(); ++w)
      for (int h = 0; h < height(); ++h) {
        const Strided<T> in = {plane_at(0, w) + h * kPoint, plane_pitch(), d0, d1};
        const int64_t base = (int64_t{1} * w * height() + h) * depth();
        transform<-1>(circle_[0], roots_[0], work_, in, emit.out(base, depth()));
        emit.finish(base, depth());
      }
  }

  // The inverse transform of load.at(base)(k), k = 0, 1, ... from frequency `base` on, without the last
  // axis: the first `depth_kept` planes of the first `height_kept` rows. back_row() does the rest.
  template <class Load>
  void back_columns(int depth_kept, int height_kept, const Load& load) {
    if (flat()) return;
    if (!deep()) {
      for (int w = 0; w < width(); ++w) {
        const Kept<T> out = {row_at(0, 0) + w * kPoint, row_pitch(), height_kept};
        transform<1>(circle_[1], roots_[1], work_, load.at(int64_t{1} * w * height(), height()), out);
      }
      return;
    }
    for (int w = 0; w < width(); ++w)
      for (int h = 0; h < height(); ++h) {
        const Kept<T> out = {plane_at(0, w) + h * kPoint, plane_pitch(), depth_kept};
        const int64_t base = (int64_t{1} * w * height() + h) * depth();
        transform<1>(circle_[0], roots_[0], work_, load.at(base, depth()), out);
      }
    for (int d = 0; d < depth_kept; ++d)
      for (int w = 0; w < width(); ++w) {
        const Strided<T> in = {plane_at(d, w), kPoint, 0, height()};
        const Kept<T> out = {row_at(d, 0) + w * kPoint, row_pitch(), height_kept};
        transform<1>(circle_[1], roots_[1], work_, in, out);
      }
  }

  // The first `kept` points of row (d, h), of all of the inverse transform.
  template <class Load>
  void back_row(int d, int h, int kept, const Load& load, T* to) {
    const Kept<T> out = {to, kPoint, kept};
    if (flat()) {
      transform<1>(circle_[2], roots_[2], work_, load.at(0, width()), out);
    } else {
      transform<1>(circle_[2], roots_[2], work_, Strided<T>{row_at(d, h), kPoint, 0, width()}, out);
    }
  }

 private:
  int depth() const { return circle_[0].size; }
  int height() const { return circle_[1].size; }
  int width() const { return circle_[2].size; }
  bool deep() const { return depth() > 1; }
  bool flat() const { return depth() == 1 && height() == 1; }
  // One point more than there are: columns a power of two apart would share a cache set.
  int64_t row_pitch() const { return kPoint * (width() + 1); }
  T* row_at(int d, int h) const { return rows_ + (int64_t{1} * d * height() + h) * row_pitch(); }
  int64_t plane_pitch() const { return kPoint * width() * (height() + 1); }
  T* plane_at(int d, int w) const { return planes_ + d * plane_pitch() + kPoint * w * (height() + 1); }
  static int64_t rows_room(const Circle* c) {
    const bool flat = c[0].size == 1 && c[1].size == 1;
    return flat ? 0 : int64_t{1} * c[0].size * c[1].size * (c[2].size + 1);
  }
  static int64_t planes_room(const Circle* c) {
    return c[0].size == 1 ? 0 : int64_t{1} * c[0].size * c[2].size * (c[1].size + 1);
  }

  const Circle* circle_;
  const T* roots_[3];
  T *rows_, *planes_, *work_;
};

// What Transforms take frequencies from and give them to.
template <class T>
struct Frequencies {  // in memory
  T* points;
  Strided<T> at(int64_t base, int n) const {
    return {points + base * 2 * kLanes<T>, 2 * kLanes<T>, 0, n};
  }
  Kept<T> out(int64_t base, int n) const {
    return {points + base * 2 * kLanes<T>, 2 * kLanes<T>, n};
  }
  void finish(int64_t, int) const {}
};

template <class T>
struct Filtered {  // multiplied by a spectrum
  const T *points, *spectrum;
  Product<T> at(int64_t base, int) const { return {points + base * 2 * kLanes<T>, spectrum + 2 * base}; }
};

// sums[i] += the sum of vector i's lanes, for `count` vectors: kLanes at a time.
template <class T>
void add_lane_sums(const T* vectors, int count, T* sums) {
  constexpr int V = kLanes<T>;
  for (int i = 0; i < count; i += V) {
    const int n = count - i < V ? count - i : V;
    Vec<T> v[V] = {};
    for (int l = 0; l < n; ++l) v[l] = load(vectors + static_cast<int64_t>(i + l) * V);
    add_lanes<T>(v);
    if (n == V) {
      store(sums + i, load(sums + i) + v[0]);
    } else {
      for (int l = 0; l < n; ++l) sums[i + l] += v[0][l];
    }
  }
}

// Sums over the lanes of conj(u) x.
template <class T>
struct Correlations {
  const T* x;
  T *products, *sums;  // room for one column; [frequency][re, im]
  Correlated<T> out(int64_t base, int) const { return {x + base * 2 * kLanes<T>, products}; }
  void finish(int64_t base, int n) const { add_lane_sums(products, 2 * n, sums + 2 * base); }
};

}  // namespace
}  // namespace hyperconv
