"""The tables of pages that come out of what is committed: which command prints each, and what it prints now.

    python benchmarks/published.py            # writes them into the pages anew
    python benchmarks/published.py --check    # names what differs, with exit status 1

A page shows a command in a fence of its own, of segkd or of a script beside this one, and what it prints between two
comments:

    ```sh
    segkd ablate --config configs/camvid-s.toml --tables
    ```

    <!-- prints -->
    <!-- end -->

Run from the root of the repository, which paths in run files are relative to.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from segkd.cli.main import main as segkd

PAGES = "docs/results/*.md", "configs/paper/README.md"
BLOCK = re.compile(
    r"(?P<head>```sh\n(?P<command>(?:segkd|python benchmarks/)[^`]*)```\n\n<!-- prints -->\n)"
    r"(?:(?!<!-- prints -->).)*?(?P<end><!-- end -->)",
    re.DOTALL,
)


def printed(command: str) -> str:
    """What a command line prints to standard output."""
    program, *arguments = shlex.split(command.replace("\\\n", " "))
    given, out = sys.argv, io.StringIO()
    with contextlib.redirect_stdout(out):
        if program == "segkd":
            segkd(arguments, standalone_mode=False)
        else:
            sys.argv = arguments
            try:
                runpy.run_path(arguments[0], run_name="__main__")
            finally:
                sys.argv = given
    return out.getvalue()


def commands(page: str) -> list[str]:
    """Of the blocks of a page, in their order."""
    return [block["command"] for block in BLOCK.finditer(page)]


def renewed(page: str) -> str:
    """The page with every block as its command prints it now."""
    return BLOCK.sub(lambda block: f"{block['head']}\n{printed(block['command']).strip()}\n\n{block['end']}", page)


def pages() -> Iterator[tuple[Path, str]]:
    """Those that have blocks, with what they hold."""
    for path in sorted(path for pattern in PAGES for path in Path().glob(pattern)):
        page = path.read_text(encoding="utf-8")
        if commands(page):
            yield path, page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    others = [(path, new) for path, page in pages() if (new := renewed(page)) != page]
    for path, new in others:
        print(f"{path}: tables differ from what their commands print" if check else f"{path}: written")
        if not check:
            path.write_text(new, encoding="utf-8")
    if check and others:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
