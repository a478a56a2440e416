"""The interpreter that is made quicker (tests/interpreter.py) still finds what it did, and cleans up."""

from __future__ import annotations

import pytest
import torch

from .conftest import DEVICE, needs

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = [
    needs("triton"),
    pytest.mark.skipif(DEVICE.type == "cuda", reason="the kernels run on a GPU"),
]
MOST = 2**31 - 1


@triton.jit
def _sum(a, b):
    return a + b


@triton.jit
def _add(to, a, b):
    place = tl.arange(0, 4)
    tl.store(to + place, _sum(tl.load(a + place), tl.load(b + place)))


def _integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_a_launch_leaves_the_language_as_it_was() -> None:
    a, to = _integers(0, 1, 2, 3), _integers(0, 0, 0, 0)
    before = tl.load, tl.tensor.__add__, tl.math.exp, tl.range
    for _ in range(2):
        _add[(1,)](to, a, a)
        assert torch.equal(to, 2 * a)
        assert before == (tl.load, tl.tensor.__add__, tl.math.exp, tl.range)
    assert tl.core.is_builtin(tl.load)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_integer_beyond_its_bits_is_noticed(sign: int) -> None:
    most, to = MOST if sign > 0 else -MOST - 1, _integers(0, 0, 0, 0)
    _add[(1,)](to, _integers(0, 1, most - sign, 3), _integers(0, 0, sign, 0))
    assert to[2] == most
    with pytest.raises(Exception, match="int32 overflow detected for operation add"):
        _add[(1,)](to, _integers(0, 1, most, 3), _integers(0, 0, sign, 0))
