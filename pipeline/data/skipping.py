"""Images that are left out by name: broken files, and whatever else is not wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from segkd.pipeline.data.complaints import Complaint
from segkd.pipeline.data.roles import lines_of_file


class Skipped:
    """The lines of the file that ``data.skip`` names: ids of samples, or their images' files."""

    def __init__(self, file: str | None) -> None:
        """Raises ConfigError for a file that cannot be read."""
        self._lines = {text: place for place, text in lines_of_file(file, "data.skip")} if file else {}
        self._idle = dict(self._lines)
        self.count = 0
        """How many samples were left out."""

    def without(self, samples: Iterable[tuple[str, str]], root: Path) -> Iterator[str]:
        """The ids of those samples that stay; ``samples`` are ids and their images' files below ``root``."""
        for sample_id, name in samples:
            found = [line for line in (sample_id, name, str(root / name)) if line in self._lines] if self._lines else ()
            for line in found:
                self._idle.pop(line, None)
            if not found:
                yield sample_id
            self.count += bool(found)

    def complaints(self) -> Iterator[Complaint]:
        """Of lines that named no image, once all were asked for: it is a slip of the pen, or the file is gone."""
        if self._idle:
            (line, place), *others = self._idle.items()
            also = tuple(f"{place} ({line!r})" for line, place in others)
            yield Complaint("warning", f"{place}: there is no sample or image {line!r} to leave out", also)
