// The coordinate MLP, phi_n(k) = feature n at the coordinates of tap k: all layers in one launch forward,
// one launch backward. A warp evaluates one tap.
#include "coordinate_mlp.cuh"
#include "launch.cuh"

namespace hyperconv {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

template <typename T>
__global__ __launch_bounds__(kThreads, 1) void coordinate_mlp_kernel(
    const __grid_constant__ MlpArguments p, float* basis, bool constant) {
  const int warp = threadIdx.x / 32, k = blockIdx.x * kWarps + warp;
  if (k >= p.taps) return;
  Features& tap = reinterpret_cast<Features*>(ptx::dynamic_shared())[warp];
  evaluate<T>(p, k, tap);
  const int features = p.widths[p.layers];
  for (int n = threadIdx.x % 32; n < features; n += 32) basis[n * p.taps + k] = tap.value(p.layers)[n];
  if (constant && threadIdx.x % 32 == 0) basis[features * p.taps + k] = 1.0f;
}

// One block a layer, which evaluates the layers above it again: K rows of a small network cost nothing.
template <typename T>
__global__ __launch_bounds__(kThreads, 1) void coordinate_mlp_backward_kernel(
    const __grid_constant__ MlpArguments p, const float* gradient,
    const __grid_constant__ MlpGradients sums) {
  constexpr int kPerThread = kMaxWidth * kMaxWidth / kThreads;
  const int target = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int in = p.widths[target], out = p.widths[target + 1];
  Trace* taps = reinterpret_cast<Trace*>(ptx::dynamic_shared());
  Trace& tap = taps[warp];
  float weight_sum[kPerThread] = {}, bias_sum = 0.0f;
  for (int first = 0; first < p.taps; first += kWarps) {
    const int k = first + warp;
    evaluate<T>(p, min(k, p.taps - 1), tap);
    for (int n = lane; n < p.widths[p.layers]; n += 32) {
      const float g = k < p.taps ? gradient[n * p.taps + k] : 0.0f;
      tap.delta[p.layers % 2][n] = g * tap.slope[p.layers][n];
    }
    __syncwarp();
    for (int layer = p.layers - 1; layer > target; --layer) {
      const T* weight = static_cast<const T*>(p.weight[layer]);
      for (int i = lane; i < p.widths[layer]; i += 32) {
        float sum = 0.0f;
        for (int o = 0; o < p.widths[layer + 1]; ++o) {
          sum += tap.delta[(layer + 1) % 2][o] * ptx::to_float(weight[o * p.widths[layer] + i]);
        }
        tap.delta[layer % 2][i] = sum * tap.slope[layer][i];
      }
      __syncwarp();
    }
    __syncthreads();  // the deltas of all warps
    const int parity = (target + 1) % 2;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      const int index = e * kThreads + threadIdx.x;
      if (index < in * out) {
        for (int w = 0; w < kWarps; ++w) {
          weight_sum[e] += taps[w].delta[parity][index / in] * taps[w].value(target)[index % in];
        }
      }
    }
    if (static_cast<int>(threadIdx.x) < out) {
      for (int w = 0; w < kWarps; ++w) bias_sum += taps[w].delta[parity][threadIdx.x];
    }
    __syncthreads();  // before the next taps overwrite these
  }
  T* d_weight = static_cast<T*>(sums.weight[target]);
  T* d_bias = static_cast<T*>(sums.bias[target]);
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    const int index = e * kThreads + threadIdx.x;
    if (index < in * out) d_weight[index] = ptx::from_float<T>(weight_sum[e]);
  }
  if (static_cast<int>(threadIdx.x) < out) d_bias[threadIdx.x] = ptx::from_float<T>(bias_sum);
}

}  // namespace

Status coordinate_mlp(Number number, const MlpArguments& p, float* basis, bool constant,
                      cudaStream_t stream) {
  return with_number(number, [&](auto n) -> Status {
    using T = typename decltype(n)::Element;
    return launch<coordinate_mlp_kernel<T>>(ceil_div(p.taps, kWarps), kThreads,
                                            kWarps * static_cast<int>(sizeof(Features)), stream, p,
                                            basis, constant);
  });
}

Status coordinate_mlp_backward(Number number, const MlpArguments& p, const float* gradient,
                               const MlpGradients& sums, cudaStream_t stream) {
  return with_number(number, [&](auto n) -> Status {
    using T = typename decltype(n)::Element;
    return launch<coordinate_mlp_backward_kernel<T>>(p.layers, kThreads,
                                                     kWarps * static_cast<int>(sizeof(Trace)), stream,
                                                     p, gradient, sums);
  });
}

}  // namespace hyperconv
