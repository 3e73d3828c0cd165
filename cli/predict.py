"""``segkd predict``: label maps and overlays for a folder."""

from __future__ import annotations

from typing import Literal

import click

from segkd.cli.options import (
    device_option,
    json_option,
    overwrite_option,
    progress,
    reference_option,
    resumable,
    show,
    verbosity_options,
)


@click.command("predict", short_help="Write label maps and overlays of a folder of images.")
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.argument("images", metavar="IMAGES")
@click.option("-o", "--output", metavar="FOLDER", required=True, help="Where label maps and overlays go.")
@click.option("--overlays/--no-overlays", default=True, show_default=True, help="Whether to write overlays too.")
@click.option(
    "--on-error",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help="What to do about an image that cannot be read.",
)
@reference_option
@device_option
@overwrite_option
@json_option
@verbosity_options
def predict(
    checkpoint: str,
    images: str,
    output: str,
    overlays: bool,
    on_error: Literal["fail", "skip"],
    reference: str | None,
    device: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Label every image in the folder IMAGES and below it with the network of CHECKPOINT.

    Writes FOLDER/labels/NAME.png, whose values are class indices, and FOLDER/overlays/NAME.jpg.
    """
    from pathlib import Path

    from segkd.pipeline.device import find_device
    from segkd.pipeline.evaluation.evaluate import checkpoint_predictor
    from segkd.pipeline.evaluation.prediction import images_below, predict_images

    found = images_below(Path(images), output=Path(output))
    predictor, classes = checkpoint_predictor(checkpoint, reference=reference, device=find_device(device))
    with (
        resumable("What is written is whole; add --overwrite to begin again."),
        progress().task("predicting", len(found)) as task,
    ):
        summary = predict_images(
            lambda image: predictor.predict([image]),
            found,
            Path(output),
            classes,
            overlays=overlays,
            overwrite=overwrite,
            on_error=on_error,
            on_image=lambda _: task.advance(),
        )
    text = [f"{summary.written:,} images labelled in {output}", *summary.skipped.values()]
    show(summary.to_dict(), "\n".join(text), as_json=as_json)
