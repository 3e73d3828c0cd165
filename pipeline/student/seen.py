"""Which samples a network has seen, and what of them, as its checkpoint keeps it.

Ids say it to people, digests of pixels say it whatever a file is called. The specification is docs/format.md's.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segkd.pipeline.data.contents import DIGEST_BYTES, Content
from segkd.pipeline.data.sample import Sample
from segkd.storage.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SampleList:
    """Samples, packed: a checkpoint of many is written often."""

    count: int = 0
    ids: str = ""
    """Base64 of zlib of the ids in UTF-8, a zero byte between two; empty for no samples."""
    digests: str | None = None
    """Base64 of the samples' :attr:`Content.digest`, one after the other; None where images were not compared."""

    def __post_init__(self) -> None:
        try:
            size = None if self.digests is None else len(b"".join(self.pixels() or ()))
            fits = len(self.names()) == self.count and size in (None, self.count * DIGEST_BYTES)
        except (binascii.Error, zlib.error, UnicodeDecodeError):
            fits = False
        if not fits:
            raise ConfigError(f"expected {self.count} ids and as many digests, packed as docs/format.md says")

    @classmethod
    def of(cls, samples: Sequence[Sample], contents: Mapping[str, Content] | None) -> SampleList:
        """The list of these samples; ``contents``, where there are any, hold each."""
        ids = "\0".join(sample.id for sample in samples).encode()
        digests = None if contents is None else b"".join(contents[sample.id].digest for sample in samples)
        return cls(
            count=len(samples),
            ids=base64.b64encode(zlib.compress(ids, 9)).decode() if samples else "",
            digests=None if digests is None else base64.b64encode(digests).decode(),
        )

    def names(self) -> list[str]:
        """The ids."""
        if not self.ids:
            return []
        return zlib.decompress(base64.b64decode(self.ids, validate=True)).decode().split("\0")

    def pixels(self) -> list[bytes] | None:
        """The digests, in the order of the ids."""
        if self.digests is None:
            return None
        packed = base64.b64decode(self.digests, validate=True)
        return [packed[start : start + DIGEST_BYTES] for start in range(0, len(packed), DIGEST_BYTES)]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a network has seen of which samples."""

    labels_of: SampleList = SampleList()
    """Role train: it has learned from their images and labels."""
    labels_before: tuple[SampleList, ...] = ()
    """The same of the checkpoints that it began with or was taught by, and of those before them."""
    images_of: SampleList = SampleList()
    """Role auxiliary: it has learned from their images."""
    selected_on: SampleList = SampleList()
    """Role select: its checkpoint was chosen by its scores on them."""
    contaminated: int | None = None
    """How many samples of role select or report show an image that it has learned from; None: not compared."""

    def to_dict(self) -> dict[str, Any]:
        """Counts, for people."""
        return {
            "labels_of": self.labels_of.count,
            "labels_before": sum(part.count for part in self.labels_before),
            "images_of": self.images_of.count,
            "selected_on": self.selected_on.count,
            "contaminated": self.contaminated,
        }
