"""Schemas of the shared library's operators: csrc/library.cpp implements them, `ops` registers them."""

_LAUNCH = "int[] lattice, int[] choice, int groups"
_MODE = "bool tf32, bool aligned"

NAMESPACE = "hyperconv_ext_cuda"
SCHEMAS = (
    "basis_conv_fwd(Tensor input, Tensor coefficients, Tensor basis, Tensor? bias, Tensor(a!) output, "
    f"Tensor(b!) bands, Tensor(c!) packed, {_LAUNCH}, {_MODE}) -> ()",
    "basis_conv_bwd_input(Tensor grad, Tensor coefficients, Tensor basis, Tensor? bias, "
    f"Tensor(a!) output, Tensor(b!) bands, Tensor(c!) packed, {_LAUNCH}, {_MODE}) -> ()",
    "basis_conv_bwd_coeff(Tensor grad, Tensor input, Tensor basis, Tensor(a!) partial, "
    f"Tensor(b!) bands, {_LAUNCH}, int splits, bool atomic, {_MODE}) -> ()",
    "basis_conv_bwd_basis(Tensor grad, Tensor input, Tensor coefficients, Tensor(a!) partial, "
    f"Tensor(b!) packed, {_LAUNCH}, int splits, int pieces, {_MODE}) -> ()",
    "coordinate_mlp_fwd(Tensor coordinates, Tensor[] weights, Tensor[] biases, Tensor(a!) basis, "
    "int activation, float slope, bool constant) -> ()",
    "coordinate_mlp_bwd(Tensor grad, Tensor coordinates, Tensor[] weights, Tensor[] biases, "
    "Tensor(a!)[] weight_gradients, Tensor(b!)[] bias_gradients, int activation, float slope) -> ()",
)
