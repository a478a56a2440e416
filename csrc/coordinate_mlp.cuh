// The coordinate MLP at one tap, evaluated by a warp whose lanes share the features of a layer; float32 sums.
#pragma once

#include "launchers.h"
#include "ptx.cuh"

namespace hyperconv {

__device__ __forceinline__ float activate(float h, const MlpArguments& p) {
  switch (p.activation) {
    case Activation::kLeakyRelu:
      return h > 0 ? h : p.slope * h;
    case Activation::kRelu:
      return h > 0 ? h : 0.0f;
    case Activation::kGelu:
      return 0.5f * h * (1.0f + erff(h * 0.70710678118654752f));  // 1 / sqrt(2)
    case Activation::kSilu:
      return h / (1.0f + expf(-h));
    case Activation::kTanh:
      return tanhf(h);
    case Activation::kSine:
      return sinf(h);
  }
  return h;
}

// The derivative of `activate` at h.
__device__ __forceinline__ float activation_slope(float h, const MlpArguments& p) {
  switch (p.activation) {
    case Activation::kLeakyRelu:
      return h > 0 ? 1.0f : p.slope;
    case Activation::kRelu:
      return h > 0 ? 1.0f : 0.0f;
    case Activation::kGelu:  // 1 / sqrt(2), 1 / sqrt(2 pi)
      return 0.5f * (1.0f + erff(h * 0.70710678118654752f)) +
             h * 0.39894228040143268f * expf(-0.5f * h * h);
    case Activation::kSilu: {
      const float s = 1.0f / (1.0f + expf(-h));
      return s * (1.0f + h * (1.0f - s));
    }
    case Activation::kTanh: {
      const float t = tanhf(h);
      return 1.0f - t * t;
    }
    case Activation::kSine:
      return cosf(h);
  }
  return 1.0f;
}

// The output of a layer whose W h + b is `h`; its derivative by that.
__device__ __forceinline__ float layer_output(float h, bool linear, const MlpArguments& p) {
  return linear ? h : activate(p.gain * h, p);
}
__device__ __forceinline__ float layer_slope(float h, bool linear, const MlpArguments& p) {
  return linear ? 1.0f : p.gain * activation_slope(p.gain * h, p);
}

// What a warp keeps of a tap, in shared memory: row 0 the coordinates, row n + 1 the output of layer n, times
// the window where the last layer takes it.
// The features alone: two rows in turn.
struct Features {
  float row[2][kMaxWidth];

  __device__ float* value(int n) { return row[n % 2]; }
  __device__ void keep(const MlpArguments& p, int n, int o, float h, bool linear, float window) {
    value(n)[o] = window * layer_output(h, linear, p);
  }
};

// Every row, and its derivatives by W h + b of its layer.
struct Trace {
  float row[kMaxLayers + 1][kMaxWidth];
  float slope[kMaxLayers + 1][kMaxWidth];
  float delta[2][kMaxWidth];

  __device__ float* value(int n) { return row[n]; }
  __device__ void keep(const MlpArguments& p, int n, int o, float h, bool linear, float window) {
    row[n][o] = window * layer_output(h, linear, p);
    slope[n][o] = window * layer_slope(h, linear, p);
  }
};

// All layers at tap `k`, parameters of type T. The whole warp calls it, and may read `kept` afterwards.
template <typename T, class Kept>
__device__ void evaluate(const MlpArguments& p, int k, Kept& kept) {
  const int lane = threadIdx.x % 32;
  const float* coordinates = p.coordinates + static_cast<int64_t>(k) * (p.widths[0] + p.windowed);
  // Of the layer whose output, or else of the coordinates, the last layer takes.
  const auto window = [&](int n) { return p.windowed && n == p.layers - 2 ? coordinates[p.widths[0]] : 1.0f; };
  for (int i = lane; i < p.widths[0]; i += 32) kept.value(0)[i] = window(-1) * coordinates[i];
  __syncwarp();
  for (int n = 0; n < p.layers; ++n) {
    const T* weight = static_cast<const T*>(p.weight[n]);
    const T* bias = static_cast<const T*>(p.bias[n]);
    const float* inputs = kept.value(n);
    const bool linear = p.linear_output && n == p.layers - 1;
    const float scale = window(n);
    for (int o = lane; o < p.widths[n + 1]; o += 32) {
      float h = ptx::to_float(bias[o]);
      for (int i = 0; i < p.widths[n]; ++i) {
        h += ptx::to_float(weight[o * p.widths[n] + i]) * inputs[i];
      }
      kept.keep(p, n + 1, o, h, linear, scale);
    }
    __syncwarp();
  }
}

}  // namespace hyperconv
