"""What a layer asks at every step is worked out at the first."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def memoize(function: Callable[P, T]) -> Callable[P, T]:
    """A function of sizes and names whose results are kept.

    Not for arguments that cannot be compared (lists, symbolic sizes), and not while `torch.compile`
    traces, which has its own guards.
    """
    cached = lru_cache(maxsize=4096, typed=True)(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.compiler.is_compiling():
            try:
                return cached(*args, **kwargs)  # type: ignore[arg-type]
            except TypeError:  # unhashable; or the function's own, which is raised again below
                pass
        return function(*args, **kwargs)

    return call
