// The one loop nest of all operators: what all threads share, and how the work is dealt to them. Tiles of
// target positions are in worker.h and planes_worker.h.
#pragma once
#include "access.h"
#include "fft.h"
#include "product.h"
#include "threads.h"

namespace hyperconv {
namespace {

inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }
inline int64_t floor_mod(int64_t a, int64_t b) { return a - b * floor_div(a, b); }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// Outputs of an axis that agree modulo its phases, and the taps of theirs that exist: begin <= j < end.
struct Phase {
  int64_t origin, first;
  int begin, end, count, band;
};

inline Phase phase_of(const Axis& a, int phase) {
  const int64_t num = static_cast<int64_t>(a.scale) * phase + a.shift;
  const int64_t tap0 = floor_mod(floor_div(num, a.divisor) * a.inverse, a.residues);
  Phase p;
  p.first = tap0 + a.first;
  p.origin = floor_div(num - tap0 * a.dilation, a.modulus) - a.back;
  auto exists = [&](int j) {
    const int64_t tap = p.first + static_cast<int64_t>(a.tap_step) * j;
    return tap >= 0 && tap < a.kernel;
  };
  p.begin = 0;
  p.end = floor_mod(num, a.divisor) == 0 ? a.taps : 0;
  while (p.begin < p.end && !exists(p.begin)) ++p.begin;
  while (p.end > p.begin && !exists(p.end - 1)) --p.end;
  p.count = static_cast<int>(ceil_div(a.out_size - phase, a.phases));
  p.band = phase % a.modulus;
  return p;
}

// Of one axis: the positions of a tile, and the input at each position of its patch, or -1.
struct Span {
  int start, pitch, count, length, first, last;  // inputs exist for first <= l < last
  int* input;
};

inline void set_span(Span& s, const Axis& a, const Phase& p, int phase, int tile, int rounded,
                     int circle) {
  const int n0 = tile * a.tile;
  s.start = phase + a.phases * n0;
  s.pitch = a.phases;
  s.count = static_cast<int>(at_most(a.tile, p.count - n0));
  const int positions = static_cast<int>(ceil_div(s.count, rounded) * rounded);
  s.length = circle > 0 ? circle : (positions - 1) * a.stride + (p.end - p.begin);
  s.first = s.length;
  s.last = 0;
  for (int l = 0; l < s.length; ++l) {
    const int64_t j = l + p.begin;
    const int64_t at = static_cast<int64_t>(a.jump) * n0 + j / a.stride * a.jump + j % a.stride;
    const int64_t q = p.origin + a.step * at;
    const bool inside = q >= 0 && q < a.in_size;
    s.input[l] = inside ? static_cast<int>(q) : -1;
    if (inside && l < s.first) s.first = l;
    if (inside) s.last = l + 1;
  }
  if (s.first > s.last) s.first = s.last;
}

template <class T>
class Convolver {
  static constexpr int V = kLanes<T>;
  class Place;         // a tile, where it is
  class Worker;        // one thread's memory, and what it does with a tile: lanes are channels
  class PlanesWorker;  // the same where lanes are positions

 public:
  Convolver(const Convolution& call, const Access<T>& access, ParallelFor parallel_for)
      : c_(call), access_(access), parallel_for_(parallel_for) {
    by_fft_ = c_.algorithm == kFft;
    planes_ = c_.algorithm == kPlanes;
    lanewise_ = !planes_ && c_.source_channels == 1 && c_.target_channels == 1 && c_.groups > 1;
    pairs_ = Pairs<T>::kThere && c_.dtype == kBfloat16 && !planes_ && !lanewise_;
    lanes_ = planes_ ? c_.source_channels : by_fft_ ? 2 * V : V;
    groups_ = lanewise_ ? ceil_div(c_.groups, lanes_) : c_.groups;
    blocks_ = lanewise_ ? 1 : ceil_div(c_.source_channels, lanes_);
    columns_ = lanewise_ ? lanes_ / V : static_cast<int>(ceil_div(c_.target_channels, V));
    width_ = planes_ ? c_.target_channels : columns_ * V;
    phases_ = bands_ = taps_ = 1;
    for (int a = 0; a < 3; ++a) {
      phases_ *= c_.axis[a].phases;
      bands_ *= c_.axis[a].modulus < c_.axis[a].phases ? c_.axis[a].modulus : c_.axis[a].phases;
      taps_ *= c_.axis[a].kernel;
    }
    points_ = int64_t{1} * c_.circle[0].size * c_.circle[1].size * c_.circle[2].size;
    tiles_ = groups_ * phases_ * c_.batch;
    for (const Axis& axis : c_.axis) tiles_ *= axis.tiles;
  }

  Status run() {
    const bool sums = c_.wanted & (kCoefficients | kBasis);
    const int64_t block_size = int64_t{1} * lanes_ * c_.rank;
    const int64_t packed_size = groups_ * blocks_ * block_size * (lanewise_ ? 1 : width_);
    const int64_t mixer_size = groups_ * blocks_ * block_size * c_.target_channels;
    int64_t band_size = int64_t{1} * c_.rank * (by_fft_ ? 2 * points_ : 1);
    for (int a = 0; a < 3 && !by_fft_; ++a) band_size *= c_.axis[a].taps;
    const int64_t gradient_size = by_fft_ ? bands_ * band_size : taps_ * c_.rank * V;
    const bool packs = (c_.wanted & kOutput) || ((lanewise_ || planes_) && (c_.wanted & kBasis));
    Room<T> packed(packs ? packed_size : 0);
    Room<T> mixer(!lanewise_ && !planes_ && (c_.wanted & kBasis) ? mixer_size : 0);
    const int64_t couples = ceil_div(c_.target_channels, 2);
    Room<uint32_t> paired(pairs_ && packs ? packed_size / 2 : 0);
    const int64_t paired_mixer_size = groups_ * blocks_ * block_size * couples;
    Room<uint32_t> paired_mixer(pairs_ && (c_.wanted & kBasis) ? paired_mixer_size : 0);
    Room<T> bands(c_.wanted & (kOutput | kCoefficients) ? bands_ * band_size : 0);
    Room<T> coefficient_sums(c_.wanted & kCoefficients ? c_.slices * packed_size : 0);
    Room<T> basis_sums(c_.wanted & kBasis ? int64_t{1} * c_.slices * c_.parts * gradient_size : 0);
    Room<int> rows(block_size + c_.rank);
    Room<T> bias(c_.bias ? int64_t{1} * c_.groups * c_.target_channels : 0);
    if (packed.failed() || mixer.failed() || paired.failed() || paired_mixer.failed() || bands.failed() ||
        coefficient_sums.failed() || basis_sums.failed() || bias.failed() || rows.failed()) {
      return kNoMemory;
    }
    // Rows of a packed block by lane, then function; then the functions' numbers.
    for (int l = 0; l < lanes_; ++l)
      for (int r = 0; r < c_.rank; ++r) rows.get()[l * c_.rank + r] = r * lanes_ + l;
    functions_ = rows.get() + block_size;
    for (int r = 0; r < c_.rank; ++r) rows.get()[block_size + r] = r;
    packed_ = packed.get();
    mixer_ = mixer.get();
    paired_ = paired.get();
    paired_mixer_ = paired_mixer.get();
    band_tables_ = bands.get();
    coefficient_sums_ = coefficient_sums.get();
    basis_sums_ = basis_sums.get();
    bias_ = bias.get();
    packed_size_ = packed_size;
    band_size_ = band_size;
    gradient_size_ = gradient_size;
    for (int64_t n = 0; n < (c_.bias ? int64_t{1} * c_.groups * c_.target_channels : 0); ++n)
      bias_[n] = access_.number(c_.bias, n);
    if (packed_ || mixer_) {
      run_tasks(groups_ * blocks_, c_.threads, parallel_for_, [&, this](auto next) {
        for (int64_t task; (task = next()) >= 0;) pack(task, rows.get());
      });
    }
    if (band_tables_) make_bands();
    if (failed_) return kNoMemory;

    // One pass where the sums' slices keep all threads busy, so that z serves them and the output.
    const bool apart = sums && (c_.wanted & kOutput) && c_.threads > c_.slices;
    if (apart) planes_ ? run_pass<PlanesWorker>(kOutput) : run_pass<Worker>(kOutput);
    const int wanted = apart ? c_.wanted & ~kOutput : c_.wanted;
    planes_ ? run_pass<PlanesWorker>(wanted) : run_pass<Worker>(wanted);
    if (failed_) return kNoMemory;
    if (c_.wanted & kCoefficients) {
      run_tasks(groups_ * blocks_, c_.threads, parallel_for_, [&, this](auto next) {
        for (int64_t task; (task = next()) >= 0;) unpack(task, rows.get());
      });
    }
    if (c_.wanted & kBasis) finish_basis();
    return failed_ ? kNoMemory : kDone;
  }

 private:
  // Tasks are tiles, or parts of their columns where they are few; for sums slices of the tiles, or parts
  // of their blocks.
  template <class Worker>
  void run_pass(int wanted) {
    const bool sums = wanted != kOutput;
    const int64_t tasks = sums ? c_.slices : tiles_;
    int64_t parts = c_.parts;
    if (!sums) {
      parts = lanewise_ || planes_ ? 1 : at_most(ceil_div(c_.threads, tasks), ceil_div(columns_, kMostColumns));
    } else if (wanted & kOutput) {
      parts = 1;
    }
    run_tasks(tasks * parts, c_.threads, parallel_for_, [&, this](auto next) {
      Worker worker(*this, wanted);
      if (worker.failed()) {
        __atomic_store_n(&failed_, true, __ATOMIC_RELAXED);
        return;
      }
      for (int64_t task; (task = next()) >= 0;) {
        const int64_t whole = task / parts, part = task % parts;
        if (!sums) {
          worker.tile(whole, 0, blocks_, columns_ * part / parts, columns_ * (part + 1) / parts, 0);
          continue;
        }
        const int64_t from = blocks_ * part / parts, to = blocks_ * (part + 1) / parts;
        worker.clear(whole, from, to);
        for (int64_t t = tiles_ * whole / c_.slices; t < tiles_ * (whole + 1) / c_.slices; ++t)
          worker.tile(t, from, to, 0, columns_, whole);
      }
    });
  }

  // The sums by phi are kept apart for parts of the blocks, whoever computes them.
  int64_t part_of(int64_t block) const { return ((block + 1) * c_.parts - 1) / blocks_; }
  T* basis_sums(int64_t slice, int64_t part) const {
    return basis_sums_ + (slice * c_.parts + part) * gradient_size_;
  }

  // Channels of a group's block that exist.
  int lanes_of(int64_t group, int64_t block) const {
    const int64_t left = lanewise_ ? c_.groups - group * lanes_ : c_.source_channels - block * lanes_;
    return static_cast<int>(at_most(left, lanes_));
  }
  int64_t source_channel(int64_t group, int64_t block) const {
    return lanewise_ ? group * lanes_ : group * c_.source_channels + block * lanes_;
  }
  int64_t target_channel(int64_t group) const {
    return lanewise_ ? group * lanes_ : group * c_.target_channels;
  }
  int target_channels(int64_t group) const {
    return lanewise_ ? lanes_of(group, 0) : c_.target_channels;
  }

  // A block of A, in pieces of numbers whose rows in a packed block are known: f(where it begins in A, its
  // target channels, their step, its rows, their step, and numbers).
  template <class F>
  void each_piece(int64_t group, int64_t block, const int* rows, const F& f) const {
    const int lanes = lanes_of(group, block);
    if (lanewise_) {
      for (int l = 0; l < lanes; ++l) {
        const int64_t at = (group * lanes_ + l) * c_.coefficient_group;
        f(at, 1, 0, c_.rank, c_.coefficient_rank, rows + l * c_.rank);
      }
      return;
    }
    const int64_t first = group * c_.coefficient_group + block * lanes_ * c_.coefficient_source;
    const bool together = c_.coefficient_rank == 1 && c_.coefficient_source == c_.rank;
    if (together)
      return f(first, c_.target_channels, c_.coefficient_target, lanes * c_.rank, int64_t{1}, rows);
    for (int l = 0; l < lanes; ++l)
      f(first + l * c_.coefficient_source, c_.target_channels, c_.coefficient_target, c_.rank,
        c_.coefficient_rank, rows + l * c_.rank);
  }

  T* packed_block(T* base, int64_t task) const { return base + task * (packed_size_ / (groups_ * blocks_)); }

  // Of rows in pairs, each of which has the place of two.
  uint32_t* paired_block(uint32_t* base, int64_t task, int64_t width) const {
    return base + task * (int64_t{1} * lanes_ * c_.rank * width / 2);
  }

  // packed: [group, block][r][lane][target channel], by lanes [group][r][lane], for planes
  // [group][target channel][source channel][r];
  // mixer: [group, block][target channel][r][lane], for FFT [group, block][r][target channel][lane].
  void pack(int64_t task, const int* rows) {
    const int64_t group = task / blocks_, block = task % blocks_;
    if (planes_) {
      T* to = packed_block(packed_, task);
      const int64_t first = group * c_.coefficient_group;
      for (int t = 0; t < c_.target_channels; ++t)
        for (int l = 0; l < lanes_; ++l)
          for (int r = 0; r < c_.rank; ++r)
            *to++ = access_.number(c_.coefficients, first + t * c_.coefficient_target +
                                                        l * c_.coefficient_source + r * c_.coefficient_rank);
    } else if (packed_) {
      const int64_t size = packed_size_ / (groups_ * blocks_), pitch = lanewise_ ? 1 : width_;
      T* to = packed_block(packed_, task);
      const bool whole = lanes_of(group, block) == lanes_ && (lanewise_ || width_ == c_.target_channels);
      if (!whole) std::memset(to, 0, size * sizeof(T));
      each_piece(group, block, rows, [&](int64_t at, int targets, int64_t step, int n, int64_t inner,
                                         const int* to_rows) {
        access_.gather(c_.coefficients, at, targets, step, n, inner, to_rows, to, pitch);
      });
      if constexpr (Pairs<T>::kThere) {
        if (paired_) Pairs<T>::join_rows(to, lanes_ * c_.rank, width_, paired_block(paired_, task, width_));
      }
    }
    if (mixer_) {
      const int lanes = lanes_of(group, block), ranks = c_.rank;
      const int64_t size = int64_t{1} * lanes_ * ranks * c_.target_channels;
      const int64_t by_rank = by_fft_ ? int64_t{1} * c_.target_channels * lanes_ : lanes_;
      const int64_t by_target = by_fft_ ? lanes_ : int64_t{1} * ranks * lanes_;
      T* to = mixer_ + task * size;
      if (lanes < lanes_) std::memset(to, 0, size * sizeof(T));
      const int64_t first = group * c_.coefficient_group + block * lanes_ * c_.coefficient_source;
      for (int t = 0; t < c_.target_channels; ++t)
        access_.gather(c_.coefficients, first + t * c_.coefficient_target, lanes, c_.coefficient_source,
                       ranks, c_.coefficient_rank, functions_, to + t * by_target, by_rank);
      if constexpr (Pairs<T>::kThere) {
        if (!paired_mixer_) return;
        const int64_t couples = ceil_div(c_.target_channels, 2), parts = by_fft_ ? ranks : 1;
        const int64_t wide = lanes_ * ranks / parts;
        uint32_t* pairs = paired_block(paired_mixer_, task, 2 * couples);
        for (int64_t part = 0; part < parts; ++part)
          Pairs<T>::join_rows(to + part * c_.target_channels * wide, c_.target_channels, wide,
                              pairs + part * couples * wide);
      }
    }
  }

  // The slices' sums, added up, to the gradient of A.
  void unpack(int64_t task, const int* rows) {
    const int64_t group = task / blocks_, block = task % blocks_;
    const int64_t size = packed_size_ / (groups_ * blocks_), pitch = lanewise_ ? 1 : width_;
    T* sum = packed_block(coefficient_sums_, task);
    for (int s = 1; s < c_.slices; ++s) {
      const T* other = sum + s * packed_size_;
      for (int64_t n = 0; n < size; ++n) sum[n] += other[n];
    }
    if (planes_) {
      const int64_t first = group * c_.coefficient_group, row = int64_t{1} * lanes_ * c_.rank;
      for (int l = 0; l < lanes_; ++l)
        for (int t = 0; t < c_.target_channels; ++t)
          access_.scatter(c_.coefficients_gradient,
                          first + t * c_.coefficient_target + l * c_.coefficient_source, 1, 0, c_.rank,
                          c_.coefficient_rank, functions_, sum + t * row + l * c_.rank, 1);
      return;
    }
    each_piece(group, block, rows, [&](int64_t at, int targets, int64_t step, int n, int64_t inner,
                                       const int* from_rows) {
      access_.scatter(c_.coefficients_gradient, at, targets, step, n, inner, from_rows, sum, pitch);
    });
  }

  // Phases of all axes that share a band, one of each: f(band, phases of the three axes).
  template <class F>
  void each_band(const F& f) const {
    int count[3];
    for (int a = 0; a < 3; ++a)
      count[a] = static_cast<int>(at_most(c_.axis[a].modulus, c_.axis[a].phases));
    for (int d = 0; d < count[0]; ++d)
      for (int h = 0; h < count[1]; ++h)
        for (int w = 0; w < count[2]; ++w) {
          const Phase phases[3] = {phase_of(c_.axis[0], d), phase_of(c_.axis[1], h),
                                   phase_of(c_.axis[2], w)};
          f(band_of(phases), phases);
        }
  }
  int64_t band_of(const Phase* phases) const {
    int64_t band = 0;
    for (int a = 0; a < 3; ++a)
      band = band * at_most(c_.axis[a].modulus, c_.axis[a].phases) + phases[a].band;
    return band;
  }
  int64_t tap(const Phase* phases, int jd, int jh, int jw) const {
    const int j[3] = {jd, jh, jw};
    int64_t tap = 0;
    for (int a = 0; a < 3; ++a) {
      const Axis& axis = c_.axis[a];
      tap = tap * axis.kernel + phases[a].first + static_cast<int64_t>(axis.tap_step) * j[a];
    }
    return tap;
  }
  static bool meets(const Phase* p) {
    return p[0].begin < p[0].end && p[1].begin < p[1].end && p[2].begin < p[2].end;
  }

  // phi as it is read: by taps [band][jd][jh][jw][r], by FFT its conjugate spectrum
  // [band][r][frequency][re, im] divided by the number of points.
  void make_bands() {
    const T* phi = static_cast<const T*>(c_.basis);
    if (!by_fft_) {
      each_band([&](int64_t band, const Phase* p) {
        T* to = band_tables_ + band * band_size_;
        const int64_t row = int64_t{1} * c_.axis[2].taps * c_.rank, plane = c_.axis[1].taps * row;
        for (int jd = p[0].begin; jd < p[0].end; ++jd)
          for (int jh = p[1].begin; jh < p[1].end; ++jh)
            for (int jw = p[2].begin; jw < p[2].end; ++jw)
              for (int r = 0; r < c_.rank; ++r)
                to[jd * plane + jh * row + static_cast<int64_t>(jw) * c_.rank + r] =
                    phi[r * taps_ + tap(p, jd, jh, jw)];
      });
      return;
    }
    const int64_t passes = ceil_div(c_.rank, V);
    run_tasks(bands_ * passes, c_.threads, parallel_for_, [&, this](auto next) {
      Room<T> scratch(Transforms<T>::room(c_.circle)), points(int64_t{2} * V * points_);
      Room<T> line(int64_t{2} * V * c_.circle[2].size);
      if (scratch.failed() || points.failed() || line.failed()) {
        __atomic_store_n(&failed_, true, __ATOMIC_RELAXED);
        return;
      }
      Transforms<T> fft(c_.circle, static_cast<const T*>(c_.roots), scratch.get());
      for (int64_t task; (task = next()) >= 0;) {
        const int first = static_cast<int>(task % passes) * V;
        spectrum(fft, line.get(), points.get(), task / passes, first);
      }
    });
  }

  // Of functions first, first + 1, ... in the lanes of the real part.
  void spectrum(Transforms<T>& fft, T* line, T* points, int64_t wanted, int first) {
    const T* phi = static_cast<const T*>(c_.basis);
    const int functions = static_cast<int>(at_most(V, c_.rank - first)), n = c_.circle[2].size;
    const T scale = static_cast<T>(1) / static_cast<T>(points_);
    Frequencies<T> all = {points};
    each_band([&](int64_t band, const Phase* p) {
      if (band != wanted) return;
      if (!meets(p)) {
        std::memset(points, 0, int64_t{2} * V * points_ * sizeof(T));
        return;
      }
      for (int jd = p[0].begin; jd < p[0].end; ++jd) {
        for (int jh = p[1].begin; jh < p[1].end; ++jh) {
          std::memset(line, 0, int64_t{2} * V * n * sizeof(T));
          for (int jw = p[2].begin; jw < p[2].end; ++jw)
            for (int r = 0; r < functions; ++r)
              line[(jw - p[2].begin) * 2 * V + r] = phi[(first + r) * taps_ + tap(p, jd, jh, jw)];
          fft.row(jd - p[0].begin, jh - p[1].begin, {line, 2 * V, 0, n}, all);
        }
      }
      fft.columns(0, p[0].end - p[0].begin, 0, p[1].end - p[1].begin, all);
    });
    for (int r = 0; r < functions; ++r) {
      T* to = band_tables_ + wanted * band_size_ + (first + r) * 2 * points_;
      for (int64_t k = 0; k < points_; ++k) {
        to[2 * k] = points[k * 2 * V + r] * scale;
        to[2 * k + 1] = -points[k * 2 * V + V + r] * scale;
      }
    }
  }

  // The slices' sums, added up, to the gradient of phi.
  void finish_basis() {
    T* gradient = static_cast<T*>(c_.basis_gradient);
    for (int s = 1; s < c_.slices * c_.parts; ++s)
      for (int64_t n = 0; n < gradient_size_; ++n) basis_sums_[n] += basis_sums_[s * gradient_size_ + n];
    if (!by_fft_) {
      for (int64_t k = 0; k < taps_; ++k) {
        for (int r = 0; r < c_.rank; ++r) {
          T sum = 0;
          for (int l = 0; l < V; ++l) sum += basis_sums_[(k * c_.rank + r) * V + l];
          gradient[r * taps_ + k] = sum;
        }
      }
      return;
    }
    std::memset(gradient, 0, c_.rank * taps_ * sizeof(T));
    Room<T> scratch(Transforms<T>::room(c_.circle)), points(int64_t{2} * V * points_);
    Room<T> line(int64_t{2} * V * c_.circle[2].size);
    if (scratch.failed() || points.failed() || line.failed()) {
      failed_ = true;
      return;
    }
    Transforms<T> fft(c_.circle, static_cast<const T*>(c_.roots), scratch.get());
    const T scale = static_cast<T>(1) / static_cast<T>(points_);
    const Frequencies<T> all = {points.get()};
    each_band([&](int64_t band, const Phase* p) {
      const int td = p[0].end - p[0].begin, th = p[1].end - p[1].begin, tw = p[2].end - p[2].begin;
      if (!meets(p)) return;
      for (int first = 0; first < c_.rank; first += V) {
        const int functions = static_cast<int>(at_most(V, c_.rank - first));
        const T* from = basis_sums_ + band * band_size_ + first * 2 * points_;
        std::memset(points.get(), 0, int64_t{2} * V * points_ * sizeof(T));
        for (int r = 0; r < functions; ++r)
          for (int64_t k = 0; k < points_; ++k) {
            points.get()[k * 2 * V + r] = from[(r * points_ + k) * 2] * scale;
            points.get()[k * 2 * V + V + r] = from[(r * points_ + k) * 2 + 1] * scale;
          }
        fft.back_columns(td, th, all);
        for (int jd = 0; jd < td; ++jd)
          for (int jh = 0; jh < th; ++jh) {
            fft.back_row(jd, jh, tw, all, line.get());
            for (int jw = 0; jw < tw; ++jw) {
              const int64_t at = tap(p, jd + p[0].begin, jh + p[1].begin, jw + p[2].begin);
              for (int r = 0; r < functions; ++r)
                gradient[(first + r) * taps_ + at] = line.get()[jw * 2 * V + r];
            }
          }
      }
    });
  }

  const Convolution& c_;
  const Access<T>& access_;
  ParallelFor parallel_for_;
  bool by_fft_, planes_, lanewise_, pairs_, failed_ = false;
  int lanes_, columns_;
  int64_t groups_, blocks_, width_, phases_, bands_, taps_, points_, tiles_;
  int64_t packed_size_, band_size_, gradient_size_;
  const int* functions_;
  uint32_t *paired_, *paired_mixer_;
  T *packed_, *mixer_, *band_tables_, *coefficient_sums_, *basis_sums_, *bias_;
};

}  // namespace
}  // namespace hyperconv
