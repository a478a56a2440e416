// Rows of activations, and single numbers, from memory to what is computed in and back: the only code that
// knows the dtype.
#pragma once
#include "vec.h"

namespace hyperconv {
namespace {

template <class T>
struct Access {
  T (*number)(const void* from, int64_t at);
  // to[n][width] = channels of positions `step` apart from `at` on, zeros behind them. With `index`, of
  // positions index[n] - index[0] steps from the first.
  void (*read_row)(const void* from, int64_t at, const int* index, int64_t step, int count,
                   int64_t channel_step, int channels, int width, T* to);
  // The other way.
  void (*write_row)(void* to, int64_t at, int64_t step, int count, int64_t channel_step, int channels,
                    int width, const T* from);
  // As read_row, to planes: channel c of position n goes to to[c * plane + m % stride * pitch + m / stride],
  // m = first + n.
  void (*read_planes)(const void* from, int64_t at, const int* index, int64_t step, int count,
                      int64_t channel_step, int channels, int first, int stride, int64_t pitch,
                      int64_t plane, T* to);
  // The other way, of stride 1 from the first on.
  void (*write_planes)(void* to, int64_t at, int64_t step, int count, int64_t channel_step, int channels,
                       int64_t plane, const T* from);
  // to[rows[i] * pitch + o] = the number o * outer_step + i * inner_step behind the one at `at`.
  void (*gather)(const void* from, int64_t at, int outer, int64_t outer_step, int inner, int64_t inner_step,
                 const int* rows, T* to, int64_t pitch);
  // The other way.
  void (*scatter)(void* to, int64_t at, int outer, int64_t outer_step, int inner, int64_t inner_step,
                  const int* rows, const T* from, int64_t pitch);
};

template <Dtype D>
typename Stored<D>::Compute number(const void* from, int64_t at) {
  return Stored<D>::read_one(static_cast<const typename Stored<D>::Number*>(from) + at);
}

template <Dtype D>
void read_row(const void* from, int64_t at, const int* index, int64_t step, int count,
              int64_t channel_step, int channels, int width, typename Stored<D>::Compute* to) {
  using T = typename Stored<D>::Compute;
  constexpr int V = kLanes<T>;
  const auto* p = static_cast<const typename Stored<D>::Number*>(from) + at;
  if (channel_step == 1) {
    if (channels == width && width == V) {
      for (int n = 0; n < count; ++n, to += V)
        store(to, Stored<D>::read(p + (index ? index[n] - index[0] : n) * step));
      return;
    }
    for (int n = 0; n < count; ++n, to += width) {
      const auto* x = p + (index ? index[n] - index[0] : n) * step;
      int c = 0;
      for (; c + V <= channels; c += V) store(to + c, Stored<D>::read(x + c));
      if (c < channels) store(to + c, read_part<D>(x + c, channels - c));
      for (c += c < channels ? V : 0; c < width; c += V) store(to + c, Vec<T>{});
    }
    return;
  }
  if (channels < width) std::memset(to, 0, static_cast<int64_t>(count) * width * sizeof(T));
  const bool run = step == 1 && (!index || index[count - 1] - index[0] == count - 1);
  for (int n = 0; run && n < count; n += V) {
    const int positions = count - n < V ? count - n : V;
    for (int c = 0; c < channels; c += V) {
      const int lanes = channels - c < V ? channels - c : V;
      Vec<T> v[V] = {};
      for (int l = 0; l < lanes; ++l) {
        const auto* x = p + (c + l) * channel_step + n;
        v[l] = positions == V ? Stored<D>::read(x) : read_part<D>(x, positions);
      }
      transpose<T>(v);
      for (int i = 0; i < positions; ++i) store(to + static_cast<int64_t>(n + i) * width + c, v[i]);
    }
  }
  if (run) return;
  for (int c = 0; c < channels; ++c) {
    const int64_t channel = at + c * channel_step;
    for (int n = 0; n < count; ++n)
      to[static_cast<int64_t>(n) * width + c] =
          number<D>(from, channel + (index ? index[n] - index[0] : n) * step);
  }
}

template <Dtype D>
void write_row(void* to, int64_t at, int64_t step, int count, int64_t channel_step, int channels, int width,
               const typename Stored<D>::Compute* from) {
  using T = typename Stored<D>::Compute;
  constexpr int V = kLanes<T>;
  auto* p = static_cast<typename Stored<D>::Number*>(to) + at;
  if (channel_step == 1) {
    for (int n = 0; n < count; ++n, p += step, from += width) {
      int c = 0;
      for (; c + V <= channels; c += V) Stored<D>::write(p + c, load(from + c));
      if (c < channels) write_part<D>(p + c, load(from + c), channels - c);
    }
    return;
  }
  for (int n = 0; step == 1 && n < count; n += V) {
    const int positions = count - n < V ? count - n : V;
    for (int c = 0; c < channels; c += V) {
      Vec<T> v[V];
      for (int i = 0; i < V; ++i)
        v[i] = i < positions ? load(from + static_cast<int64_t>(n + i) * width + c) : Vec<T>{};
      transpose<T>(v);
      for (int l = 0; l < V && c + l < channels; ++l) {
        auto* y = p + (c + l) * channel_step + n;
        positions == V ? Stored<D>::write(y, v[l]) : write_part<D>(y, v[l], positions);
      }
    }
  }
  if (step == 1) return;
  for (int c = 0; c < channels; ++c)
    for (int n = 0; n < count; ++n)
      Stored<D>::write_one(p + c * channel_step + n * step, from[static_cast<int64_t>(n) * width + c]);
}

template <Dtype D>
void read_planes(const void* from, int64_t at, const int* index, int64_t step, int count,
                 int64_t channel_step, int channels, int first, int stride, int64_t pitch, int64_t plane,
                 typename Stored<D>::Compute* to) {
  using T = typename Stored<D>::Compute;
  constexpr int V = kLanes<T>;
  const auto* p = static_cast<const typename Stored<D>::Number*>(from) + at;
  auto offset = [=](int n) { return (index ? index[n] - index[0] : n) * step; };
  const bool run = step == 1 && (!index || index[count - 1] - index[0] == count - 1);
  if (stride > 1 || !(run || channel_step == 1)) {
    for (int n = 0; n < count; ++n) {
      const int m = first + n;
      T* column = to + m % stride * pitch + m / stride;
      for (int c = 0; c < channels; ++c)
        column[c * plane] = Stored<D>::read_one(p + c * channel_step + offset(n));
    }
    return;
  }
  for (int n = 0; n < count; n += V) {
    const int positions = count - n < V ? count - n : V;
    for (int c = 0; c < channels; c += run ? 1 : V) {
      T* row = to + c * plane + first + n;
      const int lanes = run ? 1 : channels - c < V ? channels - c : V;
      Vec<T> v[V];
      if (run) {
        const auto* x = p + c * channel_step + n;
        v[0] = positions == V ? Stored<D>::read(x) : read_part<D>(x, positions);
      } else {
        for (int i = 0; i < V; ++i) {
          const auto* x = p + offset(n + (i < positions ? i : 0)) + c;
          v[i] = lanes == V ? Stored<D>::read(x) : read_part<D>(x, lanes);
        }
        transpose<T>(v);
      }
      for (int l = 0; l < lanes; ++l) {
        if (positions == V) {
          store(row + l * plane, v[l]);
        } else {
          T numbers[V];
          store(numbers, v[l]);
          copy_part<V / 2>(row + l * plane, numbers, positions);
        }
      }
    }
  }
}

template <Dtype D>
void write_planes(void* to, int64_t at, int64_t step, int count, int64_t channel_step, int channels,
                  int64_t plane, const typename Stored<D>::Compute* from) {
  using T = typename Stored<D>::Compute;
  constexpr int V = kLanes<T>;
  auto* p = static_cast<typename Stored<D>::Number*>(to) + at;
  if (step != 1 && channel_step != 1) {
    for (int n = 0; n < count; ++n)
      for (int c = 0; c < channels; ++c)
        Stored<D>::write_one(p + n * step + c * channel_step, from[c * plane + n]);
    return;
  }
  for (int n = 0; n < count; n += V) {
    const int positions = count - n < V ? count - n : V;
    for (int c = 0; c < channels; c += step == 1 ? 1 : V) {
      const T* row = from + c * plane + n;
      if (step == 1) {
        auto* y = p + c * channel_step + n;
        positions == V ? Stored<D>::write(y, load(row)) : write_part<D>(y, load(row), positions);
        continue;
      }
      const int lanes = channels - c < V ? channels - c : V;
      Vec<T> v[V];
      for (int l = 0; l < V; ++l) v[l] = l < lanes ? load(row + l * plane) : Vec<T>{};
      transpose<T>(v);
      for (int i = 0; i < positions; ++i) {
        auto* y = p + (n + i) * step + c;
        lanes == V ? Stored<D>::write(y, v[i]) : write_part<D>(y, v[i], lanes);
      }
    }
  }
}

template <Dtype D>
void gather(const void* from, int64_t at, int outer, int64_t outer_step, int inner, int64_t inner_step,
            const int* rows, typename Stored<D>::Compute* to, int64_t pitch) {
  constexpr int V = kLanes<typename Stored<D>::Compute>;
  const auto* p = static_cast<const typename Stored<D>::Number*>(from) + at;
  for (int o = 0; o < outer; o += V) {
    for (int i = 0; i < inner; i += V) {
      if (inner_step == 1 && outer - o >= V && inner - i >= V) {
        Vec<typename Stored<D>::Compute> v[V];
        for (int n = 0; n < V; ++n) v[n] = Stored<D>::read(p + (o + n) * outer_step + i);
        transpose<typename Stored<D>::Compute>(v);
        for (int n = 0; n < V; ++n) store(to + rows[i + n] * pitch + o, v[n]);
        continue;
      }
      for (int n = o; n < outer && n < o + V; ++n)
        for (int m = i; m < inner && m < i + V; ++m)
          to[rows[m] * pitch + n] = Stored<D>::read_one(p + n * outer_step + m * inner_step);
    }
  }
}

template <Dtype D>
void scatter(void* to, int64_t at, int outer, int64_t outer_step, int inner, int64_t inner_step,
             const int* rows, const typename Stored<D>::Compute* from, int64_t pitch) {
  constexpr int V = kLanes<typename Stored<D>::Compute>;
  auto* p = static_cast<typename Stored<D>::Number*>(to) + at;
  for (int o = 0; o < outer; o += V) {
    for (int i = 0; i < inner; i += V) {
      if (inner_step == 1 && outer - o >= V && inner - i >= V) {
        Vec<typename Stored<D>::Compute> v[V];
        for (int n = 0; n < V; ++n) v[n] = load(from + rows[i + n] * pitch + o);
        transpose<typename Stored<D>::Compute>(v);
        for (int n = 0; n < V; ++n) Stored<D>::write(p + (o + n) * outer_step + i, v[n]);
        continue;
      }
      for (int n = o; n < outer && n < o + V; ++n)
        for (int m = i; m < inner && m < i + V; ++m)
          Stored<D>::write_one(p + n * outer_step + m * inner_step, from[rows[m] * pitch + n]);
    }
  }
}

template <Dtype D>
constexpr Access<typename Stored<D>::Compute> kAccess = {
    number<D>, read_row<D>, write_row<D>, read_planes<D>, write_planes<D>, gather<D>, scatter<D>};

}  // namespace
}  // namespace hyperconv
