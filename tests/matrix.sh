#!/usr/bin/env bash
# The quick tests in three environments, one at a time, each removed after: the oldest versions that
# setup.cfg allows, the newest, and a foreign one with what stock tools do not take.
# tests/matrix.sh [oldest|newest|foreign ...] prints a row of a table for each, and what pytest and pip
# say to stderr; docs/environments.md keeps the table.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=(pytest mpmath optuna tensorboard tokenizers 'setuptools>=77')

# floors: the requirements of setup.cfg, each at the oldest version that it allows
floors() {
    python3 -c '
import configparser, re
setup = configparser.ConfigParser()
setup.read("setup.cfg")
for line in setup["options"]["install_requires"].split("\n"):
    if match := re.match(r"([\w-]+)>=([\d.]+)", line):
        print("{}=={}.*".format(*match.groups()))'
}

# versions PYTHON: of it and of the packages that set the ranges
versions() {
    "$1" -c '
import platform
from importlib.metadata import version
names = "torch", "numpy", "webdataset", "transformers", "timm"
print(f"{platform.python_version()} |", ", ".join(f"{n} {version(n)}" for n in names))'
}

# row NAME PYTHON REQUIREMENT...: the quick tests with these requirements beside those of setup.cfg;
# fails where that Python is not to be had
row() {
    local name=$1 python=$2 folder result="can not be installed" with="$2 |"
    shift 2
    if ! command -v "$python" >/dev/null; then
        echo "| $name | $python | | not to be had here |"
        return 1
    fi
    folder=$(mktemp -d)
    if "$python" -m venv "$folder" && "$folder/bin/pip" install -q . "${tools[@]}" "$@" >&2; then
        with=$(versions "$folder/bin/python")
        result=$("$folder/bin/python" -m pytest -o addopts= -m quick 2>&1 | tee /dev/stderr | tail -1)
    fi
    rm -rf "$folder" build
    echo "| $name | $with | ${result//=/} |"
}

(($#)) || set -- oldest newest foreign
odd=('numpy>=2.4' 'webdataset>=1')
for name; do
    case $name in
        oldest) mapfile -t at <<<"$(floors)" && row oldest python3.10 "${at[@]}" || true ;;
        newest) row newest python3.12 || true ;;
        foreign) row foreign python3.14 "${odd[@]}" || row foreign python3.13 "${odd[@]}" || true ;;
        *) echo "error: '$name': expected oldest, newest or foreign" >&2 && exit 2 ;;
    esac
done
