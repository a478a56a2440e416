// Tiles whose lanes are positions, for few source channels: z is [source channel][r][position], the output
// and the target [channel][position], positions padded to whole vectors along the last axis.
#pragma once
#include "planes.h"
#include "worker.h"

namespace hyperconv {
namespace {

template <class T>
class Convolver<T>::PlanesWorker : public Convolver<T>::Place {
  using Place::band_;
  using Place::batch_index_;
  using Place::c_;
  using Place::group_;
  using Place::o_;
  using Place::phases_;
  using Place::slice_;
  using Place::span_;
  using Place::wanted_;

 public:
  PlanesWorker(const Convolver& owner, int wanted) : Place(owner, wanted) {
    int64_t lengths[3], rows = 1;
    for (int a = 0; a < 3; ++a) {
      const Axis& axis = c_.axis[a];
      lengths[a] = (axis.tile - 1) * axis.stride + axis.taps;
      if (a < 2) rows *= lengths[a];
    }
    const Axis& last = c_.axis[2];
    pitch_ = ceil_div(last.tile, V) * V + last.taps / last.stride + 1;
    const int64_t patch = rows * last.stride * pitch_ * c_.source_channels;
    const int64_t positions = c_.axis[0].tile * c_.axis[1].tile * ceil_div(last.tile, V) * V;
    const int64_t z = positions * c_.source_channels * c_.rank;
    const int64_t output = wanted_ & kOutput ? positions * c_.target_channels : 0;
    const int64_t target = wanted_ & (kCoefficients | kBasis) ? positions * c_.target_channels : 0;
    room_.take(patch + z + output + target, 4);
    this->take_indices(lengths);
    if (failed()) return;
    patch_ = room_.part(patch);
    z_ = room_.part(z);
    output_ = room_.part(output);
    target_ = room_.part(target);
  }
  bool failed() const { return room_.failed() || this->indices_.failed(); }

  // Tile number `task`, whole.
  void tile(int64_t task, int64_t, int64_t, int64_t, int64_t, int64_t slice) {
    if (!this->find(task, slice, 1, false)) return;
    for (int a = 0; a < 3; ++a) {
      s_.patch.positions[a] = span_[a].count;
      s_.patch.stride[a] = c_.axis[a].stride;
      s_.patch.length[a] = span_[a].length;
      s_.patch.taps[a] = phases_[a].end - phases_[a].begin;
    }
    s_.vectors = static_cast<int>(ceil_div(span_[2].count, V));
    s_.pitch = pitch_;
    count_ = s_.count();
    if (wanted_ & kOutput) start_output();
    if (Convolver::meets(phases_)) compute();
    if (wanted_ & kOutput) write_output();
  }

 private:
  void start_output() {
    for (int t = 0; t < c_.target_channels; ++t) {
      const Vec<T> bias = broadcast(o_.bias_ ? o_.bias_[o_.target_channel(group_) + t] : T{0});
      for (int64_t p = 0; p < count_; ++p) store(output_ + (t * count_ + p) * V, bias);
    }
  }

  void write_output() const {
    const Strides& s = c_.output_strides;
    this->each_row(s, [&](int64_t row, int64_t at) {
      o_.access_.write_planes(c_.output, at, span_[2].pitch * s.axis[2], span_[2].count, s.channel,
                              c_.target_channels, count_ * V, output_ + row * s_.vectors * V);
    });
  }

  void read_target() {
    std::memset(target_, 0, count_ * V * c_.target_channels * sizeof(T));
    const Strides& s = c_.target_strides;
    this->each_row(s, [&](int64_t row, int64_t at) {
      o_.access_.read_planes(c_.target, at, nullptr, span_[2].pitch * s.axis[2], span_[2].count, s.channel,
                             c_.target_channels, 0, 1, 0, count_ * V, target_ + row * s_.vectors * V);
    });
  }

  void read_patch() {
    std::memset(patch_, 0, s_.size() * c_.source_channels * sizeof(T));
    const Strides& s = c_.source_strides;
    const int first = span_[2].first, count = span_[2].last - first;
    if (count <= 0) return;
    for (int d = span_[0].first; d < span_[0].last; ++d) {
      for (int h = span_[1].first; h < span_[1].last; ++h) {
        const int64_t at = batch_index_ * s.batch + span_[0].input[d] * s.axis[0] +
                           span_[1].input[h] * s.axis[1] + span_[2].input[first] * s.axis[2] +
                           o_.source_channel(group_, 0) * s.channel;
        o_.access_.read_planes(c_.source, at, span_[2].input + first, s.axis[2], count, s.channel,
                               c_.source_channels, first, s_.patch.stride[2], pitch_, s_.size(),
                               patch_ + s_.row(d, h));
      }
    }
  }

  void compute() {
    const int channels = c_.source_channels, rank = c_.rank, targets = c_.target_channels;
    const int64_t positions = count_ * V, wide = int64_t{1} * channels * rank;
    const T* a = o_.packed_ + group_ * targets * wide;
    read_patch();
    if (wanted_ & (kCoefficients | kBasis)) read_target();
    if (wanted_ & (kOutput | kCoefficients)) {
      int64_t pitch[2];
      pitch[1] = int64_t{1} * c_.axis[2].taps * rank;
      pitch[0] = c_.axis[1].taps * pitch[1];
      const T* phi = o_.band_tables_ + band_ * o_.band_size_ + phases_[0].begin * pitch[0] +
                     phases_[1].begin * pitch[1] + int64_t{1} * phases_[2].begin * rank;
      for (int c = 0; c < channels; ++c)
        by_functions(rank, PlaneResponses<T>{s_, patch_ + c * s_.size(), phi, pitch, rank,
                                             z_ + c * rank * positions});
      if (wanted_ & kOutput)
        product<Singles<T>>(targets, static_cast<int>(count_), wide, a, wide, 1, z_, positions, output_,
                            positions);
      if (wanted_ & kCoefficients)
        plane_products(targets, static_cast<int>(wide), count_, target_, z_,
                       o_.coefficient_sums_ + slice_ * o_.packed_size_ + group_ * targets * wide);
    }
    if (!(wanted_ & kBasis)) return;
    std::memset(z_, 0, wide * positions * sizeof(T));
    product<Singles<T>>(wide, static_cast<int>(count_), targets, a, 1, wide, target_, positions, z_,
                        positions);
    T* sums = o_.basis_sums(slice_, 0);
    for (int jd = 0; jd < s_.patch.taps[0]; ++jd)
      for (int jh = 0; jh < s_.patch.taps[1]; ++jh)
        for (int jw = 0; jw < s_.patch.taps[2]; ++jw) {
          const int64_t tap =
              o_.tap(phases_, jd + phases_[0].begin, jh + phases_[1].begin, jw + phases_[2].begin);
          for (int c = 0; c < channels; ++c)
            by_functions(rank, PlaneTapSums<T>{s_, patch_ + c * s_.size(), z_ + c * rank * positions,
                                               s_.tap(jd, jh, jw), sums + tap * rank * V});
        }
  }

  Room<T> room_;
  T *patch_, *z_, *output_, *target_;
  Planes s_;
  int64_t pitch_, count_;
};

}  // namespace
}  // namespace hyperconv
