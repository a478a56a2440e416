// The coordinate MLP, vectors across taps: a block of taps goes through all layers while its features
// are in the cache.
#pragma once
#include "engine.h"
#include "functions.h"
#include "threads.h"
#include "vec.h"

namespace hyperconv {
namespace {
namespace mlp {

// In the order of `ACTIVATIONS` in hyperconv_ext/backends/reference.py.
enum Activation : int32_t { kLeakyRelu, kRelu, kGelu, kSilu, kTanh, kSine };

// A block's features should stay below this, and it has no more vectors of taps.
constexpr int64_t kBlockBytes = 128 * 1024, kBlockVectors = 16;
// Sums over all taps are sums of so many sums at most.
constexpr int64_t kTapSlices = 16;
// Work, in vector operations, for which it pays to wake other threads.
constexpr int64_t kWorthThreads = 50000, kActivationWork = 40;

// What is activated and the derivative of the activation there.
template <class T>
struct Activated {
  Vec<T> value, slope;
};

// Of an activation that is right everywhere.
struct Anywhere {
  template <class T>
  bool misses(const T*, int64_t, T) const {
    return false;
  }
  template <class V, class A>
  void mend(V, A&) const {}
};

template <class T>
struct LeakyReluOf : Anywhere {
  T slope;
  Activated<T> operator()(Vec<T> h) const {
    return {h > 0 ? h : slope * h, h > 0 ? broadcast(T(1)) : broadcast(slope)};
  }
};

// NaN is not below 0.
template <class T>
struct ReluOf : Anywhere {
  Activated<T> operator()(Vec<T> h) const {
    return {h <= 0 ? Vec<T>{} : h, h <= 0 ? Vec<T>{} : broadcast(T(1))};
  }
};

template <class T>
struct GeluOf : Anywhere {
  Activated<T> operator()(Vec<T> h) const {
    const Vec<T> bell = exp<T>(T(-0.5) * h * h), below = normal<T>(h, bell);
    return {h * below, below + h * (T(0.39894228040143268) * bell)};  // 1 / sqrt(2 pi)
  }
};

template <class T>
struct SiluOf : Anywhere {
  Activated<T> operator()(Vec<T> h) const {
    const Vec<T> divisor = 1 + exp<T>(-h), s = 1 / divisor;
    return {h / divisor, s * (1 + h * (1 - s))};
  }
};

template <class T>
struct TanhOf : Anywhere {
  Activated<T> operator()(Vec<T> h) const {
    const Vec<T> t = tanh<T>(h);
    return {t, 1 - t * t};
  }
};

inline float library_sine(float h) { return __builtin_sinf(h); }
inline double library_sine(double h) { return __builtin_sin(h); }
inline float library_cosine(float h) { return __builtin_cosf(h); }
inline double library_cosine(double h) { return __builtin_cos(h); }

template <class T>
struct SineOf {
  Activated<T> operator()(Vec<T> h) const {
    const SineAndCosine<T> s = sine_and_cosine<T>(h);
    return {s.sine, s.cosine};
  }
  // Whether any gain * h [count] is beyond what the vectors' sine takes.
  bool misses(const T* h, int64_t count, T gain) const {
    Words<T> within = ~Words<T>{};
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      within &= (Words<T>)(magnitude<T>(gain * load(h + i)) <= kSineMost);
    }
    for (int l = 0; l < kLanes<T>; ++l) {
      if (!within[l]) return true;
    }
    return false;
  }
  // Those lanes by the C library.
  void mend(Vec<T> h, Activated<T>& a) const {
    for (int l = 0; l < kLanes<T>; ++l) {
      const T x = h[l];
      if (x >= -kSineMost && x <= kSineMost) continue;
      a.value[l] = library_sine(x);
      a.slope[l] = library_cosine(x);
    }
  }
};

// h [count] becomes act(gain * h), and `slopes`, if not null, the derivative of that by h.
template <bool kSlopes, class T, class Act>
void activate_with(const Act& act, T gain, int64_t count, T* h, T* slopes) {
  const bool misses = act.misses(h, count, gain);
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> scaled = gain * load(h + i);
    Activated<T> a = act(scaled);
    if (misses) act.mend(scaled, a);
    store(h + i, a.value);
    if (kSlopes) store<T>(slopes + i, gain * a.slope);
  }
}

template <bool kSlopes, class T>
void activate(const Mlp& p, int64_t count, T* h, T* slopes) {
  const T gain = static_cast<T>(p.gain);
  switch (p.activation) {
    case kLeakyRelu:
      return activate_with<kSlopes>(LeakyReluOf<T>{{}, static_cast<T>(p.slope)}, gain, count, h, slopes);
    case kRelu:
      return activate_with<kSlopes>(ReluOf<T>{}, gain, count, h, slopes);
    case kGelu:
      return activate_with<kSlopes>(GeluOf<T>{}, gain, count, h, slopes);
    case kSilu:
      return activate_with<kSlopes>(SiluOf<T>{}, gain, count, h, slopes);
    case kTanh:
      return activate_with<kSlopes>(TanhOf<T>{}, gain, count, h, slopes);
    default:
      return activate_with<kSlopes>(SineOf<T>{}, gain, count, h, slopes);
  }
}

// A matrix of any strides.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns, row, column;
};

// Rows [first, first + kRows) of y = m x + bias, or of y *= m x; x [columns, size], y [rows, size].
template <int kRows, bool kScale, class T>
void multiply_rows(const Matrix<T>& m, const T* bias, const T* x, int64_t size, T* y, int64_t first) {
  const T* data = m.data + first * m.row;
  for (int64_t tap = 0; tap < size; tap += kLanes<T>) {
    Vec<T> sums[kRows];
    for (int r = 0; r < kRows; ++r) sums[r] = Vec<T>{};
    for (int64_t c = 0; c < m.columns; ++c) {
      const Vec<T> column = load(x + c * size + tap);
      for (int r = 0; r < kRows; ++r) sums[r] += data[r * m.row + c * m.column] * column;
    }
    for (int r = 0; r < kRows; ++r) {
      T* to = y + (first + r) * size + tap;
      store<T>(to, kScale ? sums[r] * load(to) : sums[r] + bias[first + r]);
    }
  }
}

template <bool kScale, class T>
void multiply(const Matrix<T>& m, const T* bias, const T* x, int64_t size, T* y) {
  int64_t row = 0;
  for (; row + 8 <= m.rows; row += 8) multiply_rows<8, kScale>(m, bias, x, size, y, row);
  for (; row + 4 <= m.rows; row += 4) multiply_rows<4, kScale>(m, bias, x, size, y, row);
  for (; row < m.rows; ++row) multiply_rows<1, kScale>(m, bias, x, size, y, row);
}

// kCount lanes.
template <class T, int kCount>
struct Part {
  typedef T type __attribute__((vector_size(kCount * sizeof(T)), aligned(sizeof(T)), may_alias));
};

template <class T, int kCount = kLanes<T>>
inline T sum_of(typename Part<T, kCount>::type v) {
  if constexpr (kCount == 2) {
    return v[0] + v[1];
  } else {
    const auto* halves = reinterpret_cast<const typename Part<T, kCount / 2>::type*>(&v);
    return sum_of<T, kCount / 2>(halves[0] + halves[1]);
  }
}

// sums [rows, columns] += x y^T in a tile whose first row and column are r and c; x [rows, size],
// y [columns, size].
template <int kRows, int kColumns, class T>
void add_outer(const T* x, const T* y, int64_t size, T* sums, int64_t columns, int64_t r, int64_t c) {
  Vec<T> tile[kRows][kColumns] = {};
  for (int64_t tap = 0; tap < size; tap += kLanes<T>) {
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> factor = load(x + (r + i) * size + tap);
      for (int j = 0; j < kColumns; ++j) tile[i][j] += factor * load(y + (c + j) * size + tap);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) sums[(r + i) * columns + c + j] += sum_of<T>(tile[i][j]);
  }
}

template <int kRows, class T>
void add_outer_rows(const T* x, const T* y, int64_t size, T* sums, int64_t columns, int64_t r) {
  int64_t c = 0;
  for (; c + 2 <= columns; c += 2) add_outer<kRows, 2>(x, y, size, sums, columns, r, c);
  if (c < columns) add_outer<kRows, 1>(x, y, size, sums, columns, r, c);
}

// weight [rows, columns] += x y^T, bias [rows] += the sums of x's rows.
template <class T>
void add_gradients(const T* x, int64_t rows, const T* y, int64_t columns, int64_t size, T* weight,
                   T* bias) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) add_outer_rows<4>(x, y, size, weight, columns, r);
  for (; r < rows; ++r) add_outer_rows<1>(x, y, size, weight, columns, r);
  for (r = 0; r < rows; ++r) {
    Vec<T> sum = {};
    for (int64_t tap = 0; tap < size; tap += kLanes<T>) sum += load(x + r * size + tap);
    bias[r] += sum_of<T>(sum);
  }
}

// Blocks of taps, as many numbers as `rows` of which make up a block's memory.
template <class T>
struct Blocks {
  int64_t vectors;  // of all taps
  int64_t block;    // vectors of a block, at most
  Blocks(const Mlp& p, int64_t rows) : vectors((p.taps + kLanes<T> - 1) / kLanes<T>) {
    block = kBlockBytes / (rows * kBytes + 1);
    block = block < 1 ? 1 : block > kBlockVectors ? kBlockVectors : block;
  }
};

// Taps [first, first + taps) of a block, whose rows have `size` numbers, a multiple of the vectors'.
struct Span {
  int64_t first, taps, size;
  template <class T>
  static Span of(const Mlp& p, int64_t vector, int64_t vectors) {
    const int64_t first = vector * kLanes<T>, size = vectors * kLanes<T>;
    return {first, first + size < p.taps ? size : p.taps - first, size};
  }
};

// The columns of [rows, size] that belong to no tap become 0.
template <class T>
void clear_padding(const Span& s, T* data, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = s.taps; k < s.size; ++k) data[r * s.size + k] = 0;
  }
}

// Columns [column, column + count) of the coordinates, one of which is the window's.
template <class T>
void read_coordinates(const Mlp& p, const Span& s, int64_t column, int64_t count, T* rows) {
  const int64_t columns = p.widths[0] + p.windowed;
  const T* from = static_cast<const T*>(p.coordinates) + s.first * columns + column;
  for (int64_t d = 0; d < count; ++d) {
    for (int64_t k = 0; k < s.taps; ++k) rows[d * s.size + k] = from[k * columns + d];
  }
  clear_padding(s, rows, count);
}

// Each of `count` rows times the window, if there is one.
template <class T>
void apply_window(const Mlp& p, int64_t size, const T* window, T* rows, int64_t count) {
  for (int64_t r = 0; p.windowed && r < count; ++r) {
    for (int64_t k = 0; k < size; k += kLanes<T>) {
      T* to = rows + r * size + k;
      store<T>(to, load(window + k) * load(to));
    }
  }
}

template <class T>
Matrix<T> weight_of(const Mlp& p, int layer) {
  const int64_t rows = p.widths[layer + 1], columns = p.widths[layer];
  return {static_cast<const T*>(p.weight[layer]), rows, columns, columns, 1};
}

bool is_linear(const Mlp& p, int layer) { return p.linear_output && layer == p.layers - 1; }

// The features of `layer`, and the derivatives of activated ones by W h + b.
template <bool kSlopes, class T>
void evaluate(const Mlp& p, int layer, int64_t size, const T* inputs, T* outputs, T* slopes) {
  const Matrix<T> weight = weight_of<T>(p, layer);
  multiply<false>(weight, static_cast<const T*>(p.bias[layer]), inputs, size, outputs);
  if (!is_linear(p, layer)) activate<kSlopes>(p, weight.rows * size, outputs, slopes);
}

bool is_known(const Mlp& p) {
  return p.layers > 0 && p.layers <= kMaxLayers && p.activation >= kLeakyRelu && p.activation <= kSine;
}

int threads_for(const Mlp& p, int64_t vectors, int64_t products) {
  int64_t work = 0;
  for (int n = 0; n < p.layers; ++n) {
    work += p.widths[n + 1] * (products * p.widths[n] + (is_linear(p, n) ? 0 : kActivationWork));
  }
  return vectors * work < kWorthThreads ? 1 : p.threads;
}

template <class T>
Status forward(const Mlp& p, ParallelFor parallel_for) {
  int64_t width = 1;
  for (int n = 0; n <= p.layers; ++n) width = p.widths[n] > width ? p.widths[n] : width;
  const Blocks<T> blocks(p, 2 * width + 1);
  int32_t status = kDone;
  auto worker = [&](auto& next) {
    const int64_t rows = width * blocks.block * kLanes<T>;
    Room<T> room(2 * rows + blocks.block * kLanes<T>);
    if (room.failed()) return __atomic_store_n(&status, kNoMemory, __ATOMIC_RELAXED);
    for (int64_t task; (task = next()) >= 0;) {
      const int64_t vector = task * blocks.block, left = blocks.vectors - vector;
      const Span s = Span::of<T>(p, vector, left < blocks.block ? left : blocks.block);
      T *inputs = room.get(), *outputs = inputs + rows, *window = outputs + rows;
      read_coordinates(p, s, 0, p.widths[0], inputs);
      read_coordinates(p, s, p.widths[0], p.windowed, window);
      for (int n = 0; n < p.layers; ++n) {
        if (n == p.layers - 1) apply_window(p, s.size, window, inputs, p.widths[n]);
        evaluate<false, T>(p, n, s.size, inputs, outputs, nullptr);
        T* swapped = inputs;
        inputs = outputs;
        outputs = swapped;
      }
      T* basis = static_cast<T*>(p.basis) + s.first;
      for (int64_t r = 0; r < p.widths[p.layers]; ++r, basis += p.taps) {
        for (int64_t k = 0; k < s.taps; ++k) basis[k] = inputs[r * s.size + k];
      }
      for (int64_t k = 0; p.constant && k < s.taps; ++k) basis[k] = 1;
    }
  };
  const int64_t tasks = (blocks.vectors + blocks.block - 1) / blocks.block;
  run_tasks(tasks, threads_for(p, blocks.vectors, 1), parallel_for, worker);
  return static_cast<Status>(status);
}

// Where a block keeps the inputs of every layer, and the derivatives by its W h + b of first its
// outputs, then the result: rows of the block's memory. And where each layer's gradients are in a sum.
struct Layout {
  int64_t inputs[kMaxLayers], deltas[kMaxLayers], window = 0, rows = 1;
  int64_t weights[kMaxLayers], biases[kMaxLayers], gradients = 0;
  explicit Layout(const Mlp& p) {
    for (int n = 0; n < p.layers; ++n) {
      const int64_t columns = p.widths[n], features = p.widths[n + 1];
      inputs[n] = rows;
      deltas[n] = rows + columns;
      rows += columns + features;
      weights[n] = gradients;
      biases[n] = gradients + columns * features;
      gradients += (columns + 1) * features;
    }
  }
};

// sums [layout.gradients] += those of the taps of a block, whose memory is `block`.
template <class T>
void add_block(const Mlp& p, const Layout& layout, const Span& s, T* block, T* sums) {
  const int last = p.layers - 1;
  auto row = [&](int64_t index) { return block + index * s.size; };
  T* window = row(layout.window);
  read_coordinates(p, s, 0, p.widths[0], row(layout.inputs[0]));
  read_coordinates(p, s, p.widths[0], p.windowed, window);
  if (last == 0) apply_window(p, s.size, window, row(layout.inputs[0]), p.widths[0]);
  for (int n = 0; n < last; ++n) {
    T *outputs = row(layout.inputs[n + 1]), *slopes = row(layout.deltas[n]);
    evaluate<true>(p, n, s.size, row(layout.inputs[n]), outputs, slopes);
    if (n + 1 == last) {
      apply_window(p, s.size, window, outputs, p.widths[last]);
      apply_window(p, s.size, window, slopes, p.widths[last]);
    }
    clear_padding(s, outputs, p.widths[n + 1]);
  }
  T* delta = row(layout.deltas[last]);
  const T* gradient = static_cast<const T*>(p.gradient) + s.first;
  if (!is_linear(p, last)) {
    evaluate<true>(p, last, s.size, row(layout.inputs[last]), row(layout.rows), delta);
  }
  for (int64_t r = 0; r < p.widths[p.layers]; ++r) {
    T* to = delta + r * s.size;
    const T* from = gradient + r * p.taps;
    for (int64_t k = 0; k < s.taps; ++k) to[k] = is_linear(p, last) ? from[k] : to[k] * from[k];
  }
  for (int n = last;; --n) {
    const Matrix<T> weight = weight_of<T>(p, n);
    delta = row(layout.deltas[n]);
    clear_padding(s, delta, weight.rows);
    add_gradients(delta, weight.rows, row(layout.inputs[n]), weight.columns, s.size,
                  sums + layout.weights[n], sums + layout.biases[n]);
    if (n == 0) return;
    const Matrix<T> transposed = {weight.data, weight.columns, weight.rows, weight.column, weight.row};
    multiply<true, T>(transposed, nullptr, delta, s.size, row(layout.deltas[n - 1]));
  }
}

template <class T>
Status backward(const Mlp& p, ParallelFor parallel_for) {
  const Layout layout(p);
  const int64_t rows = layout.rows + p.widths[p.layers];  // the last outputs
  const Blocks<T> blocks(p, rows);
  int64_t slices = (blocks.vectors + kBlockVectors - 1) / kBlockVectors;
  slices = slices < 1 ? 1 : slices > kTapSlices ? kTapSlices : slices;
  Room<T> sums(slices * layout.gradients);
  if (sums.failed()) return kNoMemory;
  int32_t status = kDone;
  auto worker = [&](auto& next) {
    Room<T> room(rows * blocks.block * kLanes<T>);
    if (room.failed()) return __atomic_store_n(&status, kNoMemory, __ATOMIC_RELAXED);
    for (int64_t slice; (slice = next()) >= 0;) {
      T* sum = sums.get() + slice * layout.gradients;
      for (int64_t i = 0; i < layout.gradients; ++i) sum[i] = 0;
      const int64_t end = (slice + 1) * blocks.vectors / slices;
      for (int64_t vector = slice * blocks.vectors / slices; vector < end; vector += blocks.block) {
        const int64_t left = end - vector;
        const Span s = Span::of<T>(p, vector, left < blocks.block ? left : blocks.block);
        add_block(p, layout, s, room.get(), sum);
      }
    }
  };
  run_tasks(slices, threads_for(p, blocks.vectors, 3), parallel_for, worker);
  if (status != kDone) return static_cast<Status>(status);
  auto total = [&](int64_t first, int64_t count, void* result) {
    T* to = static_cast<T*>(result);
    for (int64_t i = 0; i < count; ++i) to[i] = sums.get()[first + i];
    for (int64_t slice = 1; slice < slices; ++slice) {
      const T* from = sums.get() + slice * layout.gradients + first;
      for (int64_t i = 0; i < count; ++i) to[i] += from[i];
    }
  };
  for (int n = 0; n < p.layers; ++n) {
    total(layout.weights[n], layout.biases[n] - layout.weights[n], p.weight_gradient[n]);
    total(layout.biases[n], p.widths[n + 1], p.bias_gradient[n]);
  }
  return kDone;
}

}  // namespace mlp

Status mlp_forward(const Mlp& p, ParallelFor parallel_for) {
  if (!mlp::is_known(p)) return kUnknown;
  return p.dtype == kDouble ? mlp::forward<double>(p, parallel_for)
                            : mlp::forward<float>(p, parallel_for);
}

Status mlp_backward(const Mlp& p, ParallelFor parallel_for) {
  if (!mlp::is_known(p)) return kUnknown;
  return p.dtype == kDouble ? mlp::backward<double>(p, parallel_for)
                            : mlp::backward<float>(p, parallel_for);
}

}  // namespace
}  // namespace hyperconv
