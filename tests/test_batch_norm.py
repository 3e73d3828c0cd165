"""Whose statistics normalise whom, against passes of each part alone and against the formula.

Shapes: images N,3,H,W of which the first ones are labelled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkd.pipeline.models.foreign import ForeignNetwork
from segkd.pipeline.models.layers import BatchNorm
from segkd.pipeline.models.network import NetworkConfig
from segkd.pipeline.models.references import load_network
from segkd.pipeline.student.batch_norm import BatchNormMode, BatchNorms
from segkd.pipeline.student.config import TrainConfig
from segkd.pipeline.student.ema import Ema, ema_decay
from segkd.storage.errors import ConfigError, NetworkError

MODES: tuple[BatchNormMode, ...] = get_args(BatchNormMode)


class Activated(nn.BatchNorm2d):
    """A layer from elsewhere that does more than its name says."""

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x), 0.2)


def small(momentum: float | None = 0.1) -> nn.Sequential:
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1),
        Activated(6, momentum=momentum),
        nn.Conv2d(6, 5, 1),
        BatchNorm(5),
        nn.ReLU(inplace=True),
    )
    for layer in (network[1], network[3]):
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.normal_(layer.bias)
    return network


def built_in(reference: str) -> nn.Module:
    torch.manual_seed(1)
    arguments = {"width": 0.25} if reference == "deeplab-mobilenetv1" else {}
    network = load_network(NetworkConfig(reference=reference, arguments=arguments), 4).train()
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return network


def uncounted() -> nn.Sequential:
    """Layers that do not count their batches."""
    network = small()
    for layer in (network[1], network[3]):
        layer.num_batches_tracked = None
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "small": small,
    "cumulative": lambda: small(momentum=None),
    "uncounted": uncounted,
    "foreign": lambda: ForeignNetwork(small(), NetworkConfig(reference="x", stride=2), 5),
    "deeplab-mobilenetv1": lambda: built_in("deeplab-mobilenetv1"),
    "enet": lambda: built_in("enet"),
}


def images(*shifts: float, size: int = 32) -> Tensor:
    """One image a shift, around it, all different."""
    generator = torch.Generator().manual_seed(5)
    pictures = torch.randn((len(shifts), 3, size, size), generator=generator)
    return pictures + torch.tensor(shifts)[:, None, None, None]


def logits(network: nn.Module, mode: BatchNormMode, x: Tensor, labelled: int) -> Tensor:
    with BatchNorms(network, mode).of_batch(labelled, len(x)):
        found: Tensor = network(x)
    return found


def gradient(network: nn.Module, output: Tensor) -> list[Tensor]:
    """Of a loss that weighs every logit differently."""
    loss = (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()
    return list(torch.autograd.grad(loss, list(network.parameters())))


def buffers(network: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_joint_is_the_network_as_it_is(make: Callable[[], nn.Module]) -> None:
    plain, network = make(), make()
    x = images(0, 0, 2, 3)
    expected, found = plain(x), logits(network, "joint", x, 2)
    assert torch.equal(found, expected)
    assert all(map(torch.equal, gradient(network, found), gradient(plain, expected)))
    assert all(map(torch.equal, network.buffers(), plain.buffers()))


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_separate_is_a_pass_of_each_part_and_keeps_the_labelled_ones_statistics(make: Callable[[], nn.Module]) -> None:
    plain, network = make(), make()
    x = images(0, 0.3, 2, 3, -1)
    other = copy.deepcopy(plain)
    expected = torch.cat([plain(x[:2]), other(x[2:])])
    found = logits(network, "separate", x, 2)
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    loss = (expected * weights).sum()
    # Two networks of the same weights: the gradients add.
    both = [torch.autograd.grad(loss, list(each.parameters()), retain_graph=True) for each in (plain, other)]
    together = [a + b for a, b in zip(*both, strict=True)]
    torch.testing.assert_close(gradient(network, found), together, rtol=1e-3, atol=1e-3)
    assert_close(buffers(network), buffers(plain))


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_frozen_is_the_network_in_eval_mode(make: Callable[[], nn.Module]) -> None:
    plain, network = make(), make()
    x = images(0, 0.3, 2, 3)
    plain(x), network(x)  # so that there are statistics
    before = buffers(network)
    expected, found = plain.eval()(x), logits(network, "frozen", x, 2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(network, found), gradient(plain, expected), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    assert all(module.training for module in network.modules())


def by_formula(network: nn.Sequential, x: Tensor, labelled: int) -> Tensor:
    """``small`` with every crop normalised by the labelled ones' mean and variance."""
    first, activated, second, last, _ = network
    for convolution, layer in ((first, activated), (second, last)):
        x = convolution(x)
        known = x[:labelled].transpose(0, 1).flatten(1)
        mean = known.mean(1)[:, None, None]
        deviation = ((known - known.mean(1, keepdim=True)).square().mean(1) + layer.eps).sqrt()[:, None, None]
        x = (x - mean) / deviation * layer.weight[:, None, None] + layer.bias[:, None, None]
        x = torch.where(x > 0, x, 0.2 * x) if layer is activated else x.clamp_min(0)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labelled_is_the_formula_and_so_are_its_gradients(dtype: torch.dtype) -> None:
    network, plain = small().to(dtype), small().to(dtype)
    x = images(0, 0.3, 2, 3, -1).to(dtype)
    expected, found = by_formula(plain, x, 2), logits(network, "labelled", x, 2)
    torch.testing.assert_close(found, expected)
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype is torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(gradient(network, found), gradient(plain, expected), **tolerance)
    plain(x[:2])
    assert_close(buffers(network), buffers(plain))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d, (5, 3)),
        (nn.BatchNorm1d, (5, 3, 4)),
        (nn.BatchNorm2d, (5, 3, 4, 2)),
        (nn.BatchNorm3d, (5, 3, 2, 2, 2)),
    ],
)
def test_labelled_statistics_in_any_dimensions(layer: type[nn.Module], shape: tuple[int, ...]) -> None:
    """Numerical derivatives, by auxiliary and labelled features alike."""
    network = layer(3).double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: logits(network, "labelled", x, 3), x)
    plain = layer(3).double()
    kept = x.detach()[:3].transpose(0, 1).flatten(1)
    expected = (x.transpose(0, 1).flatten(1) - kept.mean(1, keepdim=True)) / (
        kept.var(1, correction=0, keepdim=True) + plain.eps
    ).sqrt()
    found = logits(plain, "labelled", x, 3)
    torch.testing.assert_close(found.transpose(0, 1).flatten(1), expected)


@pytest.mark.parametrize("mode", ["labelled", "separate", "frozen"])
def test_auxiliary_crops_move_neither_labelled_logits_nor_the_statistics_that_are_kept(mode: BatchNormMode) -> None:
    found = []
    for shift in (0.0, 50.0):
        network = built_in("deeplab-mobilenetv1")
        network(images(0, 1, 2))
        found.append((logits(network, mode, images(0, 0.3, shift, -shift), 2)[:2], buffers(network)))
    (first, first_buffers), (second, second_buffers) = found
    torch.testing.assert_close(first, second)
    assert_close(first_buffers, second_buffers)
    moved = [logits(small(), "joint", images(0, 0.3, shift, shift), 2)[:2] for shift in (0.0, 50.0)]
    assert not torch.allclose(*moved, atol=0.1)


@pytest.mark.parametrize("mode", ["labelled", "separate"])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_where_both_parts_hold_the_same_images_modes_agree(make: Callable[[], nn.Module], mode: BatchNormMode) -> None:
    joint, network = make(), make()
    x = images(0, 0.5).repeat(2, 1, 1, 1)
    expected, found = logits(joint, "joint", x, 2), logits(network, mode, x, 2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-3, atol=1e-3)
    held = buffers(network)
    for name, expected_buffer in buffers(joint).items():
        # The variance that is kept is the unbiased one, n / (n - 1), which half as many values make a bit larger.
        slack = 0.1 if name.endswith("running_var") else 1e-3
        torch.testing.assert_close(held[name], expected_buffer, rtol=slack, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_the_network_is_left_as_it_was(mode: BatchNormMode) -> None:
    network, x = small(), images(0, 1, 2)
    names, attributes = list(network.state_dict()), [set(vars(module)) for module in network.modules()]
    norms = BatchNorms(network, mode)
    with norms.of_batch(1, 3):
        network(x)
    with pytest.raises(RuntimeError), norms.of_batch(1, 3):
        network(x[:, :2])
    assert list(network.state_dict()) == names
    assert [set(vars(module)) for module in network.modules()] == attributes
    assert all(module.training for module in network.modules())
    assert network[1].track_running_stats
    copy.deepcopy(network)
    plain = small()
    plain.load_state_dict(network.state_dict())
    assert torch.equal(plain.eval()(x), network.eval()(x))


@pytest.mark.parametrize("mode", ["labelled", "separate"])
def test_a_batch_of_one_kind_is_normalised_as_ever(mode: BatchNormMode) -> None:
    network, plain, x = small(), small(), images(0, 1, 2)
    assert torch.equal(logits(network, mode, x, 3), plain(x))
    assert all(map(torch.equal, network.buffers(), plain.buffers()))


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_is_in_eval_mode_by_itself_stays_so(mode: BatchNormMode) -> None:
    network = small()
    network[1].eval()
    before = buffers(network[1])
    logits(network, mode, images(0, 1, 2, 3), 2)
    assert all(torch.equal(buffer, before[name]) for name, buffer in network[1].named_buffers())
    assert not network[1].training


@pytest.mark.parametrize("mode", ["joint", "labelled", "separate"])
def test_a_layer_without_running_statistics_uses_those_of_the_batch(mode: BatchNormMode) -> None:
    network, plain = (nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)) for _ in range(2))
    x = images(0, 0.3, 2, 3)
    norm = F.batch_norm
    expected = {
        "joint": norm(x, None, None, training=True),
        "labelled": torch.cat([norm(x[:2], None, None, training=True), (x[2:] - mean_of(x)) / deviation_of(x)]),
        "separate": torch.cat([norm(part, None, None, training=True) for part in (x[:2], x[2:])]),
    }[mode]
    torch.testing.assert_close(logits(network, mode, x, 2), expected)
    assert network[0].running_mean is None
    assert list(network.state_dict()) == list(plain.state_dict())


def mean_of(x: Tensor) -> Tensor:
    return x[:2].mean((0, 2, 3), keepdim=True)


def deviation_of(x: Tensor) -> Tensor:
    return (x[:2].var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("mode", MODES)
def test_mixed_precision_stays_near(mode: BatchNormMode) -> None:
    x = images(0, 0.3, 2, 3)
    exact = logits(small(), mode, x, 2)
    with torch.autocast("cpu", torch.bfloat16):
        rough = logits(small(), mode, x, 2)
    torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.1)


def test_an_average_takes_in_the_statistics_that_are_kept() -> None:
    network = small()
    ema = Ema(network, 0.9)
    expected = buffers(network)
    for step in range(3):
        logits(network, "separate", images(step, 1, 9, 9), 2)
        ema.update(step)
        for name, buffer in network.named_buffers():
            if buffer.is_floating_point():
                expected[name] += (1 - ema_decay(step, 0.9)) * (buffer - expected[name])
            else:
                expected[name] = buffer.clone()
    assert_close(buffers(ema.network), expected)


class Folding(nn.Module):
    """Cuts each image into two before its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(torch.cat(x.chunk(2, dim=2)))
        return out


def test_what_cannot_be_told_apart_is_refused() -> None:
    with pytest.raises(NetworkError) as caught:
        logits(Folding(), "separate", images(0, 1, 2), 1)
    assert str(caught.value) == (
        "the student's batch-norm layer norm got 6 rows for 3 crops, so which of them are labelled is unknown; "
        'set train.batch_norm, now "separate", to "joint" or "frozen"'
    )
    assert logits(Folding(), "frozen", images(0, 1, 2), 1).shape == (6, 3, 16, 32)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("mode", ["labelled", "separate", "frozen"])
def test_a_mode_that_could_do_nothing_is_refused(mode: BatchNormMode) -> None:
    example = images(0, 1)
    for network in (nn.Conv2d(3, 2, 1), torch.jit.trace(small().eval(), example)):
        with pytest.raises(ConfigError) as error:
            BatchNorms(network, mode)
        assert str(error.value) == (
            f'train.batch_norm is "{mode}", but the student has no batch-norm layer that it could act on '
            '(those of TorchScript and torch.export are out of reach); set it to "joint"'
        )
        BatchNorms(network, "joint")


def test_statistics_that_are_not_there_cannot_be_frozen() -> None:
    with pytest.raises(ConfigError) as error:
        BatchNorms(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), "frozen")
    assert str(error.value) == (
        'train.batch_norm is "frozen", but the student\'s layer 0 keeps no running statistics; '
        'choose "joint", "labelled" or "separate"'
    )


@pytest.mark.parametrize("mode", ["labelled", "separate"])
def test_statistics_of_labelled_crops_take_labelled_crops(mode: BatchNormMode) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig(batch_norm=mode, labelled=0, auxiliary=4)
    assert str(error.value) == (
        f'train.batch_norm is "{mode}" but train.labelled is 0, so there are no statistics of labelled crops to keep; '
        'choose "joint" or "frozen", or raise train.labelled'
    )
    TrainConfig(batch_norm="frozen", labelled=0, auxiliary=4)
