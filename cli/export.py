"""``segkd export``: a network as a file that runs without segkd."""

from __future__ import annotations

import click

from segkd.cli.options import json_option, overwrite_option, reference_option, show, verbosity_options


@click.command("export", short_help="Write a network as ONNX or torch.export, checked.")
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.argument("output", metavar="OUTPUT")
@click.option(
    "--size",
    type=(int, int),
    metavar="HEIGHT WIDTH",
    required=True,
    help="The images that it is for, in pixels: --size 480 640.",
)
@click.option(
    "--labels/--no-labels",
    default=True,
    show_default=True,
    help="Whether it returns the class index of each pixel, too, or what the network says on its own grid alone.",
)
@reference_option
@overwrite_option
@json_option
@verbosity_options
def export(
    checkpoint: str,
    output: str,
    size: tuple[int, int],
    labels: bool,
    reference: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the network of CHECKPOINT to OUTPUT: NAME.onnx, or NAME.pt2 for torch.export.

    The file takes images N,3,HEIGHT,WIDTH (uint8, RGB, any number N) as they are: resizing, normalising and padding are
    part of it. What is written is run beside the checkpoint, on a photograph and on noise, before it appears at OUTPUT.
    """
    from pathlib import Path

    import torch

    from segkd.pipeline.evaluation.evaluate import checkpoint_predictor
    from segkd.pipeline.export import export as export_network

    predictor, classes = checkpoint_predictor(checkpoint, reference=reference, device=torch.device("cpu"))
    written = export_network(predictor, classes, Path(output), size=size, labels=labels, overwrite=overwrite)
    show(written.to_dict(), written.text(), as_json=as_json)
