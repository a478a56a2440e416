"""What a conversion did to each convolution of a model: as a table, and as numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from rich.table import Table

_HEADINGS = ("layer", "before", "after", "parameters", "multiply-adds", "error", "best", "seconds")
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass
class LayerReport:
    """What happened to one layer.

    Attributes:
        name: of the module in the model, `''` for the model itself.
        aliases: its other names, where it is shared.
        before: the convolution, in short.
        after: the hyper-convolution; `''` where the layer was left as it is.
        reason: why it was left; `''` where it was converted.
        parameters_before, parameters_after: numbers of them.
        multiply_adds_before, multiply_adds_after: for one position of the output (of a transposed
            convolution: of the input), batch 1. Afterwards: of the cheaper of the low-rank form and the
            convolution by W, without building W.
        positions: how many such positions a call of the model has, all calls of the layer together;
            None before `Report.count`.
        rank: R.
        error, best_error: of `init='fit'`: the relative error of the kernel in the Frobenius norm, and
            the least that a kernel of rank R can have.
        seconds: of making the layer.
    """

    name: str
    before: str
    aliases: tuple[str, ...] = ()
    after: str = ""
    reason: str = ""
    parameters_before: int = 0
    parameters_after: int = 0
    multiply_adds_before: int = 0
    multiply_adds_after: int = 0
    positions: int | None = None
    rank: int | None = None
    error: float | None = None
    best_error: float | None = None
    seconds: float = 0.0


@dataclass
class Report:
    """What `convert` did: `print(report)`, or `rich.print(report)`.

    Attributes:
        model: the converted model: the one given, or its copy.
        layers: of every convolution in it, in the model's order, those left as they are, too.
        parameters_before, parameters_after: of the whole model.
    """

    model: nn.Module = field(repr=False)
    layers: list[LayerReport] = field(repr=False)
    parameters_before: int
    parameters_after: int

    @property
    def converted(self) -> list[LayerReport]:
        """The layers that are hyper-convolutions now."""
        return [layer for layer in self.layers if not layer.reason]

    @property
    def left(self) -> list[LayerReport]:
        """The layers that were left as they are; each says why."""
        return [layer for layer in self.layers if layer.reason]

    def count(self, *inputs: Any, **keywords: Any) -> Report:
        """Count the multiply-adds of one call of the model, which is run with these inputs.

        It runs in evaluation mode and without gradients. The columns of the table are those of this call
        from then on, instead of one position's.

        Returns:
            This report.
        """
        modules = dict(self.model.named_modules())
        found = {layer.name: 0 for layer in self.layers}

        def watch(name: str) -> Callable[..., None]:
            def hook(module: Any, arguments: Any, output: Any) -> None:
                seen = arguments[0] if module.transposed else output
                channels = module.in_channels if module.transposed else module.out_channels
                found[name] += seen.numel() // channels

            return hook

        watched = [layer.name for layer in self.layers if hasattr(modules[layer.name], "transposed")]
        hooks = [modules[name].register_forward_hook(watch(name)) for name in watched]
        flags = {module: module.training for module in modules.values()}
        try:
            with torch.no_grad():
                self.model.eval()(*inputs, **keywords)
        finally:
            for hook in hooks:
                hook.remove()
            for module, training in flags.items():
                module.training = training
        for layer in self.layers:
            layer.positions = found[layer.name] if layer.name in watched else None
        return self

    def to_dict(self) -> dict[str, Any]:
        """All numbers and texts, in Python's own types; not the model."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
        }

    def __str__(self) -> str:
        """The table, and what was left."""
        rows = [_HEADINGS, *map(_cells, self.converted)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if index < 3 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *self._notes()] if self.converted else self._notes())

    def __rich__(self) -> Table:
        """The same for rich."""
        from rich.table import Table

        table = Table(caption="\n".join(self._notes()), caption_justify="left")
        for index, heading in enumerate(_HEADINGS):
            table.add_column(heading, justify="left" if index < 3 else "right")
        for layer in self.converted:
            table.add_row(*_cells(layer))
        return table

    def _notes(self) -> list[str]:
        """Below the table: the sums, and what was left, by reason."""
        lines = [
            f"{len(self.converted)} of {len(self.layers)} convolutions converted; parameters of the "
            f"model {_change(self.parameters_before, self.parameters_after)}"
        ]
        counted = [layer for layer in self.layers if layer.positions is not None]
        if counted:
            sums = [sum(_multiply_adds(layer)[index] for layer in counted) for index in range(2)]
            lines.append(f"multiply-adds of all convolutions {_change(*sums)}")
        elif self.converted:
            lines.append("multiply-adds: per position of the output; count(input) for those of a call")
        reasons: dict[str, list[str]] = {}
        for layer in self.left:
            reasons.setdefault(layer.reason, []).append(_title(layer))
        lines += [f"left: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
        return lines


def _cells(layer: LayerReport) -> tuple[str, ...]:
    fit = ["" if error is None else f"{error:.3f}" for error in (layer.error, layer.best_error)]
    return (
        _title(layer),
        layer.before,
        layer.after,
        _change(layer.parameters_before, layer.parameters_after),
        _change(*_multiply_adds(layer)),
        *fit,
        f"{layer.seconds:.2f}",
    )


def _multiply_adds(layer: LayerReport) -> tuple[int, int]:
    positions = 1 if layer.positions is None else layer.positions
    after = layer.multiply_adds_before if layer.reason else layer.multiply_adds_after
    return positions * layer.multiply_adds_before, positions * after


def _title(layer: LayerReport) -> str:
    name = layer.name or "(the model)"
    return f"{name} = {' = '.join(layer.aliases)}" if layer.aliases else name


def _change(before: int, after: int) -> str:
    return f"{short(before)} -> {short(after)}"


def short(number: int) -> str:
    """`1.23M`."""
    for unit, letter in _UNITS:
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return str(number)


def times(sizes: int | Sequence[int]) -> str:
    """`3x3`."""
    return str(sizes) if isinstance(sizes, int) else "x".join(map(str, sizes))


def describe(conv: Any) -> str:
    """A convolution in short: `Conv2d(64, 128, 3x3, groups=2)`."""
    groups = f", groups={conv.groups}" if getattr(conv, "groups", 1) != 1 else ""
    channels = f"{conv.in_channels}, {conv.out_channels}"
    return f"{type(conv).__name__}({channels}, {times(conv.kernel_size)}{groups})"


def dense_multiply_adds(conv: Any) -> int:
    """Of nn.ConvNd for one position of its output (transposed: of its input)."""
    products = conv.in_channels * conv.out_channels // conv.groups
    return products * prod(conv.kernel_size)


def low_rank_multiply_adds(layer: Any) -> int:
    """Of a hyper-convolution's z by taps and its product with A, for one position as above."""
    products = layer.in_channels * layer.out_channels // layer.groups
    shared = layer.out_channels if layer.transposed else layer.in_channels
    return layer.rank * (shared * prod(layer.kernel_size) + products)
