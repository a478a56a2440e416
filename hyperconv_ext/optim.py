"""What an optimizer should treat differently."""

from __future__ import annotations

from typing import Any

from torch import nn

from .hypernet import TapBatchNorm
from .modules import HyperConvNd


def parameter_groups(model: nn.Module, weight_decay: float = 1e-2) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: which parameters weight decay should reach.

    Decayed are the coefficients of every hyper-convolution, to which W is proportional, and the weights
    of other layers. Not decayed are

    - all parameters of a hyper-network (`hypernet.*`): they shape the basis functions, and decay would
      flatten every kernel towards a box filter instead of making it small,
    - those of a norm over taps (`weight_norm.*`),
    - biases and the parameters of other norms, that is whatever has fewer than two axes.

    Parameters that need no gradient are left out; one that several modules share comes once, without
    decay if any of them asks for it.

    Args:
        model: any module, with hyper-convolutions in it or not.
        weight_decay: of the decayed group.

    Returns:
        `[{"params": ..., "weight_decay": weight_decay}, {"params": ..., "weight_decay": 0.0}]`, for
        example for `torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-3)`; a group without
        parameters is left out.
    """
    shaping: set[int] = set()
    for module in model.modules():
        kept: list[nn.Module] = [module] if isinstance(module, TapBatchNorm) else []
        if isinstance(module, HyperConvNd):
            kept.append(module.hypernet)
        shaping.update(id(parameter) for part in kept for parameter in part.parameters())
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            alone = parameter.dim() < 2 or id(parameter) in shaping
            (others if alone else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
