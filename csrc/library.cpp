// Checks and registration: the operators whose schemas hyperconv_ext/backends/cuda/schemas.py defines.
// Only LibTorch's stable ABI is used, so one library serves every PyTorch from 2.10 on.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "launchers.h"

#ifndef HYPERCONV_DISPATCH_KEY
#define HYPERCONV_DISPATCH_KEY CUDA
#endif
#ifndef HYPERCONV_ARCHITECTURES
#define HYPERCONV_ARCHITECTURES ""
#endif

// Weak, because a CPU build of PyTorch has no CUDA streams: the library must load there all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

// What this binary was compiled for, as "80,90,100+PTX"; "host" where the kernels are executed by the CPU.
extern "C" __attribute__((visibility("default"))) const char* hyperconv_architectures() {
  return HYPERCONV_ARCHITECTURES;
}

namespace hyperconv {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The device of a tensor made current, with PyTorch's current stream on it.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor) {
    if (!tensor.is_cuda()) return;
    guard_.emplace(tensor.get_device_index());
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "hyperconv_ext: expected a PyTorch with CUDA streams, got one without; install "
                    "a CUDA build of PyTorch");
    void* stream = nullptr;
    STD_TORCH_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
        "hyperconv_ext: PyTorch has no current stream for device ", tensor.get_device_index());
    stream_ = static_cast<cudaStream_t>(stream);
    check({reported(cudaSetDevice(tensor.get_device_index()))}, "cudaSetDevice");
  }
  cudaStream_t stream() const { return stream_; }

  static void check(Status status, const char* what) {
    STD_TORCH_CHECK(status.known, "hyperconv_ext: ", what,
                    ": the planned tile is not one of this library's; rebuild it with the Python "
                    "package: pip install . --no-build-isolation");
    STD_TORCH_CHECK(status.error == cudaSuccess, "hyperconv_ext: ", what, ": ",
                    cudaGetErrorString(status.error));
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
};

void expect(const char* name, const char* what, int64_t expected, int64_t got) {
  STD_TORCH_CHECK(expected == got, name, ": expected ", what, " ", expected, ", got ", got);
}

void expect_like(const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, ": expected dtype ",
                  static_cast<int>(like.scalar_type()), ", got ",
                  static_cast<int>(tensor.scalar_type()));
  expect(name, "device index", like.get_device_index(), tensor.get_device_index());
}

void expect_room(const char* name, const Tensor& tensor, int64_t elements) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() >= elements, name,
                  ": expected a contiguous tensor of at least ", elements, " elements, got ",
                  tensor.numel(), tensor.is_contiguous() ? "" : ", not contiguous");
}

void expect_float(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, ": expected float32, got dtype ",
                  static_cast<int>(tensor.scalar_type()));
}

Number number_of(const Tensor& tensor, bool tf32) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return Number::kHalf;
    case ScalarType::BFloat16:
      return Number::kBfloat16;
    case ScalarType::Float:
      return tf32 ? Number::kTf32 : Number::kIeee;
    default:
      STD_TORCH_CHECK(false, "hyperconv_ext: expected float32, float16 or bfloat16, got dtype ",
                      static_cast<int>(tensor.scalar_type()));
  }
}

// What the planner fixed, int32 on the CPU (a list would be unboxed number by number at every launch): the
// row map in the order in which tiles.py flattens it, the fields of the three axes, then the batch; the
// choice in the order of launch.py.
struct Planned {
  Lattice map;
  Choice choice;
};

Planned parse_plan(const Tensor& plan) {
  constexpr int kFields = sizeof(Axis) / sizeof(int);
  STD_TORCH_CHECK(plan.scalar_type() == ScalarType::Int && plan.is_cpu(),
                  "plan: expected int32 on the CPU, got dtype ", static_cast<int>(plan.scalar_type()),
                  plan.is_cpu() ? "" : " on a GPU");
  expect("plan", "numbers", 3 * kFields + 3 + 7, plan.numel());
  expect_room("plan", plan, 0);
  Planned planned;
  const int* next = static_cast<const int*>(plan.data_ptr());
  for (Axis& a : planned.map.axis) {
    for (int* field :
         {&a.out_size, &a.in_size, &a.kernel, &a.phases, &a.step, &a.stride, &a.taps, &a.scale,
          &a.shift, &a.divisor, &a.inverse, &a.residues, &a.dilation, &a.modulus, &a.bands, &a.back,
          &a.first, &a.tap_step, &a.unit, &a.units, &a.blocks, &a.patch, &a.halo}) {
      *field = *next++;
    }
  }
  Lattice& map = planned.map;
  Choice& choice = planned.choice;
  for (int* field : {&map.batch, &map.batch_units, &map.batch_blocks, &choice.out_tiles,
                     &choice.ranks, &choice.warps, &choice.slice, &choice.halo_stages,
                     &choice.shared_bytes, &choice.patch_width}) {
    *field = *next++;
  }
  STD_TORCH_CHECK(choice.out_tiles > 0 && choice.ranks > 0,
                  "plan: expected output tiles and basis functions at a time, got ", choice.out_tiles, " and ",
                  choice.ranks);
  return planned;
}

// An activation [B, C, *S] of up to three spatial axes, whose sizes must be those of the row map.
Operand operand(const char* name, const Tensor& tensor, const Lattice& map, int Axis::*size,
                int64_t groups) {
  const int64_t dims = tensor.dim() - 2;
  STD_TORCH_CHECK(dims >= 1 && dims <= 3, name, ": expected [B, C, *S] with 1 to 3 spatial axes, got ",
                  tensor.dim(), " axes");
  expect(name, "batch", map.batch, tensor.size(0));
  int64_t strides[3] = {0, 0, 0};
  for (int64_t d = 0; d < dims; ++d) {
    expect(name, "spatial size", map.axis[3 - dims + d].*size, tensor.size(2 + d));
    strides[3 - dims + d] = tensor.stride(2 + d);
  }
  STD_TORCH_CHECK(tensor.size(1) % groups == 0, name, ": expected channels divisible by ", groups,
                  " groups, got ", tensor.size(1));
  return {tensor.data_ptr(),
          {tensor.stride(0), strides[0], strides[1], strides[2], tensor.stride(1)},
          static_cast<int>(tensor.size(1) / groups)};
}

// What `prepare` writes and the kernel after it reads, piece after piece of whole 16x16 tiles.
class Workspace {
 public:
  Workspace(const Tensor& tensor, const Tensor& like)
      : next_(static_cast<char*>(tensor.data_ptr())),
        tile_bytes_(like.scalar_type() == ScalarType::Float ? 1024 : 512),
        tiles_(tensor.numel() / 256) {
    expect_like("workspace", tensor, like);
    expect_room("workspace", tensor, 0);
  }

  void* take(const char* what, int64_t tiles) {
    STD_TORCH_CHECK(tiles <= tiles_, "workspace: expected room for ", tiles, " tiles of ", what,
                    ", got ", tiles_);
    void* piece = next_;
    next_ += tiles * tile_bytes_;
    tiles_ -= tiles;
    return piece;
  }

 private:
  char* next_;
  int64_t tile_bytes_, tiles_;
};

// What prepare reads and writes. `transposed` swaps the coefficients' channels (in, out): A is
// [C_out, C_in / groups, R]. Written are a multiple of `pack` functions.
PrepareArguments preparation(const Tensor* coefficients, int64_t groups, bool transposed,
                             int out_tile_multiple, Workspace& workspace, int pack = 1) {
  PrepareArguments p = {};
  p.groups = static_cast<int>(groups);
  if (!coefficients) return p;
  expect("coefficients", "axes", 3, coefficients->dim());
  int64_t out = coefficients->size(0) / groups, in = coefficients->size(1);
  p.coefficients = coefficients->data_ptr();
  p.stride_group = out * coefficients->stride(0);
  p.stride_out = coefficients->stride(0);
  p.stride_in = coefficients->stride(1);
  p.stride_rank = coefficients->stride(2);
  if (transposed) {
    std::swap(in, out);
    std::swap(p.stride_in, p.stride_out);
  }
  p.in_channels = static_cast<int>(in);
  p.out_channels = static_cast<int>(out);
  p.rank = static_cast<int>(coefficients->size(2));
  p.out_tiles = ceil_div(p.out_channels, 16 * out_tile_multiple) * out_tile_multiple;
  const int64_t tiles =
      groups * ceil_div(p.in_channels, 16) * ceil_div(p.rank, pack) * pack * p.out_tiles;
  p.packed = workspace.take("coefficients", tiles);
  return p;
}

// Where float16 factors are scaled: room for the powers of two by which the kernel's sums are multiplied.
float* scales(Number number, PrepareArguments& p, Workspace& workspace) {
  if (number != Number::kHalf) return nullptr;
  const int64_t tile_bytes = 512, bytes = p.rank * static_cast<int64_t>(sizeof(float));
  p.scales = static_cast<float*>(workspace.take("scales", (bytes + tile_bytes - 1) / tile_bytes));
  return p.scales;
}

void add_basis(PrepareArguments& p, const Lattice& map, const Tensor& basis) {
  expect_float("basis", basis);
  p.rank = static_cast<int>(basis.size(0));
  expect_room("basis", basis, static_cast<int64_t>(p.rank) * map.taps());
  p.basis = static_cast<const float*>(basis.data_ptr());
}

void add_bands(PrepareArguments& p, const Lattice& map, const Tensor& basis,
               Workspace& workspace) {
  add_basis(p, map, basis);
  p.bands = workspace.take("bands", static_cast<int64_t>(map.bands()) * p.rank * map.chunks());
}

// Those of the kernels by wgmma, whose gradients take so many of A's outputs together.
constexpr int kCoreOutputs = 64;
void add_core_bands(PrepareArguments& p, const Lattice& map, const Choice& choice, const Tensor& basis,
                    Workspace& workspace) {
  add_basis(p, map, basis);
  const int64_t ranks = ceil_div(p.rank, choice.ranks) * choice.ranks;
  p.bands = workspace.take("bands", ranks * choice.slice);
}

void check_prepare_cores(Number number, const Lattice& map, const Choice& choice, const PrepareArguments& p,
                         int outputs, cudaStream_t stream) {
  DeviceScope::check(
      prepare_cores(number, map, p, outputs, choice.ranks, choice.slice, choice.patch_width, stream),
      "prepare_cores");
}

MlpArguments mlp_arguments(const Tensor& coordinates, const std::vector<Tensor>& weights,
                           const std::vector<Tensor>& biases, int64_t activation, double slope,
                           double weight_gain, bool linear_output) {
  MlpArguments p = {};
  STD_TORCH_CHECK(!weights.empty() && weights.size() <= kMaxLayers, "weights: expected 1 to ",
                  kMaxLayers, " layers, got ", weights.size());
  expect("biases", "tensors", weights.size(), biases.size());
  expect_float("coordinates", coordinates);
  expect_room("coordinates", coordinates, 0);
  p.coordinates = static_cast<const float*>(coordinates.data_ptr());
  p.taps = static_cast<int>(coordinates.size(0));
  p.layers = static_cast<int>(weights.size());
  p.widths[0] = static_cast<int>(weights[0].size(1));
  p.windowed = coordinates.size(1) == p.widths[0] + 1;
  expect("coordinates", "columns", p.widths[0] + p.windowed, coordinates.size(1));
  for (int n = 0; n < p.layers; ++n) {
    expect_like("weights", weights[n], weights[0]);
    expect_like("biases", biases[n], weights[0]);
    expect("weights", "columns", p.widths[n], weights[n].size(1));
    p.widths[n + 1] = static_cast<int>(weights[n].size(0));
    expect_room("weights", weights[n], 0);
    expect_room("biases", biases[n], p.widths[n + 1]);
    p.weight[n] = weights[n].data_ptr();
    p.bias[n] = biases[n].data_ptr();
  }
  const int widest = *std::max_element(p.widths, p.widths + p.layers + 1);
  STD_TORCH_CHECK(widest <= kMaxWidth, "weights: expected at most ", kMaxWidth, " features, got ",
                  widest);
  STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int>(Activation::kSine),
                  "activation: expected 0 to ", static_cast<int>(Activation::kSine), ", got ",
                  activation);
  p.activation = static_cast<Activation>(activation);
  p.slope = static_cast<float>(slope);
  p.gain = static_cast<float>(weight_gain);
  p.linear_output = linear_output;
  return p;
}

// An MLP that computes the basis.
struct Generator {
  MlpArguments mlp;
  bool wide;     // its parameters are float32
  float* basis;  // written
};

// Two launches. `basis` is read, or written if there is a generator.
void convolve(const Tensor& source, const Tensor& coefficients, const Tensor& basis,
              const Generator* generator, const std::optional<Tensor>& bias, Tensor& output,
              const Tensor& workspace, const Tensor& plan, int64_t groups, bool tf32, bool aligned,
              bool transposed) {
  const auto [map, choice] = parse_plan(plan);
  const Number number = number_of(source, tf32);
  expect_like("coefficients", coefficients, source);
  expect_like("output", output, source);
  Workspace room(workspace, source);
  const Operand y = operand("output", output, map, &Axis::out_size, groups);
  ConvArguments a = {};
  a.x = operand(transposed ? "grad" : "input", source, map, &Axis::in_size, groups);
  const bool cores = choice.patch_width != 0;
  PrepareArguments p = preparation(&coefficients, groups, transposed, choice.out_tiles, room,
                                   cores ? choice.ranks : 1);
  if (cores) {
    STD_TORCH_CHECK(!generator, "basis: expected one that is there, got an MLP to compute it");
    add_core_bands(p, map, choice, basis, room);
  } else {
    add_bands(p, map, basis, room);
  }
  expect("coefficients", "channels in", a.x.channels, p.in_channels);
  expect("coefficients", "channels out", y.channels, p.out_channels);
  expect("basis", "functions", coefficients.size(2), p.rank);
  if (generator) expect("coordinates", "taps", map.taps(), generator->mlp.taps);
  if (bias) {
    expect_like("bias", *bias, source);
    expect_room("bias", *bias, output.size(1));
    a.bias = bias->data_ptr();
  }
  a.bands = p.bands;
  a.packed = p.packed;
  a.y = output.data_ptr();
  a.y_strides = y.strides;
  a.y_channels = y.channels;
  a.groups = static_cast<int>(groups);
  a.rank = p.rank;
  a.aligned = aligned;
  const DeviceScope scope(source);
  if (cores) {
    check_prepare_cores(number, map, choice, p, 16 * choice.out_tiles, scope.stream());
    DeviceScope::check(basis_conv_sm90(number, map, choice, a, scope.stream()), "basis_conv_sm90");
    return;
  }
  DeviceScope::check(
      generator ? prepare_from_mlp(number, map, p, generator->mlp, generator->wide,
                                   generator->basis, scope.stream())
                : prepare(number, map, p, scope.stream()),
      "prepare");
  DeviceScope::check(basis_conv(number, map, choice, a, scope.stream()), "basis_conv");
}

// y of x.
void basis_conv_fwd(Tensor input, Tensor coefficients, Tensor basis, std::optional<Tensor> bias,
                    Tensor output, Tensor workspace, Tensor plan,
                    int64_t groups, bool tf32, bool aligned) {
  convolve(input, coefficients, basis, nullptr, bias, output, workspace, plan, groups,
           tf32, aligned, false);
}

// The gradient of x of that of y; with a bias, a transposed convolution.
void basis_conv_bwd_input(Tensor grad, Tensor coefficients, Tensor basis, std::optional<Tensor> bias,
                          Tensor output, Tensor workspace, Tensor plan, int64_t groups, bool tf32,
                          bool aligned) {
  convolve(grad, coefficients, basis, nullptr, bias, output, workspace, plan, groups,
           tf32, aligned, true);
}

// Either of the two, of a coordinate MLP.
void hyper_conv_fwd(Tensor input, Tensor coefficients, Tensor coordinates,
                    std::vector<Tensor> weights, std::vector<Tensor> biases,
                    std::optional<Tensor> bias, Tensor output, Tensor basis, Tensor workspace,
                    int64_t activation, double slope, double weight_gain, bool linear_output,
                    Tensor plan, int64_t groups, bool transposed, bool tf32, bool aligned) {
  Generator generator;
  generator.mlp = mlp_arguments(coordinates, weights, biases, activation, slope, weight_gain,
                                linear_output);
  generator.wide = weights[0].scalar_type() == ScalarType::Float;
  if (!generator.wide) expect_like("weights", weights[0], input);
  const int features = generator.mlp.widths[generator.mlp.layers];
  STD_TORCH_CHECK(basis.size(0) == features || basis.size(0) == features + 1,
                  "basis: expected ", features, " functions or one more, got ", basis.size(0));
  expect_float("basis", basis);
  generator.basis = static_cast<float*>(basis.data_ptr());
  convolve(input, coefficients, basis, &generator, bias, output, workspace, plan, groups, tf32,
           aligned, transposed);
}

void basis_conv_bwd_coeff(Tensor grad, Tensor input, Tensor basis, Tensor partial, Tensor workspace,
                          Tensor plan, int64_t groups, int64_t splits,
                          bool atomic, bool tf32, bool aligned) {
  const auto [map, choice] = parse_plan(plan);
  const Number number = number_of(input, tf32);
  expect_like("grad", grad, input);
  expect_float("partial", partial);
  CoefficientArguments a = {};
  a.g = operand("grad", grad, map, &Axis::out_size, groups);
  a.x = operand("input", input, map, &Axis::in_size, groups);
  Workspace room(workspace, input);
  PrepareArguments p = preparation(nullptr, groups, false, 1, room);
  const bool cores = choice.patch_width != 0;
  if (cores) {
    add_core_bands(p, map, choice, basis, room);
  } else {
    add_bands(p, map, basis, room);
    p.transposed_bands = true;
  }
  a.bands = p.bands;
  a.scales = scales(number, p, room);
  a.groups = static_cast<int>(groups);
  a.rank = p.rank;
  a.splits = static_cast<int>(splits);
  a.atomic = atomic;
  a.aligned = aligned;
  expect_room("partial", partial, (atomic ? 1 : splits) * grad.size(1) * a.x.channels * a.rank);
  a.partial = static_cast<float*>(partial.data_ptr());
  const DeviceScope scope(input);
  if (cores) {
    check_prepare_cores(number, map, choice, p, kCoreOutputs, scope.stream());
    DeviceScope::check(coefficient_gradient_sm90(number, map, choice, a, scope.stream()),
                       "coefficient_gradient_sm90");
    return;
  }
  DeviceScope::check(prepare(number, map, p, scope.stream()), "prepare");
  DeviceScope::check(coefficient_gradient(number, map, choice, a, scope.stream()),
                     "coefficient_gradient");
}

void basis_conv_bwd_basis(Tensor grad, Tensor input, Tensor coefficients,
                          std::optional<Tensor> norms, Tensor partial, Tensor workspace, Tensor plan,
                          int64_t groups, int64_t splits, int64_t pieces, bool atomic, bool tf32, bool aligned) {
  const auto [map, choice] = parse_plan(plan);
  const Number number = number_of(input, tf32);
  expect_like("grad", grad, input);
  expect_like("coefficients", coefficients, input);
  expect_float("partial", partial);
  BasisArguments a = {};
  a.g = operand("grad", grad, map, &Axis::out_size, groups);
  a.x = operand("input", input, map, &Axis::in_size, groups);
  Workspace room(workspace, input);
  const bool cores = choice.patch_width != 0;
  PrepareArguments p = preparation(&coefficients, groups, true, 1, room, cores ? choice.ranks : 1);
  a.scales = scales(number, p, room);
  if (a.scales) {
    STD_TORCH_CHECK(norms.has_value(), "norms: expected the sums of float16 coefficients, got None");
    expect_float("norms", *norms);
    p.norm_rows = static_cast<int>(groups * a.x.channels);
    expect_room("norms", *norms, static_cast<int64_t>(p.norm_rows) * p.rank);
    p.norms = static_cast<const float*>(norms->data_ptr());
  }
  expect("coefficients", "channels in", a.x.channels, p.out_channels);
  expect("coefficients", "channels out", a.g.channels, p.in_channels);
  expect("partial", "pieces",
         cores ? basis_gradient_sm90_pieces(choice, a.x.channels, a.g.channels) : basis_gradient_pieces(map),
         pieces);
  expect_room("partial", partial, (atomic ? 1 : splits * pieces) * p.rank * map.taps());
  a.packed = p.packed;
  a.partial = static_cast<float*>(partial.data_ptr());
  a.groups = static_cast<int>(groups);
  a.rank = p.rank;
  a.splits = static_cast<int>(splits);
  a.atomic = atomic;
  a.aligned = aligned;
  const DeviceScope scope(input);
  if (cores) {
    check_prepare_cores(number, map, choice, p, kCoreOutputs, scope.stream());
    DeviceScope::check(basis_gradient_sm90(number, map, choice, a, scope.stream()), "basis_gradient_sm90");
    return;
  }
  DeviceScope::check(prepare(number, map, p, scope.stream()), "prepare");
  DeviceScope::check(basis_gradient(number, map, choice, a, scope.stream()), "basis_gradient");
}

// The gradients of a layer's input and of A together, `transposed` as hyper_conv_fwd has it.
void basis_conv_bwd(Tensor grad, Tensor input, Tensor coefficients, Tensor basis, Tensor output, Tensor partial,
                    Tensor workspace, Tensor plan, int64_t groups, int64_t splits, bool transposed, bool atomic,
                    bool tf32, bool aligned) {
  const auto [map, choice] = parse_plan(plan);
  const Number number = number_of(input, tf32);
  expect_like("grad", grad, input);
  expect_like("coefficients", coefficients, input);
  expect_like("output", output, input);
  expect_float("partial", partial);
  Workspace room(workspace, input);
  const Operand dx = operand("output", output, map, &Axis::out_size, groups);
  JointArguments a = {};
  a.g = operand("grad", grad, map, &Axis::in_size, groups);
  a.x = operand("input", input, map, &Axis::out_size, groups);
  PrepareArguments p = preparation(&coefficients, groups, transposed, choice.out_tiles, room, choice.ranks);
  add_core_bands(p, map, choice, basis, room);
  expect("coefficients", "channels in", a.g.channels, p.in_channels);
  expect("coefficients", "channels out", dx.channels, p.out_channels);
  expect("input", "channels", dx.channels, a.x.channels);
  expect("basis", "functions", coefficients.size(2), p.rank);
  a.bands = p.bands;
  a.packed = p.packed;
  a.scales = scales(number, p, room);
  a.dx = output.data_ptr();
  a.dx_strides = dx.strides;
  a.dx_channels = dx.channels;
  a.groups = static_cast<int>(groups);
  a.rank = p.rank;
  a.splits = static_cast<int>(splits);
  a.atomic = atomic;
  a.aligned = aligned;
  expect_room("partial", partial, (atomic ? 1 : splits) * coefficients.numel());
  a.partial = static_cast<float*>(partial.data_ptr());
  const DeviceScope scope(input);
  check_prepare_cores(number, map, choice, p, kCoreOutputs, scope.stream());
  DeviceScope::check(joint_gradient_sm90(number, map, choice, a, scope.stream()), "joint_gradient_sm90");
}

void coordinate_mlp_fwd(Tensor coordinates, std::vector<Tensor> weights, std::vector<Tensor> biases,
                        Tensor basis, int64_t activation, double slope, double weight_gain,
                        bool linear_output, bool constant) {
  const MlpArguments p = mlp_arguments(coordinates, weights, biases, activation, slope, weight_gain,
                                       linear_output);
  expect_float("basis", basis);
  expect_room("basis", basis, static_cast<int64_t>(p.widths[p.layers] + constant) * p.taps);
  const DeviceScope scope(coordinates);
  DeviceScope::check(coordinate_mlp(number_of(weights[0], false), p,
                                    static_cast<float*>(basis.data_ptr()), constant, scope.stream()),
                     "coordinate_mlp");
}

void coordinate_mlp_bwd(Tensor grad, Tensor coordinates, std::vector<Tensor> weights,
                        std::vector<Tensor> biases, std::vector<Tensor> weight_gradients,
                        std::vector<Tensor> bias_gradients, int64_t activation, double slope,
                        double weight_gain, bool linear_output) {
  const MlpArguments p = mlp_arguments(coordinates, weights, biases, activation, slope, weight_gain,
                                       linear_output);
  expect_float("grad", grad);
  expect_room("grad", grad, static_cast<int64_t>(p.widths[p.layers]) * p.taps);
  expect("weight_gradients", "tensors", p.layers, weight_gradients.size());
  expect("bias_gradients", "tensors", p.layers, bias_gradients.size());
  MlpGradients sums = {};
  for (int n = 0; n < p.layers; ++n) {
    expect_like("weight_gradients", weight_gradients[n], weights[n]);
    expect_like("bias_gradients", bias_gradients[n], biases[n]);
    expect_room("weight_gradients", weight_gradients[n], weights[n].numel());
    expect_room("bias_gradients", bias_gradients[n], biases[n].numel());
    sums.weight[n] = weight_gradients[n].data_ptr();
    sums.bias[n] = bias_gradients[n].data_ptr();
  }
  const DeviceScope scope(coordinates);
  DeviceScope::check(coordinate_mlp_backward(number_of(weights[0], false), p,
                                             static_cast<const float*>(grad.data_ptr()), sums,
                                             scope.stream()),
                     "coordinate_mlp_backward");
}

}  // namespace
}  // namespace hyperconv

STABLE_TORCH_LIBRARY_IMPL(hyperconv_ext_cuda, HYPERCONV_DISPATCH_KEY, m) {
  m.impl("basis_conv_fwd", TORCH_BOX(&hyperconv::basis_conv_fwd));
  m.impl("basis_conv_bwd_input", TORCH_BOX(&hyperconv::basis_conv_bwd_input));
  m.impl("hyper_conv_fwd", TORCH_BOX(&hyperconv::hyper_conv_fwd));
  m.impl("basis_conv_bwd_coeff", TORCH_BOX(&hyperconv::basis_conv_bwd_coeff));
  m.impl("basis_conv_bwd_basis", TORCH_BOX(&hyperconv::basis_conv_bwd_basis));
  m.impl("basis_conv_bwd", TORCH_BOX(&hyperconv::basis_conv_bwd));
  m.impl("coordinate_mlp_fwd", TORCH_BOX(&hyperconv::coordinate_mlp_fwd));
  m.impl("coordinate_mlp_bwd", TORCH_BOX(&hyperconv::coordinate_mlp_bwd));
}
