"""W as users read it: a tensor like any other, except that writing to it is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import get_default_nowrap_functions

REMEDY = (
    "draw the layer anew with reset_parameters(), or write to its parameters: coefficients and those of "
    "hypernet"
)
_HOOKS = {
    "register_hook",
    "register_post_accumulate_grad_hook",
    "retain_grad",
    "rename_",
}
_TENSOR: Any = Tensor  # its properties, as descriptors
_DETACHED = (_TENSOR.detach, _TENSOR.data.__get__)
_GRAD = (_TENSOR.grad.__get__, _TENSOR.grad.__set__, _TENSOR.grad.__delete__)
_ARRAYS = (Tensor.numpy, Tensor.__array__)
_TEXT = (Tensor.__repr__, Tensor.__format__)


class ReadOnlyWeightError(RuntimeError):
    """W was written to, which would change nothing: the next access computes it again."""


class ComputedWeight(Tensor):
    """W = A phi, computed at this access; and views of it.

    Operations give plain tensors. What would write to W, its gradient, its hooks or its `requires_grad`
    raises `ReadOnlyWeightError`; a copy (`clone()`, or `nn.Parameter(weight.detach())`) is the caller's.
    """

    _is_snapshot = False  # detached, and so possibly on its way to a parameter of something else

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """`func`, if it does not write to W."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        _refuse_writes(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if func in _TEXT:
                return func(args[0].as_subclass(Tensor), *args[1:], **kwargs)
            result = func(*args, **kwargs)
            if func in _ARRAYS and result.base is not None:
                result.setflags(write=False)
            return result if func in _QUERIES else _protected(result, func, args, kwargs)

    def __iter__(self) -> Iterator[Tensor]:
        """Over the first axis, each a view that is as protected."""
        return iter(self.unbind(0))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A plain tensor of its own."""
        with torch._C.DisableTorchFunctionSubclass():
            return memo.setdefault(id(self), self.detach().clone().as_subclass(Tensor))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A plain tensor, when pickled or saved."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        """What `nn.Parameter(tensor)` says to a tensor of a subclass: it is one like any other now."""
        if value:
            self.__class__ = nn.Parameter  # type: ignore[assignment]


_QUERIES = get_default_nowrap_functions()


def read_only(weight: Tensor) -> Tensor:
    """`weight` as a `ComputedWeight`; as it is where someone traces or transforms what is done to it."""
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or type(weight) is not Tensor
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    ):
        return weight
    return weight.as_subclass(ComputedWeight)


def _is_protected(value: Any) -> bool:
    """Whether writing to `value` must be refused: not to a leaf that someone has made of a snapshot."""
    if not isinstance(value, ComputedWeight):
        return False
    with torch._C.DisableTorchFunctionSubclass():
        return not (value._is_snapshot and value.requires_grad)


def _some(values: Any) -> bool:
    """Whether `values`, or one of them, is protected."""
    if isinstance(values, (list, tuple)):
        return any(map(_some, values))
    return _is_protected(values)


def _refuse_writes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    name = getattr(func, "__name__", "")
    first = args[0] if args else next(iter(kwargs.values()), None)
    written: Any = ()
    if name in ("__set__", "__delete__") or func in _GRAD or name in _HOOKS:
        written = first
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        name = attribute or name
    elif name == "requires_grad_" and isinstance(first, ComputedWeight) and first._is_snapshot:
        return
    elif _writes_to_first(name) or kwargs.get("inplace"):
        written = first
    if _some(written) or _some(kwargs.get("out")):
        raise ReadOnlyWeightError(
            f"weight: expected to be read only, as W is computed from the layer's parameters at every "
            f"access, got {name!r}, which would change nothing; {REMEDY}"
        )


def _writes_to_first(name: str) -> bool:
    if name == "__setitem__" or (name.startswith("__i") and name[3:-2] in _IN_PLACE):
        return True
    return name.endswith("_") and not name.endswith("__")


_IN_PLACE = {
    "add",
    "sub",
    "mul",
    "truediv",
    "div",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
    "matmul",
}


def _protected(
    result: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`result`, with what shares W's memory as read only as W is."""
    if isinstance(result, (list, tuple)) and any(isinstance(r, Tensor) for r in result):
        parts = [_protected(r, func, args, kwargs) for r in result]
        return type(result)(parts) if type(result) in (list, tuple) else result
    if not isinstance(result, Tensor) or isinstance(result, ComputedWeight):
        return result
    sources = [value for value in (*args, *kwargs.values()) if _is_protected(value)]
    if not any(_shares_memory(result, source) for source in sources):
        return result
    view = result.as_subclass(ComputedWeight)
    view._is_snapshot = func in _DETACHED or any(source._is_snapshot for source in sources)
    return view


def _shares_memory(result: Tensor, source: Tensor) -> bool:
    return type(result) is Tensor and torch._C._is_alias_of(result, source)  # type: ignore[attr-defined]
