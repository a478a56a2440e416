"""Hyper-convolutions as they were published: what their checkpoints hold, in this package's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.reference import LEAKY_SLOPE
from ..checks import check_groups, check_name, integer, per_axis, positive_number
from ..hypernet import MLPLayer
from ..taps import COORDINATES, tap_coordinates

if TYPE_CHECKING:
    from .base import HyperConvNd


_Entries = dict[str, Tensor]
_Linear = tuple[Tensor, Tensor | None]  # weight [outputs, inputs], bias [outputs]


class _Network(NamedTuple):
    """A published hyper-network, with one output for each of C_out * C_in kernels.

    Attributes:
        hidden: the linear layers but the last, each with a LeakyReLU after it.
        last: the last one, whose outputs are the kernels.
        norm: of nn.BatchNorm2d over the taps: weight, bias, and the statistics kept for evaluation if
            there are any; empty without a norm.
        positions: coordinates `[2, kh, kw]` of the taps, or None where they are centred.
        outer: which channels count slower among the kernels, those of the output (0) or the input (1).
    """

    hidden: list[_Linear]
    last: _Linear
    norm: _Entries
    positions: Tensor | None
    outer: int


def load_published(
    cls: type[HyperConvNd],
    state_dict: Mapping[str, Any],
    prefix: str,
    layout: str,
    in_channels: int | None,
    out_channels: int | None,
    kernel_size: Any,
    negative_slope: float,
    options: dict[str, Any],
) -> HyperConvNd:
    """See `HyperConv2d.load_published`."""
    check_name("layout", layout, tuple(_LAYOUTS))
    slope = positive_number("negative_slope", negative_slope)
    entries = {
        name.removeprefix(prefix): torch.as_tensor(value).detach()
        for name, value in state_dict.items()
        if name.startswith(prefix)
    }
    network = _LAYOUTS[layout](entries, prefix)
    weights = [weight for weight, _ in (*network.hidden, network.last)]
    kernels, inputs = weights[-1].shape[0], [weight.shape[1] for weight in weights]
    widths = [cls.dims, *(weight.shape[0] for weight in weights[:-1])]
    if widths != inputs:
        raise ValueError(
            f"state_dict: expected linear layers that follow each other from {cls.dims} coordinates on, "
            f"got {inputs} inputs where there are {widths}; pass the entries of one hyper-network"
        )
    size = _kernel_size(cls.dims, kernel_size, network.positions)
    groups = check_groups(options.get("groups", 1))
    shape = _shape(kernels, in_channels, out_channels, groups)
    coordinates, first = _placed(network, size)
    where = {name: options.pop(name, getattr(weights[-1], name)) for name in ("device", "dtype")}
    layer = cls(
        shape[1] * groups,
        shape[0],
        size,
        **where,
        **options,
        hypernet=None if slope == LEAKY_SLOPE else LeakyMLP(widths, slope, **where),
        bias=False,
        hidden_features=widths[1:-1],
        num_features=widths[-1],
        activation="leaky_relu",
        weight_bias=network.last[1] is not None,
        weight_norm="batch" if network.norm else None,
        coordinates=coordinates,
        parametrization="published",
    )
    hidden = [first, *network.hidden[1:]]
    layer.load_state_dict(_renamed(network._replace(hidden=hidden), shape))
    return layer


class LeakyMLP(nn.Module):
    """The hidden layers of a published hyper-network whose LeakyReLU has another slope than 0.1.

    It is called as the module it is: the engines evaluate a `CoordinateMLP` only.

    Args:
        widths: (D, hidden features..., N).
        negative_slope: of the LeakyReLU after every layer.
        device, dtype: of the parameters.
    """

    def __init__(self, widths: list[int], negative_slope: float, device: Any, dtype: Any) -> None:
        super().__init__()
        self.negative_slope = negative_slope
        pairs = pairwise(widths)
        self.layers = nn.ModuleList([MLPLayer(*pair, None, 0.0, device, dtype) for pair in pairs])

    def forward(self, coordinates: Tensor) -> Tensor:
        """Features `[K, N]` at `coordinates` `[K, D]`, in float32 at least."""
        hidden = coordinates
        for layer in self.layers:
            hidden = layer(hidden)
            hidden = torch.where(hidden > 0, hidden, self.negative_slope * hidden)
        return hidden

    def extra_repr(self) -> str:
        """The slope, for `repr`."""
        return f"negative_slope={self.negative_slope}"


def _renamed(network: _Network, shape: tuple[int, int]) -> dict[str, Tensor]:
    """The state of the layer whose W is `[*shape, kh, kw]`."""

    def split(values: Tensor) -> Tensor:
        """`[C_out, C_in, ...]` of `[channels, ...]`."""
        if network.outer == 0:
            return values.unflatten(0, shape)
        return values.unflatten(0, shape[::-1]).transpose(0, 1)

    weight, bias = network.last
    columns = weight if bias is None else torch.cat([weight, bias.unsqueeze(1)], 1)
    state = {"coefficients": split(columns)}
    for index, (weight, bias) in enumerate(network.hidden):
        state[f"hypernet.layers.{index}.weight"] = weight
        state[f"hypernet.layers.{index}.bias"] = weight.new_zeros(len(weight)) if bias is None else bias
    return state | {f"weight_norm.{name}": split(values) for name, values in network.norm.items()}


def _kernel_size(dims: int, given: Any, positions: Tensor | None) -> tuple[int, ...]:
    """The kernel size, by what the state holds if it does."""
    size = None if given is None else per_axis("kernel_size", given, dims, 1)
    held = None if positions is None else tuple(positions.shape[1:])
    if size is None and held is None:
        raise ValueError(
            "kernel_size: expected it beside a state that does not hold it, got None; pass that of "
            "the kernel that was trained"
        )
    if size is not None and held is not None and size != held:
        raise ValueError(
            f"kernel_size: expected {held}, which the coordinates in the state have, got {size}; leave "
            f"it out, and change the size of the layer by with_kernel_size"
        )
    return size or held  # type: ignore[return-value]


def _shape(
    kernels: int, in_channels: int | None, out_channels: int | None, groups: int
) -> tuple[int, int]:
    """(C_out, C_in/groups), of whose product alone the state tells."""
    if in_channels is None and out_channels is None:
        raise ValueError(
            f"in_channels, out_channels: expected one of them, as the state holds only that there are "
            f"{kernels} kernels, got neither; pass one"
        )
    groups = check_groups(groups)
    if out_channels is None:
        group = integer("in_channels", in_channels, 1) // groups
        outputs = kernels // max(group, 1)
    else:
        outputs = integer("out_channels", out_channels, 1)
        group = kernels // outputs
    if outputs * group != kernels or (in_channels is not None and in_channels != group * groups):
        raise ValueError(
            f"in_channels, out_channels: expected C_out * C_in / groups to be the {kernels} kernels in "
            f"the state, got in_channels={in_channels}, out_channels={out_channels}, groups={groups}; "
            f"pass those of the layer that was trained"
        )
    return outputs, group


def _placed(network: _Network, size: tuple[int, ...]) -> tuple[str, _Linear]:
    """(coordinates, first linear layer) that see the taps where the network's own sees them."""
    first, bias = network.hidden[0]
    if network.positions is None:
        return "centered", (first, bias)
    positions = network.positions.flatten(1).T.to("cpu", torch.float64)
    grids = {name: tap_coordinates(size, name, "cpu", torch.float64) for name in COORDINATES}
    for name, grid in grids.items():
        if torch.allclose(positions, grid, atol=1e-6):
            return name, (first, bias)
    # An offset and another scale: positions = grid @ change[:-1] + change[-1].
    grid = nn.functional.pad(grids["centered"], (0, 1), value=1.0)
    change = torch.linalg.pinv(grid) @ positions
    if not torch.allclose(grid @ change, positions, atol=1e-5 * float(positions.abs().max())):
        raise ValueError(
            "state_dict: expected taps at equal distances, got others in 'pos'; make the layer with a "
            "hypernet that knows its taps"
        )
    wide = first.to("cpu", torch.float64)
    shift = wide @ change[-1] + (0 if bias is None else bias.to(wide))
    return "centered", ((wide @ change[:-1].T).to(first), shift.to(first))


def _mkarmann(entries: _Entries, prefix: str) -> _Network:
    """1x1 convolutions `main.{n}`, perhaps a BatchNorm2d after the last, perhaps the coordinates."""
    positions = entries.pop("pos", None)
    expected = "'main.0.weight' [16, 2, 1, 1], 'main.0.bias', ... and 'pos' [1, 2, kh, kw]"
    pattern = r"(main\.\d+)\.(weight|bias|running_mean|running_var|num_batches_tracked)"
    parts = _parts(entries, pattern, prefix, expected)
    norm = (
        parts.pop()
        if parts[-1]["weight" if "weight" in parts[-1] else "running_mean"].dim() == 1
        else {}
    )
    *hidden, last = [_linear(part, "weight", (2, 3), prefix, expected) for part in parts]
    if norm:
        norm.pop("num_batches_tracked", None)
        affine = {"weight": last[0].new_ones(len(last[0])), "bias": last[0].new_zeros(len(last[0]))}
        norm = affine | norm
    if positions is not None:
        positions = positions.squeeze(0)
    return _Network(hidden, last, norm, positions, outer=0)


def _tym002(entries: _Entries, prefix: str) -> _Network:
    """Keras' 1x1 convolutions, each `{name}/kernel` and `{name}/bias`."""
    expected = "'{name}/kernel' [1, 1, 2, 16], '{name}/bias', ... of Keras' four convolutions"
    parts = _parts(entries, r"(.+)[/.](kernel|bias)(?::0)?", prefix, expected)
    *hidden, last = [_linear(part, "kernel", (0, 1), prefix, expected) for part in parts]
    transposed = [(weight.T, bias) for weight, bias in hidden]
    return _Network(transposed, (last[0].T, last[1]), {}, None, outer=1)


_LAYOUTS: dict[str, Callable[[_Entries, str], _Network]] = {"mkarmann": _mkarmann, "tym002": _tym002}


def _parts(entries: _Entries, pattern: str, prefix: str, expected: str) -> list[_Entries]:
    """The entries of each module, in the order of the numbers in their names."""
    parts: dict[str, _Entries] = {}
    for name, value in entries.items():
        match = re.fullmatch(pattern, name)
        if match is None:
            raise _unexpected(expected, prefix, f"also {name!r}")
        parts.setdefault(match[1], {})[match[2]] = value
    if len(parts) < 2:
        raise _unexpected(expected, prefix, f"{list(entries)}")

    def order(name: str) -> list[Any]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    return [parts[name] for name in sorted(parts, key=order)]


def _linear(part: _Entries, name: str, ones: tuple[int, int], prefix: str, expected: str) -> _Linear:
    """(matrix, bias or None) of a 1x1 convolution, `ones` being the axes of its kernel."""
    weight = part.get(name)
    if weight is None or weight.dim() != 4 or any(weight.shape[axis] != 1 for axis in ones):
        got = f"a module with { ({key: list(value.shape) for key, value in part.items()}) }"
        raise _unexpected(expected, prefix, got)
    return weight.squeeze(ones), part.get("bias")


def _unexpected(expected: str, prefix: str, got: str) -> ValueError:
    return ValueError(
        f"state_dict: expected under the prefix {prefix!r} {expected}, got {got}; pass the prefix of "
        f"the hyper-network, or another layout"
    )
