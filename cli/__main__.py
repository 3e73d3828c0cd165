"""``python -m segkd.cli``: the same as ``segkd``."""

from segkd.cli.main import main

main(prog_name="segkd")
