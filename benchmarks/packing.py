"""What zstd's levels cost and save on the codes of a cache, with one thread and with all cores.

    python benchmarks/packing.py cache.zarr [--samples 24] [--json]

The tiles of some samples are read once and packed again in memory at every level. Times are per sample, the least of a
few repetitions; bytes are those of the tiles with their checksums, without indexes and tables.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice

from numcodecs.zstd import Zstd

from segkd.storage.chunks import CHECKSUM
from segkd.storage.coding import EXACT
from segkd.storage.packing import ZSTD_LEVEL, cut_tile, threads
from segkd.storage.reader import CacheReader

LEVELS = (1, 3, 9, 12, 15, 17, 19, 22)


@dataclass(frozen=True)
class Level:
    """One target at one level, per sample."""

    target: str
    level: int
    bytes: float
    encode_ms: float
    encode_ms_all_cores: float
    decode_ms: float


def tiles_of(cache: CacheReader, target: str, samples: int) -> list[bytes]:
    """The raw tiles of the first samples that are not kept exactly."""
    kept = (entry for entry in cache.entries() if entry.rungs[target] != EXACT)
    tiles = []
    for entry in islice(kept, samples):
        height, width = entry.mapping.shape
        codes = cache.window(entry, target, range(height), range(width))
        count = -(-height // cache.spec.tile) * -(-width // cache.spec.tile)
        tiles += [cut_tile(codes, number, cache.spec.tile, codes.dtype).tobytes() for number in range(count)]
    return tiles


def measure(target: str, tiles: Sequence[bytes], samples: int) -> list[Level]:
    found = []
    with ThreadPoolExecutor(threads()) as executor:
        for level in LEVELS:
            codec = Zstd(level)
            packed, alone = timed(partial(map, codec.encode, tiles))
            again, together = timed(partial(executor.map, codec.encode, tiles))
            assert again == packed, "bytes must not depend on threads"
            _, decode = timed(partial(map, codec.decode, packed))
            size = sum(len(content) + CHECKSUM for content in packed)
            times = (1e3 * seconds / samples for seconds in (alone, together, decode))
            found.append(Level(target, level, size / samples, *times))
    return found


def timed(action: Callable[[], Iterable[bytes]], repeats: int = 3) -> tuple[list[bytes], float]:
    """The results and the least seconds of a few repetitions."""
    least = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        result = list(action())
        least = min(least, time.perf_counter() - began)
    return result, least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    cache = CacheReader(arguments.cache, partial=True)
    samples = min(arguments.samples, sum(1 for _ in cache.entries()))
    found = [row for name in cache.spec.targets for row in measure(name, tiles_of(cache, name, samples), samples)]
    if arguments.json:
        print(json.dumps({"samples": samples, "threads": threads(), "levels": [asdict(row) for row in found]}))
        return
    print(
        f"{samples} samples, {threads()} cores; a sample: bytes, ms to encode by 1 thread and by all cores, to decode"
    )
    for row in found:
        now = "  <- the cache's" if row.level == ZSTD_LEVEL else ""
        print(
            f"{row.target:<20} level {row.level:>2}{row.bytes:>10,.0f}{row.encode_ms:>9.2f}"
            f"{row.encode_ms_all_cores:>9.2f}{row.decode_ms:>8.3f}{now}"
        )


if __name__ == "__main__":
    main()
