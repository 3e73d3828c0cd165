"""``python -m segkd``, which ``torchrun -m segkd`` starts."""

from segkd.cli.main import main

main(prog_name="segkd")
