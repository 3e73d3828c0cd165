"""Runs as one HTML page that needs nothing beside it: no script, no other file, no network."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from segkd import __version__
from segkd.pipeline.output import replacing
from segkd.pipeline.report import SELECT, Group, Run, differing_settings
from segkd.storage.errors import OutputExistsError

_TEMPLATE = Path(__file__).with_name("report.html")
SCORES = {"miou": "mIoU", "boundary_miou": "boundary mIoU", "macc": "mAcc", "aacc": "aAcc"}
LOGGED_APART = ("loss", "learning_rate", "images_per_second")
"""What is logged beside the terms of the loss."""


@dataclass(frozen=True)
class Chart:
    """Curves of one number of all groups."""

    title: str
    curve: str
    """Its path in metrics.jsonl."""
    logarithmic: bool = False


@dataclass(frozen=True)
class Mark:
    """What tells a group's curves from others."""

    colour: str
    dashes: str
    """As matplotlib names it."""

    @property
    def border(self) -> str:
        """The same, as a style sheet names it."""
        return {"-": "solid", "--": "dashed", ":": "dotted"}[self.dashes]


_DASHES = ("-", "--", ":")


def charts_of(groups: Sequence[Group]) -> Iterator[Chart]:
    """What there is to draw: validations, the loss and its terms, their gradients, the learning rate."""
    names = dict.fromkeys(name for group in groups for run in group.runs for name in run.curves)
    yield Chart("mIoU on role select", f"{SELECT}/miou")
    yield Chart("boundary mIoU on role select", f"{SELECT}/boundary_miou")
    yield Chart("loss, weighted", "loss")
    yield from (Chart(name, name) for name in names if "/" not in name and name not in LOGGED_APART)
    gradients = (name for name in names if name.startswith("gradient/"))
    yield from (Chart(f"norm of the gradient: {name.partition('/')[2]}", name, logarithmic=True) for name in gradients)
    yield Chart("learning rate", "learning_rate")


def page(groups: Sequence[Group], tables: Mapping[str, str], title: str) -> str:
    """The page of groups of runs; ``tables`` are what sweeps have printed, by folder."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(number=_number, shown=_shown)
    drawn = [(chart.title, svg) for chart in charts_of(groups) if (svg := _draw(chart, groups)) is not None]
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        version=__version__,
        groups=list(zip(groups, _marks(len(groups)), strict=True)),
        scores=SCORES,
        differing=differing_settings(groups),
        charts=drawn,
        classes=_classes(groups),
        tables=tables,
        made_with=_made_with([run for group in groups for run in group.runs]),
    )


def sweep_tables(folders: Sequence[Path]) -> dict[str, str]:
    """What ``segkd ablate`` has written of its arms, by the folder that it stands in."""
    found = (path for folder in folders for path in sorted(folder.rglob("table.md")))
    return {str(path.parent): path.read_text() for path in found}


def write_page(path: Path, text: str, *, overwrite: bool = False) -> None:
    """Writes a page. Raises OutputExistsError for one that stands, and OSError for a disk that is full."""
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists; choose another name or allow it with --overwrite")
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _classes(groups: Sequence[Group]) -> list[tuple[str, list[float | None]]]:
    """IoU by class and group."""
    scores = (found for group in groups for found in group.validations)
    names = dict.fromkeys(name for found in scores for name in found["per_class"])
    return [(name, [group.iou(name) for group in groups]) for name in names]


def _made_with(runs: Sequence[Run]) -> dict[str, str]:
    """What the runs ran on, each kind with all that was seen of it."""
    rows: dict[str, dict[str, None]] = {}
    for run in runs:
        told = {
            **run.description["versions"],
            "device": run.description["device"],
            "threads": run.description["threads"],
        }
        for name, value in told.items():
            rows.setdefault(name, {})[str(value)] = None
    return {name: ", ".join(values) for name, values in rows.items()}


def _draw(chart: Chart, groups: Sequence[Group]) -> Markup | None:
    """The chart as SVG; None where no run has logged it."""
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for group, mark in zip(groups, _marks(len(groups)), strict=True):
        style = {"color": mark.colour, "linestyle": mark.dashes}
        for run in group.runs if len(group.runs) > 1 else ():
            _line(axes, run.curves.get(chart.curve, {}), alpha=0.35, linewidth=0.8, **style)
        _line(axes, group.curve(chart.curve), linewidth=1.8, **style)
    if not axes.lines:
        return None
    if chart.logarithmic:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.grid(visible=True, alpha=0.3)
    written = io.StringIO()
    # Letters as letters, and the same runs as the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "segkd"}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    # It is made here, of numbers alone: names of runs stand in the page, not in the picture.
    return Markup(written.getvalue()[written.getvalue().index("<svg") :])


def _line(axes: Any, curve: Mapping[int, float], **style: Any) -> None:
    if curve:
        axes.plot(list(curve), list(curve.values()), marker="." if len(curve) == 1 else None, **style)


def _marks(count: int) -> list[Mark]:
    """A mark for each of some groups. Colours are Paul Tol's, which people with any eyes tell apart."""
    safe = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")
    return [Mark(safe[number % len(safe)], _DASHES[number // len(safe) % len(_DASHES)]) for number in range(count)]


def _number(value: float | None, digits: int = 2) -> str:
    return "n/a" if value is None else f"{value:,.{digits}f}"


def _shown(value: Any) -> str:
    """A setting's value; of a long one, such as a digest, no more than its beginning."""
    text = "" if value is None else str(value)
    return text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"


_LONG = 40
"""Characters of a setting's value."""
