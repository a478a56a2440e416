// Rows of activations, and single numbers, from memory to what is computed in and back: the only code that
// knows the dtype.
#pragma once
#include "vec.h"

namespace hyperconv {
namespace {

template <class T>
struct Access {
  T (*number)(const void* from, int64_t at);
  void (*put)(void* to, int64_t at, T value);
  // to[n][width] = channels of positions `step` apart from `at` on, zeros behind them. With `index`, of
  // positions index[n] - index[0] steps from the first.
  void (*read_row)(const void* from, int64_t at, const int* index, int64_t step, int count,
                   int64_t channel_step, int channels, int width, T* to);
  // The other way.
  void (*write_row)(void* to, int64_t at, int64_t step, int count, int64_t channel_step, int channels,
                    int width, const T* from);
};

template <Dtype D>
typename Stored<D>::Compute number(const void* from, int64_t at) {
  return Stored<D>::read_one(static_cast<const typename Stored<D>::Number*>(from) + at);
}

template <Dtype D>
void put(void* to, int64_t at, typename Stored<D>::Compute value) {
  Stored<D>::write_one(static_cast<typename Stored<D>::Number*>(to) + at, value);
}

template <Dtype D>
void read_row(const void* from, int64_t at, const int* index, int64_t step, int count,
              int64_t channel_step, int channels, int width, typename Stored<D>::Compute* to) {
  using T = typename Stored<D>::Compute;
  constexpr int V = kLanes<T>;
  const auto* p = static_cast<const typename Stored<D>::Number*>(from) + at;
  if (channel_step == 1) {
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
  constexpr int V = kLanes<typename Stored<D>::Compute>;
  auto* p = static_cast<typename Stored<D>::Number*>(to) + at;
  if (channel_step == 1) {
    for (int n = 0; n < count; ++n, p += step, from += width) {
      int c = 0;
      for (; c + V <= channels; c += V) Stored<D>::write(p + c, load(from + c));
      if (c < channels) write_part<D>(p + c, load(from + c), channels - c);
    }
    return;
  }
  for (int c = 0; c < channels; ++c)
    for (int n = 0; n < count; ++n)
      put<D>(to, at + c * channel_step + n * step, from[static_cast<int64_t>(n) * width + c]);
}

template <Dtype D>
constexpr Access<typename Stored<D>::Compute> kAccess = {number<D>, put<D>, read_row<D>, write_row<D>};

}  // namespace
}  // namespace hyperconv
