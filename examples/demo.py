"""Both stages on the built-in scenes, from nothing: a teacher, its cache, three students, a table and pictures.

    make demo                                   # or: python examples/demo.py --output runs/demo

Every step is a segkd command that you could type yourself; it is printed before it runs. What an interrupted demo has
finished is not done again. The three students differ in nothing but what they learn from: the same network from the
same initialisation, the same number of steps, images a step, crops, schedule.

One seed on synthetic scenes shows how the tool works. It is not evidence that distillation helps.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from segkd.cli.main import main as segkd
from segkd.cli.options import Interrupted
from segkd.pipeline.config import load
from segkd.pipeline.data.readers import open_data
from segkd.pipeline.data.sample import Role, with_role
from segkd.pipeline.device import find_device
from segkd.pipeline.evaluation.evaluate import checkpoint_predictor
from segkd.pipeline.evaluation.pictures import comparison
from segkd.pipeline.evaluation.pixels import label_map

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
IMAGES_A_STEP = 8


@dataclass(frozen=True)
class Arm:
    """A student: what it learns from."""

    name: str
    folder: str
    distill: bool
    auxiliary: int

    def arguments(self) -> list[str]:
        """What sets it apart, for ``segkd train-student``."""
        batch = [f"train.labelled={IMAGES_A_STEP - self.auxiliary}", f"train.auxiliary={self.auxiliary}"]
        options = [] if self.distill else ["--no-distill"]
        return [*options, *(part for setting in batch for part in ("--set", setting))]


ARMS = (
    Arm("student alone", "alone", False, 0),
    Arm("student, distilled", "distilled", True, 0),
    Arm("student, distilled + auxiliary", "auxiliary", True, IMAGES_A_STEP // 2),
)


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="where everything goes")
    parser.add_argument("--config", default=str(CONFIGS / "demo.toml"), help="run file of cache and students")
    parser.add_argument("--teacher-config", default=str(CONFIGS / "demo-teacher.toml"), help="run file of the teacher")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for both run files")
    options = parser.parse_args()
    began = time.monotonic()
    output: Path = options.output
    shared = [part for setting in options.set for part in ("--set", setting)]
    teacher = output / "teacher" / "last.safetensors"
    run = [
        *("--config", options.config),
        *("--set", f"teacher.reference={json.dumps(str(teacher))}"),
        *("--set", f"cache.path={json.dumps(str(output / 'cache.zarr'))}"),
        *shared,
    ]

    say("The built-in scenes")
    command("data", "check", "--config", options.config, *shared)
    say("The teacher, trained on the labelled scenes alone")
    plain = ["--no-distill", "--resume", "--config", options.teacher_config, *shared]
    command("train-student", *plain, "--output", str(teacher.parent))
    say("Stage 1: the teacher looks at every scene once")
    command("teacher-cache", *run)
    say("Stage 2: three students, the same in all but what they learn from")
    for arm in ARMS:
        command("train-student", "--resume", *run, *arm.arguments(), "--output", str(output / arm.folder))

    say("Scores on role report, which nobody has learned or chosen from")
    rows = [("teacher", scores(str(teacher), "--speed", *run)), ("teacher, from the cache", scores("--cache", *run))]
    rows += [(arm.name, scores(str(last(output, arm)), "--speed", *run)) for arm in ARMS]
    pictures = draw(output, run, [("teacher", teacher), *((arm.name, last(output, arm)) for arm in ARMS)])
    command("report", str(output), "--overwrite", "--output", str(output / "runs.html"))
    (output / "report.json").write_text(json.dumps(dict(rows), indent=1) + "\n")
    print(table(rows))
    print(
        f"\nOne seed: a demonstration, not evidence. {time.monotonic() - began:.0f} s in all."
        f"\nPictures: {', '.join(map(str, pictures))}; figures: {output / 'report.json'}; "
        f"curves, and scores on role select: {output / 'runs.html'}"
    )


def say(title: str) -> None:
    """A heading."""
    print(f"\n== {title}", flush=True)


def command(*arguments: str) -> None:
    """Runs a segkd command in this process, and ends the demo with its status if it fails."""
    print("$ segkd", *arguments, flush=True)
    status = segkd.main(args=list(arguments), prog_name="segkd", standalone_mode=False)
    if status:
        sys.exit(status)


def scores(*arguments: str) -> dict[str, Any]:
    """What ``segkd evaluate --json`` prints."""
    printed = io.StringIO()
    print("$ segkd evaluate --json", *arguments, flush=True)
    with contextlib.redirect_stdout(printed):
        status = segkd.main(
            args=["evaluate", "--json", "--quiet", *arguments], prog_name="segkd", standalone_mode=False
        )
    if status:
        sys.exit(status)
    found: dict[str, Any] = json.loads(printed.getvalue())
    return found


def last(output: Path, arm: Arm) -> Path:
    """The averaged network of an arm's last step: no step was chosen by looking at scores."""
    return output / arm.folder / "last.safetensors"


def table(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The scores side by side; the gains are over the student alone."""
    alone = dict(rows)[ARMS[0].name]["scores"]["miou"]
    width = max(len(name) for name, _ in rows)
    lines = [f"\n{'on role report':{width}}   mIoU   gain  boundary  parameters   GFLOPs  ms (p50)"]
    for name, found in rows:
        miou, boundary, cost = found["scores"]["miou"], found["scores"]["boundary_miou"], found["cost"]
        gain = f"{miou - alone:+6.2f}" if name.startswith("student") else "      "
        line = f"{name:{width}}  {miou:5.2f} {gain}     {boundary:5.2f}"
        if cost is not None:
            line += f"  {cost['parameters']:10,}  {cost['flops'] / 1e9:7.2f}  {cost['latency']['p50_ms']:8.1f}"
        lines.append(line)
    return "\n".join(lines)


def draw(output: Path, run: Sequence[str], networks: Sequence[tuple[str, Path]]) -> list[Path]:
    """Side-by-side pictures of two report scenes, and a sheet of what the cache keeps of one."""
    config = load(run[1], run[3::2])
    source = open_data(config.data)
    device = find_device("auto")
    samples = with_role(source, Role.REPORT)[:: max(1, len(with_role(source, Role.REPORT)) // 2)][:2]
    paths = []
    for number, sample in enumerate(samples):
        image = source.image(sample)
        predictions: dict[str, npt.NDArray[np.uint8]] = {}
        for name, path in networks:
            predictor, _ = checkpoint_predictor(path, source.classes, device=device)
            log_probs, mapping = predictor.predict([image])
            predictions[name] = label_map(log_probs, mapping, *image.shape[:2]).numpy()
        paths.append(output / f"comparison-{number}.png")
        comparison(image, source.labels(sample), predictions, source.classes).save(paths[-1])
    command("cache", "show", samples[0].id, "--overwrite", "--output", str(output / "targets"), *run)
    return [*paths, output / "targets"]


if __name__ == "__main__":
    try:
        main()
    except (Interrupted, KeyboardInterrupt):
        print("\nInterrupted. The same command goes on with what is left.", file=sys.stderr)
        sys.exit(Interrupted.exit_code)
