"""Basis functions for given kernels: the least error at a rank, and a hyper-network that comes near it.

The error of W = A phi is a function of phi alone where A is its least-squares solution: what is left
of the kernels outside the span of phi. It is minimised over the parameters of phi (variable projection:
Golub and Pereyra, SIAM J. Numer. Anal. 10, 1973). Of the kernels only their second moments over the taps
matter, so that the cost of a step does not depend on the number of channels.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from .hypernet import DEPENDENT, BasisTable

_CHUNK = 1 << 22  # elements of the kernels that are in float64 at a time
# Fresh networks to begin with, steps from each, and steps from where the best of them has come.
_STARTS, _FIRST, _MORE = 4, 25, 250
# What so many steps must gain, as a share of the squared error that is left, for others to be made.
_SPAN, _GAIN = 10, 1e-3
_RIDGE = DEPENDENT**2  # a penalty on coefficients, of functions with a length of 1
# L-BFGS: the steps remembered; the length of the first one; how often a step is shortened; what it must
# gain, as a share of what its slope promises.
_PAIRS, _REACH, _TRIALS, _DECREASE = 30, 0.1, 20, 1e-4
_NOISE = 1e-5  # of the largest singular value of phi in float32: what is below is rounding


class FitResult(NamedTuple):
    """How near a hyper-convolution came to the kernels it was fitted to.

    Attributes:
        error: Frobenius norm of the difference, over that of the kernels, in the layer's own numbers.
        best_error: the least that any kernels of this rank over the taps can have (Eckart and Young,
            Psychometrika 1, 1936).
        rank: R, the constant function included.
        seconds: what the fit took.
    """

    error: float
    best_error: float
    rank: int
    seconds: float


class Kernels:
    """Given kernels, seen from the functions over their taps.

    Args:
        weight: `[C_out, C_in/groups, *kernel_size]`, W of a convolution; any floating dtype and device.

    Raises:
        ValueError: a weight is not finite.
    """

    def __init__(self, weight: Tensor) -> None:
        self.rows = _rows(weight)
        root = self.rows.new_zeros((0, self.rows.shape[1]), dtype=torch.float64)
        for rows in _in_parts(self.rows):
            root = torch.linalg.qr(torch.cat([root, rows]), mode="r").R
        if not bool(root.isfinite().all()):
            raise ValueError(
                "conv: expected a weight of finite numbers to fit to, got infinite ones or NaN; mend "
                "them, or draw the layer anew with init='match'"
            )
        self.root = root.T  # [K, min(rows, K)]: times its transpose it is the matrix of second moments
        self._values = torch.linalg.svdvals(root)

    def _relative(self, norm: Tensor) -> float:
        return float(norm / self._values.norm()) if float(norm) > 0 else 0.0

    def best_error(self, rank: int) -> float:
        """The least relative error of kernels of this rank."""
        return self._relative(self._values[rank:].norm())

    def best_functions(self, count: int, constant: bool) -> Tensor:
        """The functions `[K, count]` that leave the least error, beside the constant one if `constant`.

        Orthonormal, the most important first; zero from where there are as many as taps.
        """
        root = self.root - self.root.mean(0) if constant else self.root
        functions = torch.linalg.svd(root, full_matrices=count > root.shape[1]).U[:, :count]
        return nn.functional.pad(functions, (0, count - functions.shape[1]))

    def remainder(self, features: Tensor, constant: bool) -> tuple[float, Tensor]:
        """The squared relative error that the span of `features` leaves, and its gradient.

        It is that of ridge regression (Hoerl and Kennard, Technometrics 12, 1970): functions that
        hardly differ would be of no use to training, and of little in float32.

        Args:
            features: `[K, N]` in float64.
            constant: the constant function is in the span, too.

        Returns:
            (error, gradient `[K, N]`).
        """
        root = self.root
        if constant:
            root, features = root - root.mean(0), features - features.mean(0)
        length = features.norm(dim=0)
        inverse = torch.where(length > 0, 1 / length, 0.0)
        scaled = features * inverse
        span, values, turns = torch.linalg.svd(scaled, full_matrices=False)
        damped = (values / (values.square() + _RIDGE)).unsqueeze(1)
        inside = turns.T @ (damped * (span.T @ root))
        outside = root - scaled @ inside
        power = self._values.square().sum()
        left = (outside.square().sum() + _RIDGE * inside.square().sum()) / power
        gradient = -2 / power * (outside @ inside.T) * inverse
        # Their lengths do not matter.
        return float(left), gradient - scaled * (scaled * gradient).sum(0)

    def coefficients(self, basis: Tensor) -> Tensor:
        """A `[rows, R]` of the least-squares solution A phi for phi `[R, K]`, in float64."""
        inverse = torch.linalg.pinv(basis.to("cpu", torch.float64), rtol=_NOISE)
        return torch.cat([rows @ inverse for rows in _in_parts(self.rows)])

    def error(self, weight: Tensor) -> float:
        """The relative error of `weight`, of the same shape as the kernels."""
        parts = zip(_in_parts(self.rows), _in_parts(_rows(weight)), strict=True)
        squares = [(ours - theirs).square().sum() for ours, theirs in parts]
        return self._relative(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _rows(weight: Tensor) -> Tensor:
    """`[C_out * C_in/groups, K]` of W, on the CPU."""
    return weight.detach().to("cpu").flatten(2).flatten(0, 1)


def _in_parts(rows: Tensor) -> Iterator[Tensor]:
    """The rows in float64, some at a time."""
    for part in rows.split(max(1, _CHUNK // max(rows.shape[1], 1))):
        yield part.double()


def fit(
    hypernet: nn.Module,
    taps: Tensor,
    kernels: Kernels,
    constant: bool,
    redraw: Callable[[], None] | None = None,
    progress: bool = False,
) -> None:
    """Change the parameters of `hypernet` so that its features leave little of the kernels.

    The parameters that require gradients are moved, in float64 and on the CPU, by L-BFGS (Liu and
    Nocedal, Math. Program. 45, 1989). A table is set to the functions that leave the least.

    Args:
        hypernet: any module from coordinates `[K, D]` to features `[K, N]`.
        taps: the coordinates.
        kernels, constant: as `Kernels.remainder` has them.
        redraw: draws the hyper-network anew, so that there are several starts, of which the first is
            how it is. None: there is no other.
        progress: show a bar.

    Raises:
        ImportError: `progress` without tqdm.
    """
    if not bool(kernels.root.any()):  # of which nothing is left by any functions
        return
    if isinstance(hypernet, BasisTable):
        hypernet.hold(kernels.best_functions(hypernet.num_features, constant))
        return
    if not any(parameter.requires_grad for parameter in hypernet.parameters()):
        return
    remainder = partial(kernels.remainder, constant=constant)
    others = 0 if redraw is None else _STARTS - 1
    with _one_thread(), _bar((1 + others) * _FIRST + _MORE, progress) as advance:
        best = _Descent(hypernet, taps, remainder)
        best.run(_FIRST, advance)
        for _ in range(others):
            redraw()  # type: ignore[misc]
            other = _Descent(hypernet, taps, remainder)
            other.run(_FIRST, advance)
            best = min(best, other, key=lambda descent: descent.error)
        best.run(_MORE, advance)
    hypernet.load_state_dict(best.hypernet.state_dict())


class _Descent:
    """L-BFGS from where a hyper-network is, on the squared error that its features leave.

    Each step only has to gain something (Armijo). PyTorch's own L-BFGS asks for the strong Wolfe
    conditions, which cannot be met at the kinks of a leaky ReLU: it ended at 1.42 times the least error
    where this ends below 1.2 times it.

    Args:
        hypernet: as `fit` takes it; a copy in float64 is changed.
        taps: the coordinates.
        remainder: (error, gradient `[K, N]`) of features `[K, N]`.

    Attributes:
        hypernet: the copy.
        error: what its features leave.
    """

    def __init__(
        self, hypernet: nn.Module, taps: Tensor, remainder: Callable[[Tensor], tuple[float, Tensor]]
    ) -> None:
        self.hypernet = copy.deepcopy(hypernet).to("cpu", torch.float64)
        self._taps = taps.to("cpu", torch.float64)
        self._remainder = remainder
        self._parameters = [p for p in self.hypernet.parameters() if p.requires_grad]
        self._point = _vector([parameter.detach() for parameter in self._parameters])
        self.error, self._gradient = self._at(self._point)
        self._pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=_PAIRS)

    def _at(self, point: Tensor) -> tuple[float, Tensor]:
        """(error, gradient) for these parameters, all of them in one vector."""
        vector_to_parameters(point, self._parameters)
        with torch.enable_grad():
            features = self.hypernet(self._taps)
        if not bool(features.isfinite().all()):
            return math.inf, torch.zeros_like(point)
        error, slope = self._remainder(features.detach().double())
        gradients = torch.autograd.grad(
            features, self._parameters, slope.to(features.dtype), materialize_grads=True
        )
        return error, _vector(gradients)

    def run(self, steps: int, advance: Callable[[float], None]) -> None:
        """Take so many steps, or as long as they gain something; `advance` is told the error of each."""
        before: deque[float] = deque(maxlen=_SPAN)
        for _ in range(steps):
            before.append(self.error)
            if not self._step() or (self.error > (1 - _GAIN) * before[0] and len(before) == _SPAN):
                break
            advance(math.sqrt(self.error))
        vector_to_parameters(self._point, self._parameters)

    def _step(self) -> bool:
        """Whether there was a step downhill."""
        direction = self._direction()
        slope, length = float(self._gradient @ direction), 1.0
        for _ in range(_TRIALS):
            point = self._point + length * direction
            error, gradient = self._at(point)
            if error <= self.error + _DECREASE * length * slope:
                break
            # The lowest point of a parabola through what is known of this line
            lowest = -slope * length**2 / (2 * (error - self.error - length * slope))
            length *= min(max(lowest / length, 0.1), 0.5)
        else:
            return False
        step, change = point - self._point, gradient - self._gradient
        curvature = step @ change
        if curvature > 1e-10 * step.norm() * change.norm():
            self._pairs.append((step, change, 1 / curvature))
        self._point, self.error, self._gradient = point, error, gradient
        return True

    def _direction(self) -> Tensor:
        """The gradient, downhill, by the inverse Hessian matrix that the last steps tell of."""
        direction = -self._gradient
        if not self._pairs:
            return direction * (_REACH / max(float(direction.norm()), _REACH))
        parts = []
        for step, change, inverse in reversed(self._pairs):
            parts.append(inverse * (step @ direction))
            direction = direction - parts[-1] * change
        _, change, inverse = self._pairs[-1]
        direction = direction / (inverse * (change @ change))
        for step, change, inverse in self._pairs:
            direction = direction + (parts.pop() - inverse * (change @ direction)) * step
        return direction


def _vector(tensors: Sequence[Tensor]) -> Tensor:
    """All elements in the order that `vector_to_parameters` has; whatever the strides."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@contextmanager
def _one_thread() -> Iterator[None]:
    """What is as small as this takes many times as long where threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _bar(steps: int, shown: bool) -> Iterator[Callable[[float], None]]:
    """What is to be told the error after each step; it shows a bar if it is `shown`."""
    if not shown:
        yield lambda error: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            "progress: expected tqdm for a bar, which is not installed; pip install tqdm, or pass "
            "progress=False"
        ) from error
    with tqdm(total=steps, unit="step", desc="fit", leave=False) as bar:

        def advance(error: float) -> None:
            bar.set_postfix_str(f"error {error:.4f}", refresh=False)
            bar.update()

        yield advance
