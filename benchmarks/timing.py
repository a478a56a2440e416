"""A device clock for pytest-benchmark, and how a benchmark is warmed up and repeated.

pytest-benchmark takes `end - start` of what its timer returns, once per round in pedantic mode. On a
GPU the timer therefore returns a recorded event: the difference waits for the later event and is the
device's own time. Each round's setup queues writes that flush the L2 cache and take the GPU longer than
the host takes to enqueue the measured work, so the time to launch kernels is not in the result. What
launches cost is measured apart: by many calls in a row, and by replaying the same work as a CUDA graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, inf
from statistics import median
from typing import Any, Protocol

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import machine


class Event(Protocol):
    """What `Stamp` uses of `torch.cuda.Event`."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end_event: Any, /) -> float: ...


class Stamp:
    """A point in the device's time; the difference of two is in seconds."""

    def __init__(self, event: Event) -> None:
        self._event = event
        event.record()

    def __sub__(self, earlier: Stamp) -> float:
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


def device_clock() -> Stamp:
    """Now, on the current CUDA stream."""
    return Stamp(torch.cuda.Event(enable_timing=True))


clock: Callable[[], Stamp] | Callable[[], float] = (
    device_clock if machine.device().type == "cuda" else time.perf_counter
)


@dataclass(frozen=True)
class Effort:
    """How long one benchmark may take: seconds of measured work, and bounds on the rounds.

    Rounds that take more than `patience` seconds together are fewer than the `least`, if need be one.
    """

    seconds: float
    least: int
    most: int
    patience: float = inf

    def rounds(self, estimate: float) -> int:
        seconds = max(estimate, 1e-9)
        wanted = max(self.least, min(self.most, int(self.seconds / seconds)))
        return max(1, int(min(wanted, self.patience / seconds)))


EFFORT = {"cuda": Effort(0.05, 5, 25), "cpu": Effort(0.08, 3, 40, patience=1.0)}
_WARMUP = 3
# Seconds of a call on a CPU that need no further one to be warm.
LONG = 0.2
# The host is slower on some calls than on the one that was timed.
_HEADROOM = 2.0


class Flush:
    """Writes over a buffer of four times the L2 cache, `repeats` times."""

    def __init__(self, device: torch.device) -> None:
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.empty(size, dtype=torch.int8, device=device)
        self.repeats = 1
        self()
        start = device_clock()
        self()
        self._seconds = device_clock() - start

    def outlast(self, host_seconds: float) -> None:
        """Repeat the write until it takes the GPU longer than `host_seconds`."""
        self.repeats = max(1, ceil(_HEADROOM * host_seconds / self._seconds))

    def __call__(self) -> None:
        for _ in range(self.repeats):
            self._buffer.zero_()


@lru_cache
def _flush(device: torch.device) -> Flush:
    return Flush(device)


def _wall_time(target: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds until the work of a call of `target` is done, and until it returns."""
    machine.synchronize(device)
    start = time.perf_counter()
    target()
    returned = time.perf_counter() - start
    machine.synchronize(device)
    return time.perf_counter() - start, returned


def warm_up(target: Callable[[], object], enough: float = inf) -> float:
    """Compile, let the libraries choose their algorithms, and fill the allocator's cache.

    Returns:
        The host's seconds for the last call; one that takes `enough` is the last.
    """
    seconds = 0.0
    for _ in range(_WARMUP):
        start = time.perf_counter()
        target()
        seconds = time.perf_counter() - start
        if seconds >= enough:
            break
    return seconds


def durations(target: Callable[[], object], setup: Callable[[], object], rounds: int) -> list[float]:
    """Seconds by `clock` of each round's `target`, after its `setup`."""
    stamps = []
    for _ in range(rounds):
        setup()
        start = clock()
        target()
        stamps.append((start, clock()))
    return [end - start for start, end in stamps]  # type: ignore[operator]


def measure(
    benchmark: BenchmarkFixture,
    target: Callable[[], object],
    device: torch.device,
    estimate: float,
) -> dict[str, Any]:
    """Time a warm `target` by `clock`, in as many rounds as `EFFORT` affords.

    `estimate`: seconds of a call on a CPU, where calls that take seconds are not for estimates.

    Returns:
        On a GPU, if the benchmark is enabled, the fields of `Record` that tell what launches cost.
    """
    setup = None
    if device.type == "cuda":
        estimate, host = min(_wall_time(target, device) for _ in range(2))
        setup = _flush(device)
        setup.outlast(host)
    rounds = EFFORT[device.type].rounds(estimate)

    def once() -> None:
        target()  # pytest-benchmark would keep a result alive, and its memory, through the next round

    benchmark.pedantic(once, setup=setup, rounds=rounds, warmup_rounds=0 if setup is None else 1)
    if setup is None or not benchmark.enabled:
        return {}
    eager = steady_seconds(once, rounds, lambda: machine.synchronize(device))
    return {"eager_seconds": eager, **graph_facts(once, capture, setup, rounds)}


def steady_seconds(target: Callable[[], object], calls: int, synchronize: Callable[[], object]) -> float:
    """Wall time of one of `calls` calls in a row, launches included, caches as they are."""
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        target()
    synchronize()
    return (time.perf_counter() - start) / calls


def capture(target: Callable[[], object]) -> Callable[[], object]:
    """What replays the work of `target` as a CUDA graph, in memory of its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):  # also leaves `side` where a capture that fails does not
        target()  # libraries allocate a workspace per stream on first use
        with torch.cuda.graph(graph, stream=side):
            target()
    torch.cuda.current_stream().wait_stream(side)
    return graph.replay


def graph_facts(
    target: Callable[[], object],
    capture: Callable[[Callable[[], object]], Callable[[], object]],
    setup: Callable[[], object],
    rounds: int,
) -> dict[str, Any]:
    """The median time of a replay, or why `target` cannot be captured."""
    try:
        replay = capture(target)
    except RuntimeError as error:
        cause: BaseException = error
        while cause.__context__ is not None:  # leaving the capture raises once more
            cause = cause.__context__
        return {"graph_error": (str(cause).splitlines() or [type(cause).__name__])[0]}
    return {"graph_seconds": median(durations(replay, setup, rounds))}
