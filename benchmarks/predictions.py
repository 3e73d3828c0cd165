"""What several networks make of the same samples of role report, side by side, as one picture.

    python benchmarks/predictions.py --config configs/camvid-s.toml --output docs/results/camvid-s.png \
        teacher=docs/results/camvid-teacher.safetensors alone=runs/camvid-s-ladder/alone/seed-3/last.safetensors \
        auxiliary-zero-first=runs/camvid-s-ladder/auxiliary-zero-first/seed-3/last.safetensors

A row a sample, evenly spread; a column a network, with the share of the labelled pixels that it gets wrong. Neither
images nor labels are shown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from segkd.pipeline.config import load
from segkd.pipeline.data.readers import open_data
from segkd.pipeline.data.sample import IGNORE, DataSource, Role, Sample, with_role
from segkd.pipeline.device import find_device
from segkd.pipeline.evaluation.evaluate import checkpoint_predictor
from segkd.pipeline.evaluation.pictures import Picture, colourise, sheet
from segkd.pipeline.evaluation.pixels import label_map
from segkd.pipeline.models.predictor import Predictor


def picture_of(source: DataSource, sample: Sample, name: str, predictor: Predictor) -> tuple[str, Picture]:
    """A network's classes of one image, and what it is called."""
    image = source.image(sample)
    log_probs, mapping = predictor.predict([image], [sample.id])
    predicted = label_map(log_probs, mapping, *image.shape[:2]).cpu().numpy()
    labels = source.labels(sample)
    wrong = 100 * (labels != predicted)[labels != IGNORE].mean()
    return f"{name}, {wrong:.1f} % wrong", colourise(predicted, source.classes.palette)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", metavar="NAME=CHECKPOINT", help="what to show, left to right")
    parser.add_argument("--config", required=True, help="a run file with [data]")
    parser.add_argument("--output", type=Path, required=True, help="the picture")
    parser.add_argument("--samples", type=int, default=4, help="of role report, evenly spread")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source = open_data(load(arguments.config).data)
    report = with_role(source, Role.REPORT)
    count = min(arguments.samples, len(report))
    chosen = [report[k * len(report) // count] for k in range(count)]
    predictors = []
    for network in arguments.networks:
        name, given, checkpoint = network.partition("=")
        if not given:
            parser.error(f"{network}: expected NAME=CHECKPOINT")
        predictors.append((name, checkpoint_predictor(checkpoint, source.classes, device=find_device("cpu"))[0]))
    rows = [[picture_of(source, sample, name, predictor) for name, predictor in predictors] for sample in chosen]
    classes = source.classes
    sheet(rows, list(zip(classes.names, classes.palette, strict=True))).save(arguments.output)
    print(f"{arguments.output}: {', '.join(sample.id for sample in chosen)}")


if __name__ == "__main__":
    main()
