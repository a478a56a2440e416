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

from hyperconv_ext import functional

from . import ceilings, competitors, fourier, gate, machine, shapes, timing
from .competitors import Competitor, arrange, cases, subject
from .records import Record, Row
from .shapes import Shape

_SMALL = shapes.CPU_TINY[1]  # 5x5


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
    patient = replace(effort, patience=6.0)
    assert [patient.rounds(t) for t in (0.1, 1.0, 2.0, 7.0)] == [10, 5, 3, 1]


def test_a_call_that_takes_long_is_warm_after_one(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(monkeypatch)
    assert timing.warm_up(device.work(1.0, 0.25, 0.5)) == 0.5
    assert timing.warm_up(device.work(1.0, 0.25, 0.5), enough=0.75) == 1.0


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
    launches = timing.measure(benchmark, device.enqueue, place, 1.0)
    assert launches == ({"eager_seconds": 3.0, "graph_seconds": 0.5} if kind == "cuda" else {})
    if kind == "cuda":
        assert flush.repeats == 2  # the host takes 1 s to enqueue
        benchmark.enabled = False
        assert timing.measure(benchmark, device.enqueue, place, 1.0) == {}


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
    assert {shape.family for shape, _ in shapes.CPU} > {shape.family for shape, _ in shapes.GPU}


def test_names_of_layers() -> None:
    names = list(dict.fromkeys(shapes.layer(shape) for shape, _ in shapes.CPU))
    assert names[:3] == ["64 → 64 at 64²", "128 → 128 at 32²", "256 → 256 at 16²"]
    expected = {
        "96 depthwise at 56²",
        "64 → 128 at 56², stride 2",
        "32 → 32 at 24³",
        "128 → 128 at 4096",
    }
    assert expected < set(names)
    odd = Shape("any", 1, 8, 8, (4, 5), (3, 3), dilation=2, groups=2)
    assert shapes.layer(odd) == "8 → 8 at 4x5, 2 groups, dilation 2"


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
        assert flags == sorted(flags) and on_gpu in flags


def test_baselines_run_in_both_layouts_where_there_are_two() -> None:
    for dims, layouts in ((1, ["contiguous"]), (2, ["contiguous", "channels_last"])):
        shape = Shape("any", 1, 8, 8, (9,) * dims, (3,) * dims)
        both = {"conv": len(layouts), "hypernet+conv": len(layouts)}
        gpu, cpu = (
            Counter(c.column for c in competitors.competitors(shape, on_gpu) if c.baseline)
            for on_gpu in (True, False)
        )
        assert gpu == {**both, "hypernet+conv compiled": 1}
        assert cpu == both


def _columns(kernel: int, on_gpu: bool) -> list[str]:
    shape = Shape("any", 1, 8, 8, (32, 32), (kernel, kernel))
    return [c.column for c in competitors.competitors(shape, on_gpu) if not c.baseline or c.fourier]


def test_competitors_of_a_device() -> None:
    assert _columns(7, on_gpu=True) == ["cuda", "triton", "composite"]
    assert _columns(5, on_gpu=False) == ["cpu/basis", "cpu/fft", "auto"]
    assert _columns(7, on_gpu=False) == ["cpu/basis", "cpu/fft", "auto", "composite"]
    assert _columns(11, on_gpu=False) == ["fft conv", "cpu/basis", "cpu/fft", "auto"]


def _conv(shape: Shape, phase: str, layout: str, seconds: float) -> Record:
    return Record(shape, "fp32", phase, "conv", layout, baseline=True, seconds=seconds)


def test_what_a_cpu_leaves_out() -> None:
    dense = _competitor(None, "channels_last", "conv")
    small, large = (Shape("any", 1, 8, 8, (32, 32), (k, k)) for k in (7, 15))
    row = Row(large, "fp32", "step")
    assert "minutes" in competitors.why_left_out(dense, row, [])
    assert "minutes" in competitors.why_left_out(replace(dense, column="hypernet+conv"), row, [])
    for other in (replace(row, phase="forward"), replace(row, shape=small)):
        assert not competitors.why_left_out(dense, other, [])
    assert not competitors.why_left_out(replace(dense, layout="contiguous"), row, [])
    builds = _competitor("reference", "contiguous", "hypernet+conv")
    row = Row(small, "fp32", "step")
    assert not competitors.why_left_out(builds, row, [_conv(small, "forward", "channels_last", 1e-3)])
    done = [_conv(small, "step", "contiguous", 2e-2), _conv(small, "step", "channels_last", 1e-2)]
    assert "other layout" in competitors.why_left_out(builds, row, done)
    assert not competitors.why_left_out(replace(builds, layout="channels_last"), row, done)
    assert "builds W" in competitors.why_left_out(builds, row, [_conv(small, "step", "contiguous", 1.0)])


_FOURIER = (
    Shape("any", 2, 3, 4, (9,), (4,)),
    Shape("any", 2, 3, 5, (9, 12), (11, 5)),
    Shape("any", 2, 4, 6, (12, 9), (3, 4), stride=2, groups=2),
    Shape("any", 1, 4, 4, (7, 6), (5, 5), groups=4),
    Shape("any", 2, 2, 3, (5, 6, 7), (3, 5, 4)),
)


@pytest.mark.parametrize("shape", _FOURIER, ids=lambda shape: shape.name)
def test_the_dense_convolution_by_fft_is_the_library_s(shape: Shape) -> None:
    dense = competitors._DENSE[shape.dims](
        shape.in_channels,
        shape.out_channels,
        shape.kernel_size,
        shape.stride,
        shape.padding,
        1,
        shape.groups,
        dtype=torch.float64,
    )
    size = (shape.batch, shape.in_channels, *shape.size)
    input = torch.randn(size, dtype=torch.float64, requires_grad=True)
    by_fft = fourier.FourierConv(dense)
    expected, actual = dense(input), by_fft(input)
    torch.testing.assert_close(actual, expected)
    grad, leaves = torch.randn_like(expected), (input, *dense.parameters())
    gradients = (torch.autograd.grad(output, leaves, grad) for output in (actual, expected))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_spectrum_is_kept_until_the_weight_changes() -> None:
    by_fft = fourier.FourierConv(torch.nn.Conv2d(2, 3, 5, padding=2))
    input = torch.randn(1, 2, 8, 8)
    with torch.no_grad():
        first = by_fft(input)
        kept = by_fft._kept
        assert torch.equal(by_fft(input), first) and by_fft._kept is kept
        by_fft.weight.mul_(2)
        assert not torch.allclose(by_fft(input), first) and by_fft._kept is not kept


def test_circles_hold_the_image_and_one_side_s_padding() -> None:
    assert fourier.circles((32, 16, 10), (31, 31, 4), (15, 15, 1)) == (48, 32, 12)


@pytest.mark.parametrize("algorithm", ["basis", "fft"])
def test_a_layer_with_a_named_algorithm(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    convolve: Any = functional.convolve

    def watched(*args: Any) -> torch.Tensor:
        asked.append(args[-3:-1])
        return convolve(*args[:-3], "auto", "auto", args[-1])

    monkeypatch.setattr(functional, "convolve", watched)
    named = replace(_competitor("cpu"), algorithm=algorithm)
    case = subject(_SMALL, "fp32")
    layer = case.layer(named)
    assert not gate.failures(_SMALL, "fp32", layer, "contiguous", gradients=True, baseline=False)
    assert asked == [("cpu", algorithm)]


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


def _competitor(backend: str | None, layout: str = "contiguous", column: str = "any") -> Competitor:
    return Competitor(column, backend, layout, baseline=True)


@pytest.mark.parametrize("layout", competitors.LAYOUTS)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_gate_passes_the_library_and_catches_a_wrong_parameter(backend: str | None, layout: str) -> None:
    layer = subject(_SMALL, "fp32").layer(_competitor(backend, layout))
    arguments = (_SMALL, "fp32", layer, layout)
    assert not gate.failures(*arguments, gradients=True, baseline=True)
    with torch.no_grad():
        next(layer.parameters()).mul_(1.01)
    assert any("output" in line for line in gate.failures(*arguments, gradients=False, baseline=True))


def test_the_truth_by_fft_is_that_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    truths = []
    for taps in (1, 1000):
        gate._standard.cache_clear()
        monkeypatch.setattr(gate, "_MANY_TAPS", taps)
        truths.append(gate._standard(_SMALL, "fp32")[0])
    gate._standard.cache_clear()
    assert {"output", "grad of input", "grad of weight", "grad of coefficients"} < set(truths[0])
    torch.testing.assert_close(*truths, rtol=1e-9, atol=1e-12)


def test_a_truth_of_zero_is_compared_absolutely() -> None:
    zero = {"grad": torch.zeros(4)}
    assert gate.errors({"grad": torch.full((4,), 0.5)}, zero) == {"grad": (1.0, 0.5)}


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
