"""The suite's own arithmetic, on numbers and fakes instead of a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from . import ceilings, competitors, gate, machine, shapes, timing
from .competitors import Competitor, arrange, cases, subject
from .shapes import Shape

_SMALL = shapes.SMALL[0]


class FakeEvent:
    """An event of a device whose clock is set by hand, in milliseconds."""

    now = 0.0

    def __init__(self) -> None:
        self.at = float("nan")
        self.awaited = False

    def record(self) -> None:
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        self.awaited = True

    def elapsed_time(self, end_event: FakeEvent, /) -> float:
        if not end_event.awaited:
            raise RuntimeError("elapsed_time() before the end event was reached")
        return end_event.at - self.at


def test_difference_of_stamps_waits_and_is_in_seconds() -> None:
    FakeEvent.now = 250.0
    start = timing.Stamp(FakeEvent())
    FakeEvent.now = 251.5
    end = timing.Stamp(FakeEvent())
    assert end - start == pytest.approx(1.5e-3)


def test_rounds_stay_within_bounds() -> None:
    effort = timing.Effort(seconds=1.0, least=5, most=20)
    assert [effort.rounds(t) for t in (0.0, 0.1, 10.0)] == [20, 10, 5]


class FakeDevice:
    """Work that takes as long as it is told to, and a flush that takes longer than any of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.flushes = 0
        self.queued = 0.0
        monkeypatch.setattr(timing, "clock", lambda: self.now)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def flush(self) -> None:
        self.flushes += 1
        self.now += 100.0

    def work(self, *seconds: float) -> Any:
        durations = iter(seconds)

        def target() -> None:
            self.now += next(durations)

        return target

    def enqueue(self) -> None:
        """Takes the host 1 s and the device 3, which only synchronising waits for."""
        self.now += 1.0
        self.queued += 2.0

    def synchronize(self) -> None:
        self.now, self.queued = self.now + self.queued, 0.0


def test_durations_are_without_the_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(monkeypatch)
    assert timing.durations(device.work(1.0, 3.0, 2.0), device.flush, 3) == [1.0, 3.0, 2.0]
    assert device.flushes == 3


def test_steady_time_counts_what_is_still_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(monkeypatch)
    device.queued = 50.0  # of an earlier benchmark
    assert timing.steady_seconds(device.enqueue, 4, device.synchronize) == pytest.approx(3.0)


def test_graph_time_is_the_median_of_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(monkeypatch)
    replay = device.work(1.0, 9.0, 2.0)
    facts = timing.graph_facts(lambda: None, lambda target: replay, device.flush, 3)
    assert facts == {"graph_seconds": 2.0}
    assert device.flushes == 3


def test_a_graph_that_cannot_be_captured_says_why() -> None:
    def capture(target: Any) -> Any:
        try:
            target()
        finally:
            raise RuntimeError("the capture was invalidated")

    def target() -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    facts = timing.graph_facts(target, capture, lambda: None, 3)
    assert facts == {"graph_error": "operation not permitted when stream is capturing"}


class FakeCuda:
    """The parts of `torch.cuda` that a capture uses, which write down what happens on which stream."""

    class Stream:
        name = "side"

        def wait_stream(self, other: Any) -> None:
            pass

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.here: Any = self.Stream()
        self.here.name = "main"
        for name in ("Stream", "stream", "graph", "CUDAGraph", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def current_stream(self) -> Any:
        return self.here

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.here = self.here, stream
        try:
            yield
        finally:
            self.here = before

    @contextmanager
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
        self.here = stream  # as PyTorch leaves it if the capture fails
        self.log.append("capture")
        yield
        self.log.append("end")

    def CUDAGraph(self) -> Any:  # noqa: N802
        return SimpleNamespace(replay=lambda: self.log.append(f"replay on {self.here.name}"))

    def target(self) -> None:
        self.log.append(f"work on {self.here.name}")


def test_capture_warms_its_stream_up_and_replays_on_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)
    timing.capture(cuda.target)()
    assert cuda.log == ["work on side", "capture", "work on side", "end", "replay on main"]


def test_a_failed_capture_leaves_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)

    def target() -> None:
        cuda.target()
        if "capture" in cuda.log:
            raise RuntimeError("not permitted")

    assert timing.graph_facts(target, timing.capture, lambda: None, 3) == {
        "graph_error": "not permitted"
    }
    assert cuda.here.name == "main"


def test_flush_outlasts_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = iter((0.0, 3e-6))
    monkeypatch.setattr(timing, "device_clock", lambda: next(stamps))
    properties = SimpleNamespace(L2_cache_size=100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    flush = timing.Flush(torch.device("cpu"))
    for host, repeats in ((0.0, 1), (1e-6, 1), (10e-6, 7)):
        flush.outlast(host)
        assert flush.repeats == repeats
        flush()


class FakeBenchmark:
    """pytest-benchmark's fixture as far as `measure` uses it."""

    enabled = True

    def pedantic(self, target: Any, setup: Any, rounds: int, warmup_rounds: int) -> None:
        for _ in range(rounds + warmup_rounds):
            if setup is not None:
                setup()
            target()


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_launches_are_measured_apart_on_a_gpu_only(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(monkeypatch)
    flush = timing.Flush.__new__(timing.Flush)
    flush._seconds, flush._buffer, flush.repeats = 1.0, torch.empty(1), 1
    monkeypatch.setattr(timing, "_flush", lambda _: flush)
    monkeypatch.setattr(timing.machine, "synchronize", lambda _: device.synchronize())
    monkeypatch.setattr(timing, "capture", lambda target: device.work(*[0.5] * 99))
    benchmark: Any = FakeBenchmark()
    place: Any = SimpleNamespace(type=kind)
    launches = timing.measure(benchmark, device.enqueue, place)
    assert launches == ({"eager_seconds": 3.0, "graph_seconds": 0.5} if kind == "cuda" else {})
    if kind == "cuda":
        assert flush.repeats == 2  # the host takes 1 s to enqueue
        benchmark.enabled = False
        assert timing.measure(benchmark, device.enqueue, place) == {}


def test_shape_names_are_unique() -> None:
    for rows in (shapes.GPU, shapes.CPU):
        assert max(Counter((shape.name, dtype) for shape, dtype in rows).values()) == 1
    assert all(shapes.SHAPES[shape.name] == shape for shape, _ in (*shapes.GPU, *shapes.CPU))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_shape_arithmetic(dims: int) -> None:
    size, kernel = (9, 8, 7)[:dims], (5, 3, 1)[:dims]
    shape = Shape("any", 2, 4, 6, size, kernel, stride=2, dilation=2, groups=2)
    output, weight = torch.empty(2, 6, *shape.output_size), torch.empty(6, 2, *kernel)
    convolution = (torch.conv1d, torch.conv2d, torch.conv3d)[dims - 1]

    def output_of(input: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
        return convolution(input, weight, None, 2, shape.padding, 2, groups)

    assert shape.dims == dims
    assert output.shape == output_of(torch.zeros(2, 4, *size), weight, 2).shape
    assert shape.flops == 2 * output.numel() * weight[0].numel()
    assert shape.meetings == output_of(torch.ones(1, 1, *size), torch.ones(1, 1, *kernel), 1).sum()


def test_least_operations() -> None:
    inside = replace(shapes.RESNET[0], kernel_size=(1, 1))  # 32 x 64 -> 64 x 56^2, no padding
    assert inside.least_flops(hyper=True) == inside.least_flops(hyper=False) == inside.flops
    padded = Shape("any", 2, 3, 100, (4,), (3,))
    assert padded.meetings == 3 * 4 - 2
    assert padded.least_flops(hyper=False) == 2 * 2 * 3 * 100 * 10
    assert padded.least_flops(hyper=True) == padded.least_flops(hyper=False)  # R = 5 > 3 taps
    long = replace(padded, size=(100,), kernel_size=(31,))
    assert long.meetings == 31 * 100 - 2 * sum(range(16))
    assert long.least_flops(hyper=True) == 2 * 2 * 3 * 5 * (long.meetings + 100 * 100)


def test_every_tier_has_every_shape_and_decisive_ones_come_first() -> None:
    tiers: dict[tuple[str, int], list[Shape]] = {}
    for shape, dtype in shapes.GPU:
        tiers.setdefault((dtype, shape.num_features), []).append(shape)
    expected = [("bf16", 4), ("bf16", 16), ("fp16", 4), ("fp16", 16), ("fp32", 4), ("fp32", 16)]
    assert list(tiers) == expected
    families = {"resnet": 16, "unet": 18, "large": 4, "volume": 6, "sequence": 2, "tiny": 1}
    for tier in tiers.values():
        assert Counter(shape.family for shape in tier) == families
        flags = [shapes.decisive(shape) for shape in tier]
        assert flags == sorted(flags, reverse=True) and {True, False} == set(flags)


def test_the_cpu_runs_every_family() -> None:
    assert {shape.family for shape, _ in shapes.CPU} == {shape.family for shape, _ in shapes.GPU}


@pytest.mark.parametrize("on_gpu", [True, False])
def test_cases_are_complete_and_compiled_ones_end_their_tier(on_gpu: bool) -> None:
    rows = shapes.GPU if on_gpu else shapes.CPU
    listed = cases(rows, on_gpu)
    assert len(set(listed)) == len(listed)
    assert {(shape, dtype) for shape, dtype, *_ in listed} == set(rows)
    tiers = [(dtype, shape.num_features) for shape, dtype, *_ in listed]
    for tier in set(tiers):
        first, last = tiers.index(tier), len(tiers) - tiers[::-1].index(tier)
        assert set(tiers[first:last]) == {tier}
        flags = [case[3].compiled for case in listed[first:last]]
        assert flags == sorted(flags) and {True, False} == set(flags)


def test_baselines_run_in_both_layouts_where_there_are_two() -> None:
    for dims, layouts in ((1, ["contiguous"]), (2, ["contiguous", "channels_last"])):
        names = Counter(c.column for c in competitors.competitors(dims, on_gpu=True) if c.baseline)
        assert names == {
            "conv": len(layouts),
            "hypernet+conv": len(layouts),
            "hypernet+conv compiled": 1,
        }


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_arrange(dims: int) -> None:
    tensor = torch.randn(2, 3, *(4, 5, 6)[:dims])
    last = arrange(tensor, "channels_last")
    assert torch.equal(last, tensor) and last.stride(1) == 1
    assert last.movedim(1, -1).is_contiguous()
    assert arrange(last, "contiguous").is_contiguous()


def test_executed_operations_are_summed_over_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SimpleNamespace(flops=lambda plan: plan.seconds)
    monkeypatch.setattr(competitors, "BACKENDS", {"fast": engine})
    chosen: Any = tuple(SimpleNamespace(backend="fast", seconds=s) for s in (1.0, 2.5))
    assert competitors.executed_flops(chosen) == 3.5


def test_ceilings_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fastest(target: Any) -> float:
        calls.append(target())
        return 0.5

    monkeypatch.setattr(ceilings, "_fastest", fastest)
    found = ceilings.Ceilings(torch.device("cpu"))
    assert found.to_json() == {"bytes_per_second": None, "flops_per_second": {}}
    for _ in range(2):
        assert found.bandwidth == 4 * 2**27
        assert found.rate("bf16") == 4 * 1024**3
    assert len(calls) == 2
    expected = {"bytes_per_second": 4 * 2**27, "flops_per_second": {"bf16": 4 * 1024**3}}
    assert found.to_json() == expected


def _competitor(backend: str | None, layout: str = "contiguous") -> Competitor:
    return Competitor("any", backend, layout, baseline=True)


@pytest.mark.parametrize("layout", competitors.LAYOUTS)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_gate_passes_the_library_and_catches_a_wrong_parameter(backend: str | None, layout: str) -> None:
    layer = subject(_SMALL, "fp32").layer(_competitor(backend, layout))
    arguments = (_SMALL, "fp32", layer, layout)
    assert not gate.failures(*arguments, gradients=True, baseline=True)
    with torch.no_grad():
        next(layer.parameters()).mul_(1.01)
    assert any("output" in line for line in gate.failures(*arguments, gradients=False, baseline=True))


def test_gate_catches_nan() -> None:
    layer = subject(_SMALL, "fp32").layer(_competitor("reference"))
    with torch.no_grad():
        next(layer.parameters()).fill_(float("nan"))
    lines = gate.failures(_SMALL, "fp32", layer, "contiguous", gradients=True, baseline=False)
    assert any("grad of input" in line for line in lines)


def test_peak_memory_counts_what_is_freed_again() -> None:
    device = machine.device()

    def work() -> torch.Tensor:
        large = torch.ones(2**20, dtype=torch.uint8, device=device)
        return large[:1].clone()

    assert 2**20 < machine.peak_memory(work, device) < 2**20 + 2**12
