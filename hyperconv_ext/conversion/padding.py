"""Convolutions that pad their input at run time, and how to tell that a subclass does nothing else."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..modules import HyperConv1d, HyperConv2d, HyperConv3d
from ..modules.tracing import call_in_trace

_ATEN = torch.ops.aten
Pads = tuple[tuple[int, int], ...]  # (before, after) of each axis


def same_pads(
    size: list[int], kernel_size: list[int], stride: list[int], dilation: list[int]
) -> list[int]:
    """The zeros around each axis, as `F.pad` takes them, that make ceil(size / stride) outputs.

    The odd one goes behind: 'SAME' in TensorFlow's words. All arguments have one integer per axis.
    """
    pads: list[int] = []
    for axis in range(len(size) - 1, -1, -1):
        outputs = (size[axis] + stride[axis] - 1) // stride[axis]
        reach = dilation[axis] * (kernel_size[axis] - 1) + 1
        total = max((outputs - 1) * stride[axis] + reach - size[axis], 0)
        pads += [total // 2, total - total // 2]
    return pads


@fx.wrap  # one node: its arithmetic depends on the input's size
def pad_input(
    input: Tensor,
    fixed: list[int] | None,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
) -> Tensor:
    """`input` with zeros around it: `fixed`, as `F.pad` takes them, or for None `same_pads`.

    Args:
        input: `[..., *S]`.
    """
    if fixed is not None:
        return F.pad(input, fixed)
    size = input.shape[-len(kernel_size) :]
    return F.pad(input, same_pads(size, kernel_size, stride, dilation))  # type: ignore[arg-type]


class PadsInput(nn.Module):
    """Mixed into a convolution: `forward` pads the input with zeros first, see `pad_input`.

    Attributes:
        input_padding: the zeros around each axis as `F.pad` takes them, last axis first; None: as many
            as make ceil(size / stride) outputs.
    """

    input_padding: list[int] | None

    def extra_repr(self) -> str:
        """The convolution's, and the padding."""
        return f"{super().extra_repr()}, input_padding={self.input_padding or 'same'}"


class _PaddedHyperConv(PadsInput):
    def _surrounded(self, input: Tensor) -> Tensor:
        layer: Any = self
        return pad_input(input, self.input_padding, layer.kernel_size, layer.stride, layer.dilation)

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of the padded `input`."""
        if isinstance(input, fx.Proxy):
            return call_in_trace(self, input)
        return super().forward(self._surrounded(input))

    def geometry(self, input: Tensor) -> Any:
        """The convolution's, of the padded `input`."""
        return super().geometry(self._surrounded(input))  # type: ignore[misc]


class _PaddedConv(PadsInput):
    kernel_size: Any
    stride: Any
    dilation: Any
    _conv_forward: Any

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of the padded `input`."""
        # Spelled out, as torch.jit.script wants it
        padded = pad_input(input, self.input_padding, self.kernel_size, self.stride, self.dilation)
        return self._conv_forward(padded, self.weight, self.bias)


class PaddedHyperConv1d(_PaddedHyperConv, HyperConv1d):
    """`HyperConv1d` that pads its input at run time."""


class PaddedHyperConv2d(_PaddedHyperConv, HyperConv2d):
    """`HyperConv2d` that pads its input at run time."""


class PaddedHyperConv3d(_PaddedHyperConv, HyperConv3d):
    """`HyperConv3d` that pads its input at run time."""


class PaddedConv1d(_PaddedConv, nn.Conv1d):
    """`nn.Conv1d` that pads its input at run time."""


class PaddedConv2d(_PaddedConv, nn.Conv2d):
    """`nn.Conv2d` that pads its input at run time."""


class PaddedConv3d(_PaddedConv, nn.Conv3d):
    """`nn.Conv3d` that pads its input at run time."""


class Observed(NamedTuple):
    """What a subclass of nn.ConvNd was seen to compute: one convolution of its zero-padded input."""

    pads: Pads | None  # None: 'SAME', which depends on the size of the input
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class _Seen(NamedTuple):
    pads: Pads
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class _Recorder(TorchDispatchMode):
    """The operators that run, if they are paddings by zeros and then one convolution by `weight`."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.value: Any = input
        self.weight, self.bias = weight, bias
        self.pads = [(0, 0)] * (input.dim() - 2)
        self.seen: _Seen | None = None
        self.understood = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        follows = self.seen is None and bool(args) and args[0] is self.value and not kwargs
        if follows and func is _ATEN.constant_pad_nd.default and not any(args[2:]):
            self._add(list(zip(args[1][::2], args[1][1::2], strict=True))[::-1])
        elif follows and func is _ATEN.convolution.default:
            self._convolve(*args)
        else:
            self.understood = False
        self.value = result
        return result

    def _add(self, pads: list[tuple[int, int]]) -> None:
        pads = [(0, 0)] * (len(self.pads) - len(pads)) + pads
        self.understood &= len(pads) == len(self.pads)  # else it pads channels, too
        self.pads = [(a + c, b + d) for (a, b), (c, d) in zip(self.pads, pads, strict=False)]

    def _convolve(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        output_padding: list[int],
        groups: int,
    ) -> None:
        self.understood &= weight is self.weight and bias is self.bias and not transposed
        self._add([(p, p) for p in padding])
        self.seen = _Seen(tuple(self.pads), tuple(stride), tuple(dilation), groups)


def observe(conv: Any) -> Observed | None:
    """What the class of `conv` computes, watched on inputs without numbers; None: something else.

    It is called in both modes, on inputs of many sizes, one of them enormous: what depends on the size
    otherwise than by padding, or keeps something from call to call, is something else.

    Args:
        conv: of a subclass of nn.Conv1d, 2d or 3d with a `forward` or a `_conv_forward` of its own.
    """
    if len(inspect.signature(type(conv).forward).parameters) != 2:
        return None
    kernel_size = list(conv.weight.shape[2:])
    stride, dilation = (_per_axis(value, len(kernel_size)) for value in (conv.stride, conv.dilation))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel_size, dilation, strict=True)]
    steps = [*range(2 * max(stride) + 2), 4096]
    sizes = [tuple(r + step + axis for axis, r in enumerate(reach)) for step in steps]
    seen = [(size, _watch(conv, size, training)) for size in sizes for training in (False, True)]
    first = seen[0][1]
    if first is None or any(one is None or one[1:] != first[1:] for _, one in seen):
        return None
    spaces = first[1:]
    if all(one == first for _, one in seen):
        return Observed(first.pads, *spaces)
    for size, one in seen:
        if one is None or flat(one.pads) != same_pads(list(size), kernel_size, *map(list, spaces[:2])):
            return None
    return Observed(None, *spaces)


def _watch(conv: Any, size: Sequence[int], training: bool) -> _Seen | None:
    """What a call on an input of this size does; None if that is not understood."""
    twin: Any = object.__new__(type(conv))
    for name, value in vars(conv).items():
        twin.__dict__[name] = value.copy() if isinstance(value, (dict, list, set)) else value
    for name, parameter in conv._parameters.items():
        if parameter is not None:
            twin._parameters[name] = nn.Parameter(parameter.detach().to("meta"), False)
    twin.__dict__["_modules"] = copy.deepcopy(conv._modules)
    twin.train(training)
    weight, bias = twin._parameters["weight"], twin._parameters["bias"]
    input = torch.empty((64, weight.shape[1] * conv.groups, *size), dtype=weight.dtype, device="meta")
    recorder = _Recorder(input, weight, bias)
    before = _state(twin)
    try:
        with torch.no_grad(), recorder:
            output = type(conv).forward(twin, input)
    except Exception:  # whatever a forward that is not ours raises, it is not understood
        return None
    done = recorder.understood and recorder.seen is not None and output is recorder.value
    return recorder.seen if done and before == _state(twin) else None


def _per_axis(value: int | Sequence[int], dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value)


def _state(module: nn.Module) -> list[dict[str, Any]]:
    """Which objects the attributes are, and hold, of a module and those in it."""
    return [{k: _shallow(v) for k, v in vars(part).items()} for part in module.modules()]


def _shallow(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: id(item) for key, item in value.items()}
    return [id(item) for item in value] if isinstance(value, (list, set)) else id(value)


def flat(pads: Pads) -> list[int]:
    """As `F.pad` takes them."""
    return [number for pair in reversed(pads) for number in pair]
