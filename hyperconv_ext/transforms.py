"""Where the transforms of `torch.func` are with what is being called."""

from __future__ import annotations

import torch

# Excluded once the innermost transform has seen what is called.
_WAITING = torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode


def in_rule() -> bool:
    """Whether a transform has had its turn and calls an operator's autograd rule at its own level."""
    active = torch._C._are_functorch_transforms_active()
    return active and torch._C._dispatch_tls_is_dispatch_key_excluded(_WAITING)
