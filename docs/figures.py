"""Draw the figure of docs/mathematics.md, of a layer as it starts: `python docs/figures.py`.

Text and lines take the colour of the page that the SVG is put into, or of the reader's scheme.
Positive numbers are blue, negative ones orange, and 0 is the page.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from hyperconv_ext import HyperConv2d

_OUTPUT = Path(__file__).parent / "assets" / "kernel.svg"
_TAPS, _CELL = 7, 9
_SIDE = _TAPS * _CELL
_STYLE = """
.figure { color: #1f2430; font-family: system-ui, sans-serif; font-size: 15px }
@media (prefers-color-scheme: dark) { .figure { color: #dde1ec } }
.figure text { fill: currentColor; text-anchor: middle }
.figure .small { font-size: 13px; opacity: 0.75 }
.figure .line { fill: none; stroke: currentColor; stroke-width: 1.3 }
.figure .plus, .figure .minus { shape-rendering: crispEdges }
.figure .plus { fill: #3f7fe0 } .figure .minus { fill: #e8833a }
"""


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}"'
        + (f' class="{kind}"' if kind else "")
        + f">{text}</text>"
    )


def _square(x: float, y: float, side: float) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" class="line"/>'
    )


def _stack(
    x: float, y: float, count: int, side: float = 44, step: float = 7
) -> list[str]:
    """Channels one behind the other; of all but the first what it and the others leave to be seen."""
    parts = [_square(x, y, side)]
    for index in range(1, count):
        left, top = x + step * index, y - step * index
        edge = f"M{left:g} {top + step:g}v{-step:g}h{side:g}v{side:g}h{-step:g}"
        parts.append(f'<path d="{edge}" class="line"/>')
    return parts


def _arrow(x: float, y: float, length: float) -> str:
    end = x + length
    return (
        f'<path d="M{x:g} {y:g}H{end:g}M{end - 6:g} {y - 4:g}L{end:g} {y:g}L{end - 6:g} {y + 4:g}" '
        f'class="line"/>'
    )


def _tile(x: float, y: float, values: Tensor) -> list[str]:
    """`values` [taps, taps] as a picture, the largest of them in full colour."""
    scaled = values / values.abs().max()
    parts = []
    for row in range(_TAPS):
        for column in range(_TAPS):
            value = float(scaled[row, column])
            left, top = x + column * _CELL, y + row * _CELL
            place = f'x="{left:g}" y="{top:g}" width="{_CELL}" height="{_CELL}"'
            kind = "plus" if value > 0 else "minus"
            parts.append(
                f'<rect {place} class="{kind}" fill-opacity="{abs(value):.2f}"/>'
            )
    return [*parts, _square(x, y, _SIDE)]


def _kernel(layer: HyperConv2d) -> list[str]:
    """Upper row: coordinates, MLP, functions, coefficients, kernels."""
    phi, weight = layer.basis().detach(), layer.weight.detach()
    top = 50.0
    parts = []
    for row in range(_TAPS):
        for column in range(_TAPS):
            at = f'cx="{20 + _CELL * (column + 0.5):g}" cy="{top + _CELL * (row + 0.5):g}"'
            parts.append(f'<circle {at} r="1.6" fill="currentColor"/>')
    parts += [
        _square(20, top, _SIDE),
        _text(52, top - 12, "taps p<tspan dy='4' font-size='11'>k</tspan>"),
    ]
    parts += [_text(52, top + 86, "K = 49", "small"), _arrow(92, top + 31, 26)]
    parts += [
        f'<rect x="126" y="{top + 8:g}" width="62" height="46" rx="8" class="line"/>'
    ]
    parts += [_text(157, top + 36, "MLP"), _arrow(196, top + 31, 26)]
    for index, function in enumerate(phi):
        x = 232 + index * (_SIDE + 10)
        parts += [
            *_tile(x, top, function),
            _text(
                x + _SIDE / 2,
                top - 12,
                f"φ<tspan dy='4' font-size='11'>{index + 1}</tspan>",
            ),
        ]
    parts += [
        _text(
            410,
            top + 86,
            "R = 5 functions of position, shared by all channels",
            "small",
        )
    ]
    parts += [_arrow(602, top + 31, 44), _text(624, top + 20, "A")]
    for index in range(3):
        x = 658 + index * (_SIDE + 10)
        parts += [
            *_tile(x, top, weight[index, 0]),
            _text(x + _SIDE / 2, top - 12, f"W[{index + 1}, 1]"),
        ]
    return [*parts, _text(762, top + 86, "each kernel a combination of them", "small")]


def _convolution(layer: HyperConv2d) -> list[str]:
    """Lower rows: the dense convolution, and the two steps that equal it."""
    rank, taps, outputs = layer.coefficients.shape[2], _TAPS**2, layer.out_channels
    parts = [_text(52, 182, "dense", "small"), *_stack(30, 208, 3), _text(60, 272, "x")]
    parts += [_arrow(110, 228, 530), _text(375, 218, "convolve with W")]
    dense = f"K · C_out = {taps} · {outputs} = {taps * outputs:,}"
    text = f"{dense} multiplications per input channel and position"
    parts += [_text(375, 248, text, "small")]
    parts += [*_stack(668, 212, 5), _text(704, 276, "y")]
    parts += [_text(52, 304, "here", "small"), *_stack(30, 330, 3), _text(60, 394, "x")]
    parts += [_arrow(110, 350, 190), _text(205, 340, "convolve with φ")]
    parts += [_text(205, 370, f"R · K = {rank} · {taps} = {rank * taps}", "small")]
    parts += [*_stack(330, 334, rank), _text(366, 398, "z, never stored")]
    parts += [_arrow(430, 350, 210), _text(535, 340, "multiply by A")]
    parts += [
        _text(535, 370, f"R · C_out = {rank} · {outputs} = {rank * outputs}", "small")
    ]
    return [*parts, *_stack(668, 334, 5), _text(704, 398, "y, the same")]


def main() -> None:
    """Write the figure."""
    torch.manual_seed(3)
    layer = HyperConv2d(64, 128, _TAPS, backend="reference")
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 890 410" class="figure" role="img">'
    parts = [
        head,
        f"<style>{_STYLE}</style>",
        *_kernel(layer),
        *_convolution(layer),
        "</svg>",
    ]
    _OUTPUT.write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
