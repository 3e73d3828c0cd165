"""What the paper's rows take at full size, worked out without the data: networks, images, schedule, bytes, hours.

    python benchmarks/paper.py [--bytes-per-cell 2] [--teraflops 100] [--json]

Nothing is run. Networks are built and their multiplications counted; images are those of the official lists at their
usual size. `--bytes-per-cell` (both targets of `cache.max_kl` = 1e-3; CamVid's are in docs/results/) and `--teraflops`
(what a GPU really delivers a second) are assumptions to be replaced by one's own. Once the data and a teacher are
there, `segkd plan --config configs/paper/NAME.toml` measures instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path

from segkd.pipeline.config import load
from segkd.pipeline.evaluation.speed import count_flops, count_parameters
from segkd.pipeline.models.references import described, load_network

CONFIGS = Path(__file__).parents[1] / "configs" / "paper"


@dataclass(frozen=True)
class DataSet:
    """What its authors say of it: classes; images of role train, auxiliary and report; height and width of most."""

    classes: int
    train: int
    auxiliary: int
    report: int
    size: tuple[int, int]
    auxiliary_size: tuple[int, int]


DATA = {
    "pascal-context": DataSet(59, 4_998, 123_403, 5_105, (375, 500), (480, 640)),
    "cityscapes": DataSet(19, 2_975, 19_998, 500, (1024, 2048), (1024, 2048)),
    "voc2012": DataSet(21, 10_582, 123_403, 1_449, (375, 500), (480, 640)),
}


@dataclass(frozen=True)
class Size:
    """One data set's rows at full size."""

    data: str
    classes: int
    teacher_parameters: int
    student_parameters: int
    train: int
    auxiliary: int
    report: int
    steps: int
    images_a_step: int
    labelled_passes_alone: float
    """How often the student alone sees each labelled image."""
    cells: int
    """Of the teacher, over all images in the cache."""
    cache_gigabytes: float
    stage_1_hours: float
    teacher_training_hours: float
    student_training_hours: float
    """Of one row: a pass back costs two forward."""


def size_of(name: str, bytes_per_cell: float, teraflops: float) -> Size:
    run, of_teacher, data = load(CONFIGS / f"{name}.toml"), load(CONFIGS / f"{name}-teacher.toml"), DATA[name]
    teacher, student = (
        # Without memory or values: multiplications are counted, not done.
        load_network(replace(described(each.the_student()), init=None), data.classes).to("meta")
        for each in (of_teacher, run)
    )
    stride = teacher.grid.stride
    cells, flops = 0, 0.0
    for count, (height, width) in ((data.train, data.size), (data.auxiliary, data.auxiliary_size)):
        cells += count * -(-height // stride) * -(-width // stride)
        flops += count * count_flops(teacher, (height, width))
    images = run.train.labelled + run.train.auxiliary
    seen = run.train.steps * images
    an_hour = teraflops * 1e12 * 3600
    return Size(
        data=name,
        classes=data.classes,
        teacher_parameters=count_parameters(teacher),
        student_parameters=count_parameters(student),
        train=data.train,
        auxiliary=data.auxiliary,
        report=data.report,
        steps=run.train.steps,
        images_a_step=images,
        labelled_passes_alone=seen / data.train,
        cells=cells,
        cache_gigabytes=cells * bytes_per_cell / 1e9,
        stage_1_hours=flops / an_hour,
        teacher_training_hours=3 * seen * count_flops(teacher, run.augment.crop) / an_hour,
        student_training_hours=3 * seen * count_flops(student, run.augment.crop) / an_hour,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes-per-cell", type=float, default=2.0, help="of both targets, tables included")
    parser.add_argument("--teraflops", type=float, default=100.0, help="a second, as the device really delivers")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    sizes = [size_of(name, arguments.bytes_per_cell, arguments.teraflops) for name in DATA]
    if arguments.json:
        print(json.dumps({"assumed": vars(arguments), "sizes": [dataclasses.asdict(size) for size in sizes]}))
        return
    heading, *rows = dataclasses.fields(Size)
    print(f"| | {' | '.join(getattr(size, heading.name) for size in sizes)} |\n|{'---|' * (1 + len(sizes))}")
    for row in rows:
        print(f"| {row.name.replace('_', ' ')} | {' | '.join(_shown(getattr(size, row.name)) for size in sizes)} |")
    print(f"\nAssumed: {arguments.bytes_per_cell:g} bytes a cell, {arguments.teraflops:g} TFLOP/s delivered.")


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
