// Tiles whose lanes are channels: block after block of source channels, z by taps or by FFT, and at once
// what is made of it.
#pragma once
#include "convolve.h"
#include "taps.h"

namespace hyperconv {
namespace {

template <class T>
class Convolver<T>::Place {
 public:
  Place(const Convolver& owner, int wanted) : o_(owner), c_(owner.c_), wanted_(wanted) {}
  Place(const Place&) = delete;
  Place& operator=(const Place&) = delete;

  // Zero the sums of a slice's blocks.
  void clear(int64_t slice, int64_t from, int64_t to) {
    const int64_t block = o_.packed_size_ / (o_.groups_ * o_.blocks_);
    for (int64_t g = 0; o_.coefficient_sums_ && g < o_.groups_; ++g)
      std::memset(o_.coefficient_sums_ + slice * o_.packed_size_ + (g * o_.blocks_ + from) * block, 0,
                  (to - from) * block * sizeof(T));
    const int64_t first = o_.part_of(from), parts = o_.part_of(to - 1) - first + 1;
    if (o_.basis_sums_)
      std::memset(o_.basis_sums(slice, first), 0, parts * o_.gradient_size_ * sizeof(T));
  }

 protected:
  // Room for the inputs at the positions of a patch, `lengths` along the axes.
  void take_indices(const int64_t* lengths) {
    indices_.take(lengths[0] + lengths[1] + lengths[2]);
    int* index = indices_.get();
    for (int a = 0; a < 3; ++a) {
      span_[a].input = index;
      index += lengths[a];
    }
  }

  // Go to tile number `task`; false if there is no such tile. Its patch is that of positions rounded up to
  // a multiple of `rounded` along the last axis, or fills the circles.
  bool find(int64_t task, int64_t slice, int rounded, bool by_fft) {
    int tile[3], phase[3];
    for (int a = 2; a >= 0; --a) {
      tile[a] = static_cast<int>(task % c_.axis[a].tiles);
      task /= c_.axis[a].tiles;
    }
    batch_index_ = task % c_.batch;
    task /= c_.batch;
    for (int a = 2; a >= 0; --a) {
      phase[a] = static_cast<int>(task % c_.axis[a].phases);
      task /= c_.axis[a].phases;
      phases_[a] = phase_of(c_.axis[a], phase[a]);
      if (tile[a] * c_.axis[a].tile >= phases_[a].count) return false;  // of other phases
    }
    group_ = task;
    band_ = o_.band_of(phases_);
    slice_ = slice;
    for (int a = 0; a < 3; ++a) {
      set_span(span_[a], c_.axis[a], phases_[a], phase[a], tile[a],
               a == 2 ? rounded : 1, by_fft ? c_.circle[a].size : 0);
    }
    positions_ = int64_t{1} * span_[0].count * span_[1].count * span_[2].count;
    return true;
  }

  // f(row of the tile, where it begins in an activation).
  template <class F>
  void each_row(const Strides& s, const F& f) const {
    int64_t row = 0;
    for (int d = 0; d < span_[0].count; ++d)
      for (int h = 0; h < span_[1].count; ++h, ++row) {
        f(row, batch_index_ * s.batch + (span_[0].start + int64_t{1} * d * span_[0].pitch) * s.axis[0] +
                   (span_[1].start + int64_t{1} * h * span_[1].pitch) * s.axis[1] +
                   span_[2].start * s.axis[2] + o_.target_channel(group_) * s.channel);
      }
  }

  const Convolver& o_;
  const Convolution& c_;
  const int wanted_;
  Room<int> indices_;
  Span span_[3];
  Phase phases_[3];
  int64_t group_, batch_index_, band_, slice_, positions_;
};

template <class T>
class Convolver<T>::Worker : public Convolver<T>::Place {
  using Place::o_;
  using Place::c_;
  using Place::wanted_;
  using Place::span_;
  using Place::phases_;
  using Place::group_;
  using Place::batch_index_;
  using Place::band_;
  using Place::slice_;
  using Place::positions_;

 public:
  Worker(const Convolver& owner, int wanted) : Place(owner, wanted) {
    int64_t patch = 1, positions = 1, lengths[3];
    for (int a = 0; a < 3; ++a) {
      const Axis& axis = c_.axis[a];
      const int64_t rounded = a == 2 && !o_.by_fft_ ? ceil_div(axis.tile, kStep) * kStep : axis.tile;
      const int64_t length =
          o_.by_fft_ ? c_.circle[a].size : (rounded - 1) * axis.stride + axis.taps;
      patch *= length;
      lengths[a] = length;
      positions *= axis.tile;
    }
    const int64_t lanes = o_.lanes_, wide = lanes * c_.rank, width = o_.width_;
    batch_ = static_cast<int>(ceil_div(96, c_.axis[2].tile));
    const int64_t line = o_.by_fft_ ? lanes * c_.circle[2].size : 0;
    const int64_t z = o_.by_fft_ ? batch_ * c_.axis[2].tile * lanes : positions * wide;
    const int64_t fft = o_.by_fft_ ? Transforms<T>::room(c_.circle) : 0;
    const int64_t product = o_.by_fft_ && (wanted_ & kBasis) ? lanes * Transforms<T>::longest(c_.circle) : 0;
    const int64_t output = wanted_ & kOutput ? positions * width : 0;
    const int64_t target = wanted_ & (kCoefficients | kBasis) ? positions * width : 0;
    const int64_t formed = o_.by_fft_ ? batch_ * c_.axis[2].tile : positions;
    const int64_t pairs = o_.pairs_ ? ceil_div(formed, 2) * (o_.by_fft_ ? lanes : wide) : 0;
    const int64_t target_pairs = o_.pairs_ && target ? ceil_div(formed, 2) * width : 0;
    room_.take(patch * lanes + line + z + fft + product + output + target, 7);
    pairs_room_.take(pairs + target_pairs, 2);
    this->take_indices(lengths);
    if (failed()) return;
    patch_ = room_.part(patch * lanes);
    line_ = room_.part(line);
    z_ = room_.part(z);
    fft_ = room_.part(fft);
    product_ = room_.part(product);
    output_ = room_.part(output);
    target_ = room_.part(target);
    z_pairs_ = pairs_room_.part(pairs);
    target_pairs_ = pairs_room_.part(target_pairs);
  }
  bool failed() const { return room_.failed() || pairs_room_.failed() || this->indices_.failed(); }

  // Tile number `task` for some blocks of source channels and columns of the output.
  void tile(int64_t task, int64_t from_block, int64_t to_block, int64_t from_column, int64_t to_column,
            int64_t slice) {
    if (!this->find(task, slice, o_.by_fft_ ? 1 : kStep, o_.by_fft_)) return;
    if (wanted_ & kOutput) start_output();
    if (Convolver::meets(phases_)) {
      if (wanted_ & (kCoefficients | kBasis)) read_target();
      for (int64_t block = from_block; block < to_block; ++block) {
        if (o_.by_fft_) {
          block_by_fft(block, from_column, to_column);
        } else {
          block_by_taps(block, from_column, to_column);
        }
      }
    }
    if (wanted_ & kOutput) write_output(from_column, to_column);
  }

 private:
  // Row (d, h) of the patch, [w][lane], zeros where there is no input.
  void gather_row(int64_t block, int d, int h, T* to) const {
    const int lanes = o_.lanes_of(group_, block), all = o_.lanes_, length = span_[2].length;
    const Strides& s = c_.source_strides;
    const int qd = span_[0].input[d], qh = span_[1].input[h];
    const bool inside = qd >= 0 && qh >= 0;
    const int first = inside ? span_[2].first : length, last = inside ? span_[2].last : length;
    std::memset(to, 0, int64_t{1} * first * all * sizeof(T));
    std::memset(to + int64_t{1} * last * all, 0, int64_t{1} * (length - last) * all * sizeof(T));
    if (first == last) return;
    const int64_t at = batch_index_ * s.batch + qd * s.axis[0] + qh * s.axis[1] +
                       span_[2].input[first] * s.axis[2] + o_.source_channel(group_, block) * s.channel;
    o_.access_.read_row(c_.source, at, span_[2].input + first, s.axis[2], last - first, s.channel, lanes,
                        all, to + int64_t{1} * first * all);
  }

  void start_output() {
    const int64_t width = o_.width_;
    std::memset(output_, 0, positions_ * width * sizeof(T));
    if (!o_.bias_) return;
    const int channels = o_.target_channels(group_);
    const T* bias = o_.bias_ + o_.target_channel(group_);
    for (int64_t p = 0; p < positions_; ++p) std::memcpy(output_ + p * width, bias, channels * sizeof(T));
  }

  void read_target() {
    const Strides& s = c_.target_strides;
    const int count = span_[2].count;
    this->each_row(s, [&](int64_t row, int64_t at) {
      o_.access_.read_row(c_.target, at, nullptr, span_[2].pitch * s.axis[2], count, s.channel,
                          o_.target_channels(group_), static_cast<int>(o_.width_),
                          target_ + row * count * o_.width_);
    });
  }

  void write_output(int64_t from_column, int64_t to_column) const {
    const Strides& s = c_.output_strides;
    const int count = span_[2].count;
    const int64_t from = from_column * V;
    const int channels = static_cast<int>(at_most(o_.target_channels(group_), to_column * V) - from);
    if (channels <= 0) return;
    this->each_row(s, [&](int64_t row, int64_t at) {
      o_.access_.write_row(c_.output, at + from * s.channel, span_[2].pitch * s.axis[2], count, s.channel,
                           channels, static_cast<int>(o_.width_),
                           output_ + row * count * o_.width_ + from);
    });
  }

  // What is made of z, [positions][functions][lanes], of some positions and functions: `first` the
  // position, r the function.
  void use_responses(int64_t block, int64_t first, int64_t count, int r, int functions, const T* z,
                     int64_t from_column, int64_t to_column) {
    const int64_t task = group_ * o_.blocks_ + block, width = o_.width_, lanes = o_.lanes_;
    const int64_t pitch = functions * lanes;
    T* y = output_ + first * width;
    const T* t = target_ + first * width;
    if (o_.lanewise_) {
      for (int f = 0; f < functions; ++f) {
        for (int64_t v = 0; v < lanes; v += V) {
          const int64_t at = (r + f) * lanes + v;
          if (wanted_ & kOutput) {
            const Vec<T> a = load(o_.packed_block(o_.packed_, task) + at);
            for (int64_t p = 0; p < count; ++p) {
              T* to = y + p * width + v;
              store(to, load(to) + a * load(z + p * pitch + f * lanes + v));
            }
          }
          if (wanted_ & kCoefficients) {
            T* to = o_.packed_block(o_.coefficient_sums_ + slice_ * o_.packed_size_, task) + at;
            Vec<T> sum = load(to);
            for (int64_t p = 0; p < count; ++p)
              sum += load(t + p * width + v) * load(z + p * pitch + f * lanes + v);
            store(to, sum);
          }
        }
      }
      return;
    }
    const int64_t rows = r * lanes;
    const int columns = static_cast<int>(to_column - from_column);
    T* sums = nullptr;
    if (wanted_ & kCoefficients)
      sums = o_.packed_block(o_.coefficient_sums_ + slice_ * o_.packed_size_, task) + rows * width;
    y += from_column * V;
    if constexpr (Pairs<T>::kThere) {
      if (o_.pairs_) {
        if (wanted_ & kOutput) {
          const uint32_t* a = o_.paired_block(o_.paired_, task, width) + rows / 2 * width;
          Pairs<T>::join(z, count * pitch, z_pairs_);
          product<Pairs<T>>(count, columns, pitch / 2, z_pairs_, pitch / 2, 1, a + from_column * V, width,
                            y, width);
        }
        if (wanted_ & kCoefficients) {
          Pairs<T>::join_rows(z, count, pitch, z_pairs_);
          Pairs<T>::join_rows(t, count, width, target_pairs_);
          product<Pairs<T>>(pitch, o_.columns_, ceil_div(count, 2), z_pairs_, 1, pitch, target_pairs_, width,
                            sums, width);
        }
        return;
      }
    }
    if (wanted_ & kOutput) {
      const T* a = o_.packed_block(o_.packed_, task) + rows * width + from_column * V;
      product<Singles<T>>(count, columns, pitch, z, pitch, 1, a, width, y, width);
    }
    if (wanted_ & kCoefficients)
      product<Singles<T>>(pitch, o_.columns_, count, z, 1, pitch, t, width, sums, width);
  }

  // u, [positions][functions][lanes]: the gradient of z by the target.
  void make_gradient(int64_t block, int64_t first, int64_t count, int r, int functions, T* u) {
    const int64_t task = group_ * o_.blocks_ + block, width = o_.width_, lanes = o_.lanes_;
    const int64_t pitch = functions * lanes;
    const T* t = target_ + first * width;
    if (o_.lanewise_) {
      const T* a = o_.packed_block(o_.packed_, task) + r * lanes;
      for (int64_t p = 0; p < count; ++p)
        for (int64_t n = 0; n < pitch; n += V)
          store(u + p * pitch + n, load(a + n) * load(t + p * width + n % lanes));
      return;
    }
    const int64_t channels = c_.target_channels, vectors = pitch / V;
    std::memset(u, 0, count * pitch * sizeof(T));
    if constexpr (Pairs<T>::kThere) {
      if (o_.pairs_) {
        const int64_t couples = ceil_div(channels, 2);
        const uint32_t* a = o_.paired_block(o_.paired_mixer_, task, 2 * couples);
        Pairs<T>::join(t, count * width, target_pairs_);
        product<Pairs<T>>(count, static_cast<int>(vectors), couples, target_pairs_, width / 2, 1,
                          a + (o_.by_fft_ ? r * couples * lanes : 0), pitch, u, pitch);
        return;
      }
    }
    const T* a = o_.mixer_ + task * channels * c_.rank * lanes + (o_.by_fft_ ? r * channels * lanes : 0);
    product<Singles<T>>(count, static_cast<int>(vectors), channels, t, width, 1, a, pitch, u, pitch);
  }

  void block_by_taps(int64_t block, int64_t from_column, int64_t to_column) {
    Patch s;
    for (int a = 0; a < 3; ++a) {
      s.positions[a] = span_[a].count;
      s.stride[a] = c_.axis[a].stride;
      s.length[a] = span_[a].length;
      s.taps[a] = phases_[a].end - phases_[a].begin;
    }
    const int64_t row = int64_t{1} * s.length[2] * V;
    for (int d = 0; d < s.length[0]; ++d)
      for (int h = 0; h < s.length[1]; ++h)
        gather_row(block, d, h, patch_ + (int64_t{1} * d * s.length[1] + h) * row);
    if (wanted_ & (kOutput | kCoefficients)) {
      int64_t pitch[2];
      pitch[1] = int64_t{1} * c_.axis[2].taps * c_.rank;
      pitch[0] = c_.axis[1].taps * pitch[1];
      const T* phi = o_.band_tables_ + band_ * o_.band_size_ + phases_[0].begin * pitch[0] +
                     phases_[1].begin * pitch[1] + int64_t{1} * phases_[2].begin * c_.rank;
      by_functions(c_.rank, Responses<T>{s, patch_, phi, pitch, c_.rank, z_});
      use_responses(block, 0, positions_, 0, c_.rank, z_, from_column, to_column);
    }
    if (wanted_ & kBasis) {
      make_gradient(block, 0, positions_, 0, c_.rank, z_);
      int64_t pitch[3] = {0, 0, int64_t{1} * c_.rank * V};
      pitch[1] = c_.axis[2].kernel * pitch[2];
      pitch[0] = c_.axis[1].kernel * pitch[1];
      for (int a = 0; a < 3; ++a) pitch[a] *= c_.axis[a].tap_step;
      const int64_t first =
          o_.tap(phases_, phases_[0].begin, phases_[1].begin, phases_[2].begin) * c_.rank * V;
      all_tap_sums(s, patch_, z_, c_.rank, o_.basis_sums(slice_, o_.part_of(block)) + first, pitch);
    }
  }

  void block_by_fft(int64_t block, int64_t from_column, int64_t to_column) {
    constexpr int kPoint = 2 * V;
    Transforms<T> fft(c_.circle, static_cast<const T*>(c_.roots), fft_);
    Frequencies<T> frequencies = {patch_};
    for (int d = span_[0].first; d < span_[0].last; ++d)
      for (int h = span_[1].first; h < span_[1].last; ++h) {
        gather_row(block, d, h, line_);
        fft.row(d, h, {line_, kPoint, span_[2].first, span_[2].last}, frequencies);
      }
    if (span_[0].first == span_[0].last || span_[1].first == span_[1].last) {
      std::memset(patch_, 0, o_.points_ * kPoint * sizeof(T));
    } else {
      fft.columns(span_[0].first, span_[0].last, span_[1].first, span_[1].last, frequencies);
    }
    const int height = span_[1].count, width = span_[2].count, rows = span_[0].count * height;
    for (int r = 0; r < c_.rank; ++r) {
      const int64_t at = band_ * o_.band_size_ + r * 2 * o_.points_;
      if (wanted_ & (kOutput | kCoefficients)) {
        const Filtered<T> filtered = {patch_, o_.band_tables_ + at};
        fft.back_columns(span_[0].count, height, filtered);
        for (int row = 0; row < rows; row += batch_) {
          const int n = static_cast<int>(at_most(batch_, rows - row));
          for (int i = 0; i < n; ++i)
            fft.back_row((row + i) / height, (row + i) % height, width, filtered,
                         z_ + int64_t{1} * i * width * kPoint);
          use_responses(block, int64_t{1} * row * width, int64_t{1} * n * width, r, 1, z_, from_column,
                        to_column);
        }
      }
      if (wanted_ & kBasis) {
        Correlations<T> sums = {patch_, product_, o_.basis_sums(slice_, o_.part_of(block)) + at};
        for (int row = 0; row < rows; row += batch_) {
          const int n = static_cast<int>(at_most(batch_, rows - row));
          make_gradient(block, int64_t{1} * row * width, int64_t{1} * n * width, r, 1, z_);
          for (int i = 0; i < n; ++i) {
            const T* u = z_ + int64_t{1} * i * width * kPoint;
            fft.row((row + i) / height, (row + i) % height, {u, kPoint, 0, width}, sums);
          }
        }
        fft.columns(0, span_[0].count, 0, height, sums);
      }
    }
  }

  Room<T> room_;
  Room<uint32_t> pairs_room_;
  T *patch_, *line_, *z_, *fft_, *product_, *output_, *target_;
  uint32_t *z_pairs_, *target_pairs_;
  int batch_;
};

}  // namespace
}  // namespace hyperconv
