"""What `torch.compile` is told of this package, at no cost to those who do not use it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch._guards import TracingContext

P = ParamSpec("P")
T = TypeVar("T")


class _Hook(MetaPathFinder):
    """Calls back once `name` has been imported."""

    def __init__(self, name: str, callback: Callable[[], Any]) -> None:
        self.name, self.callback = name, callback

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_call_back(module: ModuleType) -> None:
            execute(module)
            self.callback()

        spec.loader.exec_module = execute_then_call_back  # type: ignore[method-assign]
        return spec


def when_imported(name: str, callback: Callable[[], Any]) -> None:
    """Call back when the module `name` is imported; at once if it has been.

    For what is registered with parts of PyTorch that take long to import and that few need.
    """
    if name in sys.modules:
        callback()
    else:
        sys.meta_path.insert(0, _Hook(name, callback))


def untraced(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, never compiled by Dynamo, nor what it calls: it plans and launches.

    Dynamo sees every Python frame while code that it has compiled or given up on runs, also those of an
    operator's kernel. `torch.compiler.disable` would do the same, at seconds of imports.
    """
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    return function


def in_graph(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, which Dynamo puts into its graph as one call and does not look into.

    What calls the graph's nodes with tensors that hold no numbers, to differentiate and to lower them,
    runs it as Python, which takes a small part of the time that Dynamo takes to interpret its checks and
    choices. So it must depend on nothing but its arguments, which are tensors, numbers and names, and on
    what Dynamo guards anyway: grad mode, autocast, the switches of determinism.
    """
    when_imported("torch._dynamo", lambda: sys.modules["torch._dynamo"].allow_in_graph(function))
    return function


def compiling() -> bool:
    """Whether `torch.compile` makes a graph: Dynamo, or who calls the nodes of what it has made."""
    return torch.compiler.is_compiling() or TracingContext.try_get() is not None
