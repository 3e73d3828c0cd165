#!/bin/sh
# install.sh PYTHON VENV: make VENV with PYTHON unless it is there, then install segkd, editable, with its tools.
set -eu
python=$1
venv=$2

fail() {
    echo "segkd: $1" >&2
    exit 1
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    command -v "$python" >/dev/null ||
        fail "there is no '$python' here; install Python 3.11, 3.12 or 3.13, or say where it is: make PYTHON=/path/to/python3.12"
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
        fail "'$python' is $("$python" --version 2>&1), but Python 3.11, 3.12 or 3.13 is needed; name one: make PYTHON=python3.12"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "'$python' cannot make virtual environments; install its venv module (Debian and Ubuntu: python3-venv)"
    "$python" -m venv --clear "$venv"
fi

echo "segkd: installing into $venv, which takes minutes the first time" >&2
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
