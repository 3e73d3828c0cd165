"""Parameters, operations and time of a network."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from segkd.pipeline.evaluation.speed import count_flops, count_parameters, latency
from segkd.pipeline.models.references import BUILT_IN
from segkd.storage.errors import ConfigError


def test_parameters_are_those_that_learn_and_shared_ones_count_once() -> None:
    first = nn.Conv2d(3, 3, 1)
    second = nn.Conv2d(3, 3, 1)
    second.weight = first.weight
    # 9 shared weights, two biases of 3, 2 x 3 of batch norm; its running statistics are buffers.
    assert count_parameters(nn.Sequential(first, second, nn.BatchNorm2d(3))) == 9 + 3 + 3 + 6


@pytest.mark.parametrize(
    ("layer", "multiplications"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), 12 * 20 * 8 * 3 * 9),
        (nn.Conv2d(3, 8, 3, padding=1, stride=2), 6 * 10 * 8 * 3 * 9),
        (nn.Conv2d(3, 8, 3, padding=4, dilation=4), 12 * 20 * 8 * 3 * 9),
        (nn.Conv2d(3, 6, 3, padding=1, groups=3), 12 * 20 * 6 * 9),
        (nn.ConvTranspose2d(3, 8, 2, stride=2), 12 * 20 * 3 * 8 * 4),
        (nn.ConvTranspose2d(3, 6, 2, stride=2, groups=3), 12 * 20 * 3 * 2 * 4),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Upsample(scale_factor=2)), 12 * 20 * 12),
    ],
    ids=["conv", "strided", "dilated", "depthwise", "transposed", "transposed-grouped", "others-are-free"],
)
def test_operations_agree_with_a_count_by_hand(layer: nn.Module, multiplications: int) -> None:
    assert count_flops(layer, (12, 20)) == 2 * multiplications


def test_counting_operations_leaves_the_network_as_it_was() -> None:
    network = BUILT_IN["fast-scnn"](3).train()
    network.downsample.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    # In training mode batch norm would refuse the pooled value of a single image.
    assert count_flops(network, (64, 64)) > 0
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Recorder(nn.Module):
    """Notes how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[int, ...], int, bool, bool]] = []
        self.convolution = nn.Conv2d(3, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append(
            (tuple(images.shape), torch.get_num_threads(), self.training, torch.is_inference_mode_enabled())
        )
        output: Tensor = self.convolution(images)
        self.dtype = output.dtype
        return output


def test_latency_says_all_that_it_depends_on() -> None:
    network = Recorder().train()
    threads = torch.get_num_threads()
    result = latency(network, (8, 12), batch=2, threads=threads + 1, warmup=1, runs=4)
    assert network.calls == [((2, 3, 8, 12), threads + 1, False, True)] * 5
    assert torch.get_num_threads() == threads
    assert network.training
    described = dataclasses.asdict(result)
    p50, p95 = described.pop("p50_ms"), described.pop("p95_ms")
    assert 0 < p50 <= p95
    assert described == {
        "shape": (8, 12),
        "batch": 2,
        "threads": threads + 1,
        "dtype": "float32",
        "device": "cpu",
        "warmup": 1,
        "runs": 4,
    }


def test_latency_is_the_percentiles_of_the_timed_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each pass looks at the clock twice; the first, slow pass is the warm-up.
    seconds = [9.0, 0.001, 0.002, 0.003, 0.004, 0.005]
    ticks = iter([tick for second in seconds for tick in (0.0, second)])
    monkeypatch.setattr("segkd.pipeline.evaluation.speed.time.perf_counter", lambda: next(ticks))
    result = latency(Recorder(), (4, 4), warmup=1, runs=5)
    assert result.p50_ms == pytest.approx(3.0)
    assert result.p95_ms == pytest.approx(4.8)
    assert all(earlier <= later for earlier, later in pairwise((0, result.p50_ms, result.p95_ms)))


def test_latency_in_half_precision_computes_in_it() -> None:
    network = Recorder()
    assert latency(network, (4, 4), dtype=torch.bfloat16, warmup=0, runs=1).dtype == "bfloat16"
    assert network.dtype == torch.bfloat16
    assert network.convolution.weight.dtype == torch.float32


def test_a_failing_network_leaves_threads_and_mode_as_they_were() -> None:
    threads = torch.get_num_threads()
    network = nn.Conv2d(5, 2, 1).train()
    with pytest.raises(RuntimeError, match="5 channels"):
        latency(network, (4, 4), threads=threads + 1)
    assert torch.get_num_threads() == threads
    assert network.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (0, 4)}, "latency: height = 0; expected at least 1"),
        ({"shape": (4, 4), "runs": 0}, "latency: runs = 0; expected at least 1"),
        ({"shape": (4, 4), "threads": -1}, "latency: threads = -1; expected at least 1"),
        ({"shape": (4, 4), "dtype": torch.float64}, "latency: dtype = torch.float64; expected one of torch.float32"),
    ],
)
def test_impossible_measurements_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        latency(nn.Identity(), **arguments)  # type: ignore[arg-type]
