"""Powers of two by which the two factors of a sum are scaled, one against the other, in float16.

z = phi * x and u = A'g are rounded to float16 on chip, whose largest number is 65504, before the product
that makes y or a gradient of them, and could overflow (or underflow) where that does not. So phi_r is
divided by a power of two just above sum_k |phi_r(k)|, whence |z_r| <= max |x|, and A_r multiplied by it;
for u, A_r is divided by one above its sums over the outputs, and the gradient's float32 sums multiplied.
All of that is exact. What must not exceed the range of float16 is |A_r| sum_k |phi_r(k)|, the weights'.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scale_norms(coefficients: Tensor, groups: int) -> Tensor:
    """sum_o |A[o, i, r]| over each group's outputs, float32 `[groups, C_in/groups, R]`: one launch."""
    by_group = coefficients.unflatten(0, (groups, -1))
    return torch.linalg.vector_norm(by_group, 1, 1, dtype=torch.float32)
