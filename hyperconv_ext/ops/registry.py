"""The operator libraries, and what every operator's autograd rule needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..backends.cuda import schemas

_library = torch.library.Library("hyperconv_ext", "DEF")
_launches = torch.library.Library(schemas.NAMESPACE, "DEF")
for _schema in schemas.SCHEMAS:
    _launches.define(_schema)


def register(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], autograd: Callable[..., Any]
) -> None:
    """Define `hyperconv_ext::schema`: one kernel for every device, its fake and its autograd rule."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    _library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"hyperconv_ext::{name}", fake, lib=_library)


class Function(torch.autograd.Function):
    """An autograd function whose `apply` does not look its signature up at every call.

    torch.autograd.Function binds default arguments by `inspect.signature`, which takes longer than all
    else that a launch does on the host. There are none here.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """The function of `args`, recorded."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def transforming() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def unwatched(tensors: Sequence[Tensor]) -> bool:
    """Whether nobody could tell an operator from the function behind it: no mode, no tensor subclass.

    Then the function is called, since the dispatcher takes about as long as all the rest on the host.
    """
    return (
        not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and _PLAIN.issuperset(map(type, tensors))
    )


def one_by_one(
    function: type[Function], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[Tensor, int]:
    """`vmap` as one call per example: right for every transform, no faster than a loop."""

    def example(index: int) -> list[Any]:
        pairs = zip(args, in_dims, strict=True)
        return [arg if dim is None else arg.select(dim, index) for arg, dim in pairs]

    return torch.stack([function.apply(*example(i)) for i in range(info.batch_size)]), 0


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off, on devices that have it."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def for_autocast(tensor: Tensor) -> Tensor:
    """`tensor` in autocast's dtype where autocast is on, as it does for `F.convNd`."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))
