"""Several processes that train one network: what comes of them is what one process makes of the same batches.

Run as a script, this file is one process of two.

Shapes: images N,3,H,W of which the first ones are labelled.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed
from click.testing import CliRunner
from torch import nn

from segkd.cli.main import main
from segkd.pipeline import processes
from segkd.pipeline.config import load
from segkd.pipeline.data.readers import open_data
from segkd.pipeline.data.stream import StreamConfig, TrainStream
from segkd.pipeline.models.network import Preprocessing
from segkd.pipeline.student import checkpoint
from segkd.pipeline.student.batch_norm import BatchNorms
from segkd.storage.errors import ConfigError, ProcessError

TWO = 2
PATIENCE = 300
"""Seconds."""


def neighbour(name: str) -> ModuleType:
    """Another test file of this folder."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_two(task: Callable[[str], Any], argument: str, folder: Path) -> list[Any]:
    """What a task of this file gives in each of two processes; the first error is raised."""
    running = [
        subprocess.Popen(
            [sys.executable, __file__, task.__name__, argument, str(folder), str(rank)], stderr=subprocess.PIPE
        )
        for rank in range(TWO)
    ]
    try:
        for child in running:
            _, errors = child.communicate(timeout=PATIENCE)
            assert child.returncode == 0, errors.decode()
    finally:
        for child in running:
            child.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(TWO)]


def normalised(mode: str) -> dict[str, Any]:
    """Logits, gradients and statistics of the second step of each network, of this process's part of the images."""
    given, (rank, among) = neighbour("test_batch_norm"), (processes.rank(), processes.count())
    found: dict[str, Any] = {}
    for name, make in given.NETWORKS.items():
        network = make().double()
        kinds = given.images(0, 0.3, 2, -1).double(), given.images(3, 1, -2, 0.5).double()
        labelled, others = (images[rank::among] for images in kinds)
        for _ in range(2):
            logits = given.logits(network, mode, torch.cat([labelled, others]), len(labelled))
        weights = torch.linspace(-1, 1, 8 * logits[0].numel(), dtype=torch.float64).view(2, 4, *logits.shape[1:])
        loss = (logits * weights[:, rank::among].flatten(0, 1)).sum()
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        found[name] = {
            "logits": logits.detach().view(2, -1, *logits.shape[1:]),
            "gradients": [processes.total(gradient) for gradient in gradients],
            "buffers": given.buffers(network),
        }
    return found


@pytest.mark.parametrize("mode", neighbour("test_batch_norm").MODES)
def test_statistics_are_those_of_all_processes(mode: str, tmp_path: Path) -> None:
    parts = in_two(normalised, mode, tmp_path)
    for name, whole in normalised(mode).items():
        for rank, part in enumerate(parts):
            torch.testing.assert_close(part[name]["logits"], whole["logits"][:, rank::TWO], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(part[name]["buffers"], whole["buffers"], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(part[name]["gradients"], whole["gradients"], rtol=1e-6, atol=1e-6)


def told(_: str) -> dict[str, Any]:
    """What processes tell each other, and what they say of what they cannot share."""
    rank = processes.rank()
    torch.manual_seed(rank)
    drawn = nn.Linear(3, 2)
    processes.take_over(drawn.parameters())
    others = [torch.arange(12)[::2] * (1 - rank), torch.full((2, 2), rank, dtype=torch.int16), torch.tensor(rank == 0)]
    processes.take_over(others)
    found = {
        "others": others,
        "everyones": processes.everyones(f"rank {rank}"),
        "any": [processes.any_of_them(rank == 1), processes.any_of_them(False)],
        "drawn": drawn.weight.detach(),
    }
    programs = (
        torch.jit.trace(nn.Conv2d(3, 2, 1), torch.zeros(1, 3, 4, 4)),  # type: ignore[no-untyped-call]
        torch.export.export(nn.Conv2d(3, 2, 1), (torch.zeros(1, 3, 4, 4),)).module(),
    )
    for program in programs:
        with pytest.raises(ConfigError) as refused:
            BatchNorms(program, "joint")
        found["program"] = str(refused.value)
    with pytest.raises(ConfigError) as refused:
        processes.require_alike({"samples": "some", "checkpoint": f"of rank {rank}", "seed": str(rank)})
    found["unlike"] = str(refused.value)
    processes.require_alike({"samples": "some"})
    if rank == 0:
        torch.distributed.destroy_process_group()
        return found
    try:
        processes.wait()
    except ProcessError as error:
        found["gone"] = str(error)
    return found


def test_what_processes_tell_each_other(tmp_path: Path) -> None:
    found = in_two(told, "", tmp_path)
    torch.manual_seed(0)
    drawn = nn.Linear(3, 2).weight.detach()
    for part in found:
        assert part["everyones"] == ["rank 0", "rank 1"]
        assert part["any"] == [True, False]
        torch.testing.assert_close(part["drawn"], drawn)
        torch.testing.assert_close(
            part["others"], [torch.arange(12)[::2], torch.zeros(2, 2, dtype=torch.int16), torch.tensor(True)]
        )
        assert part["program"] == (
            "the student is a program of TorchScript or torch.export, whose layers are out of reach, so that processes "
            "could not share their batch norm; train it in one process"
        )
        assert part["unlike"] == (
            "the processes of this run differ in checkpoint and seed; give all of them the same run file, and paths "
            "that lead to the same files on every machine"
        )
    assert re.fullmatch(
        r"process 1 of 2 cannot reach the others \(.+\); one of them that has ended has said why: put that right, and "
        "go on with --resume",
        found[1]["gone"],
    )


def test_one_process_needs_no_group() -> None:
    assert (processes.count(), processes.rank(), processes.leads()) == (1, 0, True)
    assert processes.everyones("a") == ["a"]
    assert [processes.any_of_them(wish) for wish in (True, False)] == [True, False]
    torch.testing.assert_close(processes.total(torch.tensor([2.0])), torch.tensor([2.0]))
    processes.wait()
    with processes.one_a_machine_first():
        pass
    with processes.joined("auto"):
        assert processes.count() == 1


def test_processes_share_a_batch_out(done: Path) -> None:
    """Each has as many of either kind, and nothing is in two parts."""
    run = load(done)
    source = open_data(run.data)
    whole = TrainStream(source, None, (), StreamConfig(labelled=4), run.augment, Preprocessing())
    parts = [
        TrainStream(source, None, (), StreamConfig(labelled=4, processes=2, rank=rank), run.augment, Preprocessing())
        for rank in range(TWO)
    ]
    for step in range(5):
        torch.testing.assert_close(parts[0][step].images_N3HW, whole[step].images_N3HW[0::2])
        torch.testing.assert_close(parts[1][step].labels_NHW, whole[step].labels_NHW[1::2])
    message = (
        "3 processes share a batch, and auxiliary is 4, which they cannot share equally: set it to a multiple, or "
        "start as many processes as divide it"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        StreamConfig(labelled=3, auxiliary=4, processes=3)


# ---- whole runs -----------------------------------------------------------------------------------------------------

NETWORK = '''
"""A network that rounding leaves near where it was; it tells what it drops, and signals, as the environment says."""
import os, signal
from multiprocessing import active_children
from pathlib import Path
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Small(nn.Module):
    def __init__(self, num_classes, drop=0.0, own=False):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.again = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.drop, self.head = nn.Dropout(drop), nn.Conv2d(8, num_classes, 1)
        self.calls = 0
        if own:
            self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        kept = checkpoint(self.again, self.drop(self.body(x)), use_reentrant=False)
        if self.training:
            self.calls += 1
            rank, act = os.environ.get("RANK", "0"), os.environ.get("ACT")
            if self.calls == 7 and act == "stop" and rank == "0":
                for process in (*(child.pid for child in active_children()), os.getpid(), os.getppid()):
                    os.kill(process, signal.SIGTERM)
            if self.calls == 7 and act == "die" and rank == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            if hasattr(self, "seen"):
                self.seen.lerp_(x.mean((0, 2, 3)), 0.1)
            if told := os.environ.get("TOLD"):
                with (Path(told) / rank).open("a") as file:
                    file.write("".join("01"[int(x > 0)] for x in self.drop(torch.ones(64))) + "\\n")
        return self.head(kept)
'''
SETTINGS = {
    "student.stride": "4",
    "train.steps": "12",
    "train.labelled": "4",
    "train.auxiliary": "2",
    "train.log_every": "1",
    "train.validate_every": "4",
    "train.checkpoint_every": "5",
    "train.optimiser": '"sgd"',
    "train.class_weights": '"log_frequency"',
    "train.ema": "0.5",
    "loss.ohem_threshold": "0.7",
    "knowledge.first_order.weight": "3",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[[Path], Path]) -> Path:
    """A run file with its cache, and a network."""
    run = make_run(tmp_path_factory.mktemp("processes"))
    (run.parent / "small.py").write_text(NETWORK)
    result = CliRunner().invoke(main, ["teacher-cache", "-c", str(run), "-q"])
    assert result.exit_code == 0, result.output
    return run


def settings(run: Path, **changed: str) -> list[str]:
    """The options of a run of the small network."""
    sets = {"student.reference": f'"{run.parent}/small.py:Small"'} | SETTINGS | changed
    return [
        "train-student",
        "-c",
        str(run),
        *(word for key, value in sets.items() for word in ("--set", f"{key}={value}")),
    ]


def torchrun(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in two processes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(TWO), "-m", "segkd"]
    return subprocess.run(
        [*start, *words], capture_output=True, text=True, timeout=PATIENCE, check=False, env=os.environ | environment
    )


def alone(*words: str) -> str:
    result = CliRunner().invoke(main, [*words])
    assert result.exit_code == 0, result.output
    return result.stdout


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_near(found: Path, expected: Path) -> None:
    """Measurements and networks that differ by rounding alone."""
    for one, other in zip(records(found), records(expected), strict=True):
        assert numbers(one) == pytest.approx(numbers(other), rel=1e-3, abs=1e-5)
    for name in ("last", "best"):
        (_, ours), (_, theirs) = (checkpoint.load(folder / f"{name}.safetensors") for folder in (found, expected))
        for key in ours.keys() | theirs.keys():
            if not key.startswith("rng."):
                torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4)


def numbers(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat |= numbers(value, f"{prefix}{name}/")
        elif name != "images_per_second":
            flat[prefix + name] = value
    return flat


def test_a_run_of_two_processes_is_that_of_one(place: Path, tmp_path: Path) -> None:
    alone(*settings(place), "-o", str(tmp_path / "one"), "-q")
    result = torchrun(*settings(place), "-o", str(tmp_path / "two"), "-q")
    assert result.returncode == 0, result.stderr
    # One of the two tells.
    assert result.stdout.count("12 steps, best at step") == 1
    assert_near(tmp_path / "two", tmp_path / "one")
    described = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
    assert [document.pop("processes") for document in described] == [1, 2]
    assert described[0] == described[1]


def test_a_stopped_run_of_two_processes_goes_on_in_one(place: Path, tmp_path: Path) -> None:
    """A scheduler asks torchrun to end, one of the processes and what prepares its batches."""
    result = torchrun(*settings(place, **{"train.workers": "1"}), "-o", str(tmp_path / "stopped"), ACT="stop")
    assert result.returncode != 0
    said = re.search(
        r"Interrupted\. (SIGTERM|a signal) stopped the run after step (\d+) of 12; it is saved in", result.stderr
    )
    assert said is not None, result.stderr
    state, _ = checkpoint.load(tmp_path / "stopped" / "last.safetensors")
    assert state.step == int(said[2]) >= 7
    alone(*settings(place), "-o", str(tmp_path / "stopped"), "--resume", "-q")
    alone(*settings(place), "-o", str(tmp_path / "whole"), "-q")
    assert_near(tmp_path / "stopped", tmp_path / "whole")


def test_a_process_that_dies_takes_the_others_with_it(place: Path, tmp_path: Path) -> None:
    """What was saved goes on as if nothing had happened; each process drops something else meanwhile."""
    dropping = settings(place, **{"student.arguments": "{drop = 0.5, own = true}"})
    told = {}
    for name, runs in {"whole": [{}], "died": [{"ACT": "die"}, {}]}.items():
        for environment in runs:
            (tmp_path / f"{name}-told").mkdir(exist_ok=True)
            result = torchrun(
                *dropping, "-o", str(tmp_path / name), "--resume", TOLD=str(tmp_path / f"{name}-told"), **environment
            )
            assert (result.returncode == 0) == (not environment), result.stderr
            assert result.stderr.count("Warning: network.seen of the student differ from process to process") == 1
            if environment:
                assert "\nError: process 0 of 2 cannot reach the others (" in result.stderr
                state, _ = checkpoint.load(tmp_path / name / "last.safetensors")
                assert state.step == 5
        told[name] = [(tmp_path / f"{name}-told" / str(rank)).read_text().split() for rank in range(TWO)]
    assert_near(tmp_path / "died", tmp_path / "whole")
    assert [part[-7:] for part in told["died"]] == [part[-7:] for part in told["whole"]]
    assert len({*told["whole"][0], *told["whole"][1]}) == 24


def test_what_processes_cannot_share_is_refused(place: Path, tmp_path: Path) -> None:
    result = torchrun(*settings(place, **{"train.labelled": "3"}), "-o", str(tmp_path / "odd"))
    assert result.returncode != 0
    assert "Error: 2 processes share a batch, and labelled is 3, which they cannot share equally" in result.stderr
    assert not (tmp_path / "odd").exists()


def test_an_environment_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes.started() == 1
    monkeypatch.setenv("RANK", "0")
    message = (
        "RANK and WORLD_SIZE are set, as torchrun sets them, but not MASTER_ADDR and MASTER_PORT; start with torchrun, "
        "or unset them all to train in one process"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"), processes.joined("cpu"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "")
    assert processes.started() == 1


def test_a_device_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name, value in zip(names, ("1", "2", "1", "localhost", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "find_device", torch.device)
    with (
        pytest.raises(
            ConfigError,
            match=r'^train\.device is "cuda:1", which several processes cannot share; set it to "auto", and each takes '
            r"the GPU of its number$",
        ),
        processes.joined("cuda:1"),
    ):
        pass
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with (
        pytest.raises(
            ConfigError,
            match=r"^process 1 of this machine finds 1 devices of type cuda; give torchrun a --nproc-per-node of at "
            r"most that$",
        ),
        processes.joined("cuda"),
    ):
        pass


if __name__ == "__main__":
    task, argument, folder, rank = sys.argv[1:]
    torch.set_num_threads(1)
    os.environ |= {"RANK": rank, "WORLD_SIZE": str(TWO)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=int(rank), world_size=TWO)
    torch.save(globals()[task](argument), Path(folder) / f"{rank}.pt")
