"""Autograd functions, and where the transforms of `torch.func` are with what is being called."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

# Excluded once the innermost transform has seen what is called.
_WAITING = torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode


def in_rule() -> bool:
    """Whether a transform has had its turn and calls an operator's autograd rule at its own level."""
    active = torch._C._are_functorch_transforms_active()
    return active and torch._C._dispatch_tls_is_dispatch_key_excluded(_WAITING)


class Function(torch.autograd.Function):
    """An autograd function whose `apply` does not look its signature up at every call.

    torch.autograd.Function binds default arguments by `inspect.signature`, which takes longer than all
    else that a launch does on the host. There are none here.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """The function of `args`, recorded."""
        if not torch._C._are_functorch_transforms_active():
            return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]
        if not in_rule():
            return super().apply(*args)
        with enable_single_level_autograd_function():
            return _at_one_level(cls).apply(*args)


@cache
def _at_one_level(function: type[Function]) -> Any:
    """`function`, of the class whose `apply` asks no transform, as Function's does since torch 2.14."""
    rules = ("forward", "setup_context", "backward", "jvp")
    namespace = {name: staticmethod(getattr(function, name)) for name in rules}
    return type(function.__name__, (_SingleLevelFunction,), namespace)
