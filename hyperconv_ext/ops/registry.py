"""The operator libraries, and what every operator's rules need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..backends.cuda import schemas
from ..compilation import untraced

_library = torch.library.Library("hyperconv_ext", "DEF")
_launches = torch.library.Library(schemas.NAMESPACE, "DEF")
for _schema in schemas.SCHEMAS:
    _launches.define(_schema)


def register(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], autograd: Callable[..., Any]
) -> None:
    """Define `hyperconv_ext::schema`: one kernel for every device, its fake, autograd and vmap rules."""
    name = schema.partition("(")[0]
    qualified = f"hyperconv_ext::{name}"
    # Inductor would copy operands whose layout it has changed back to that of the traced ones.
    _library.define(schema, tags=(torch.Tag.flexible_layout,))
    _library.impl(name, untraced(kernel), "CompositeExplicitAutograd")
    _library.impl(name, autograd, "Autograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    operator = getattr(torch.ops.hyperconv_ext, name)
    torch.library.register_vmap(qualified, partial(vmap_by_loop, operator), lib=_library)


def transforming() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_is_neg, _data_ptr = Tensor.is_neg, Tensor.data_ptr


def can_skip_dispatch(tensors: Sequence[Tensor]) -> bool:
    """Whether an operator's kernel may be called without the dispatcher, which would add nothing.

    The dispatcher takes about as long as all the rest on the host. It is needed where a mode watches and
    for tensors whose memory is not all there is to them: subclasses, lazy negation, and those without
    memory of their own (empty, meta, symbolic zeros; batched or wrapped by a transform, which refuse).
    """
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or not _PLAIN.issuperset(map(type, tensors))
        or any(map(_is_neg, tensors))
    ):
        return False
    try:
        return all(map(_data_ptr, tensors))
    except RuntimeError:
        return False


def vmap_by_loop(
    function: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Any, Any]:
    """`vmap` as one call per example: right for every transform, no faster than a loop.

    `in_dims` mirrors `args`, lists of tensors included. Of no examples the result has the shape that one
    would have.
    """
    leaves, spec = pytree.tree_flatten(args)
    dims = pytree._broadcast_to_and_flatten(in_dims, spec, is_leaf=lambda dim: dim is None)
    assert dims is not None

    def example(index: int) -> Any:
        pairs = zip(leaves, dims, strict=True)
        return function(*pytree.tree_unflatten([_of_example(*pair, index) for pair in pairs], spec))

    def _of_example(leaf: Any, dim: int | None, index: int) -> Any:
        if dim is None or not isinstance(leaf, Tensor):
            return leaf
        return leaf.select(dim, index) if info.batch_size else leaf.sum(dim)

    results = [pytree.tree_flatten(example(index)) for index in range(max(info.batch_size, 1))]
    columns = zip(*(values for values, _ in results), strict=True)
    stacked = [torch.stack(column)[: info.batch_size] for column in columns]
    output_spec = results[0][1]
    output = pytree.tree_unflatten(stacked, output_spec)
    return output, pytree.tree_unflatten([0] * len(stacked), output_spec)


_operators_kept = False


@contextmanager
def keep_operators() -> Iterator[None]:
    """In its body `torch.export` and `torch.jit.trace` record the fused operators as they are.

    Without it a program holds PyTorch's own operators alone (W is built, then convolved), so that it can
    be loaded, converted and compiled where this package is not installed. With it, it calls
    `torch.ops.hyperconv_ext` and needs the package to be imported, and (of a trace) the sizes of the
    inputs to stay what they were.
    """
    global _operators_kept  # noqa: PLW0603
    before, _operators_kept = _operators_kept, True
    try:
        yield
    finally:
        _operators_kept = before


def exporting() -> bool:
    """Whether a program is being recorded that must not need this package."""
    # Not is_exporting(), which the Dynamo of torch 2.10 and 2.11 takes for true in torch.compile.
    recording = torch.compiler._is_exporting_flag or torch.jit.is_tracing()
    return recording and not _operators_kept
