"""``segkd evaluate``: scores and speed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from segkd.cli.options import (
    ROLES,
    device_option,
    json_option,
    progress,
    reference_option,
    run_options,
    show,
    verbosity_options,
)

if TYPE_CHECKING:
    from segkd.pipeline.config import RunConfig


@click.command("evaluate", short_help="Score a checkpoint, a network or a cached teacher.")
@click.argument("checkpoint", metavar="[CHECKPOINT]", required=False)
@click.option("--teacher", "subject", flag_value="teacher", help="Score the network of the run file's [teacher].")
@click.option("--student", "subject", flag_value="student", help="Score the network of the run file's [student].")
@click.option("--cache", "subject", flag_value="cache", help="Score the teacher as the run's cache keeps it.")
@click.option("--role", type=click.Choice(ROLES), default="report", show_default=True, help="The samples to score.")
@click.option("--speed", is_flag=True, help="Measure the network's latency too, at the size of the first sample.")
@reference_option
@device_option
@run_options(required=False)
@json_option
@verbosity_options
def evaluate(
    run: RunConfig | None,
    checkpoint: str | None,
    subject: str | None,
    role: str,
    speed: bool,
    reference: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Score CHECKPOINT, a network of the run file, or a cached teacher: IoU a class, mIoU, mAcc, aAcc, boundary mIoU.

    The data are those of the run file; without one, those that CHECKPOINT was trained with.
    """
    if (checkpoint is None) == (subject is None):
        raise click.UsageError("Name one thing to score: CHECKPOINT, --teacher, --student or --cache.")
    if speed and subject == "cache":
        raise click.UsageError("--speed times a network, and a cache has none: leave it out, or score --teacher.")
    if reference is not None and checkpoint is None:
        raise click.UsageError("--reference names the code of a CHECKPOINT's network: name the CHECKPOINT too.")
    if run is None and checkpoint is None:
        raise click.UsageError(f"Missing option '-c' / '--config': the run file that describes the {subject}.")

    from segkd.pipeline.data.readers import open_data
    from segkd.pipeline.data.sample import Role
    from segkd.pipeline.device import find_device
    from segkd.pipeline.evaluation import evaluate as evaluation
    from segkd.pipeline.models.references import described_predictor
    from segkd.pipeline.student.leaks import beginnings, look_for_label_leaks
    from segkd.pipeline.teacher.named import require_named_teacher
    from segkd.storage.reader import CacheReader

    data = run.data if run is not None else evaluation.data_of_checkpoint(str(checkpoint))
    source = open_data(data)
    if run is not None and checkpoint is None:
        asked = list(beginnings(run.student if subject == "student" else run.teacher))
    else:
        asked = [Path(str(checkpoint))]

    def warn() -> None:
        if data.compare_contents != "off":
            look_for_label_leaks(asked, source, [Role(role)], progress())

    if run is not None and subject == "cache":
        cache = CacheReader(run.cache.path)
        require_named_teacher(cache.spec, run.teacher, cache.path)
        warn()
        result = evaluation.evaluate_cache(cache, source, Role(role), progress=progress())
    else:
        where = find_device(device)
        if run is None or checkpoint is not None:
            predictor, _ = evaluation.checkpoint_predictor(
                str(checkpoint), source.classes, reference=reference, device=where
            )
        else:
            network = run.the_teacher() if subject == "teacher" else run.the_student()
            predictor = described_predictor(network, source.classes.names, device=where)
        warn()
        result = evaluation.evaluate_network(predictor, source, Role(role), speed=speed, progress=progress())
    show(result.to_dict(), result.text(), as_json=as_json)
