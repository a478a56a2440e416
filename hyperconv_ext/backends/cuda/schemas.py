"""Schemas of the shared library's operators: csrc/library.cpp implements them, `ops` registers them."""

_LAUNCH = "Tensor plan, int groups"
_MODE = "bool tf32, bool aligned"
_MLP = "int activation, float slope, float weight_gain, bool linear_output"

NAMESPACE = "hyperconv_ext_cuda"
SCHEMAS = (
    "basis_conv_fwd(Tensor input, Tensor coefficients, Tensor basis, Tensor? bias, Tensor(a!) output, "
    f"Tensor(b!) workspace, {_LAUNCH}, {_MODE}) -> ()",
    "basis_conv_bwd_input(Tensor grad, Tensor coefficients, Tensor basis, Tensor? bias, "
    f"Tensor(a!) output, Tensor(b!) workspace, {_LAUNCH}, {_MODE}) -> ()",
    "hyper_conv_fwd(Tensor input, Tensor coefficients, Tensor coordinates, Tensor[] weights, "
    "Tensor[] biases, Tensor? bias, Tensor(a!) output, Tensor(b!) basis, "
    f"Tensor(c!) workspace, {_MLP}, {_LAUNCH}, bool transposed, {_MODE}) -> ()",
    "basis_conv_bwd_coeff(Tensor grad, Tensor input, Tensor basis, Tensor(a!) partial, "
    f"Tensor(b!) workspace, {_LAUNCH}, int splits, bool atomic, {_MODE}) -> ()",
    "basis_conv_bwd_basis(Tensor grad, Tensor input, Tensor coefficients, Tensor? norms, "
    f"Tensor(a!) partial, Tensor(b!) workspace, {_LAUNCH}, int splits, int pieces, bool atomic, "
    f"{_MODE}) -> ()",
    "basis_conv_bwd(Tensor grad, Tensor input, Tensor coefficients, Tensor basis, Tensor(a!) output, "
    f"Tensor(b!) partial, Tensor(c!) workspace, {_LAUNCH}, int splits, bool transposed, bool atomic, "
    f"{_MODE}) -> ()",
    "coordinate_mlp_fwd(Tensor coordinates, Tensor[] weights, Tensor[] biases, Tensor(a!) basis, "
    f"{_MLP}, bool constant) -> ()",
    "coordinate_mlp_bwd(Tensor grad, Tensor coordinates, Tensor[] weights, Tensor[] biases, "
    f"Tensor(a!)[] weight_gradients, Tensor(b!)[] bias_gradients, {_MLP}) -> ()",
)
