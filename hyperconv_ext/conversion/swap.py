"""A module that becomes another one and stays the same object."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from ..modules import HyperConv1d

_HOOKS = [name for name, value in vars(nn.Module()).items() if "_hooks" in name and value == {}]
# Of calls, and of the module itself: `Module.compile` has kept what it calls.
_KEPT = ("_is_full_backward_hook", "_compiled_call_impl")


@cache
def _fresh() -> tuple[nn.Module, ...]:
    """Layers as they are made: what a layer has beyond them, somebody has given it."""
    norm = nn.BatchNorm1d(1, device="meta")
    return nn.Conv1d(1, 1, 1, device="meta"), HyperConv1d(1, 1, 2, device="meta"), norm


def become(module: nn.Module, other: nn.Module) -> None:
    """Turn `module` into what `other` is: its class, parameters, children and settings.

    Whoever holds `module`, by an attribute, in a list or in a closure, goes on holding it. It keeps its
    hooks and their handles, and the attributes that are not its class's own; `other` is used up.
    """
    state = vars(other)
    own = _own_hooks()
    for name in _HOOKS:
        hooks = vars(module)[name]
        for key in [key for key, hook in hooks.items() if hook in own]:
            del hooks[key]
        hooks.update(state[name])
        state[name] = hooks  # the same dictionary, which handles remember
    state |= {name: vars(module)[name] for name in _KEPT if name in vars(module)}
    usual = {name for layer in _fresh() for name in vars(layer)}
    for name, value in vars(module).items():
        if name not in usual and not hasattr(type(module), name):
            state.setdefault(name, value)
    for part in other.modules():
        for name, value in vars(part).items():
            if value is other:  # a child that knows its layer
                vars(part)[name] = module
    vars(module).clear()
    vars(module).update(state)
    object.__setattr__(module, "__class__", type(other))


def _own_hooks() -> list[Any]:
    """The hooks that layers make for themselves."""
    return [hook for layer in _fresh() for name in _HOOKS for hook in vars(layer)[name].values()]


def has_state_dict_hooks(module: nn.Module) -> bool:
    """Whether somebody has hooked how the module's state is saved or loaded."""
    return any(
        hook not in _own_hooks()
        for name in _HOOKS
        if "state_dict" in name
        for hook in vars(module)[name].values()
    )
