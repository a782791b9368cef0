#!/usr/bin/env bash
# The quick tests in three environments, one at a time, each removed after: the oldest versions that
# setup.cfg allows, the newest, and a foreign one with what stock tools do not take.
# tests/matrix.sh [oldest|newest|foreign ...] prints a row of a table for each.
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

# row NAME PYTHON REQUIREMENT...: the quick tests with these requirements beside those of setup.cfg
row() {
    local name=$1 python=$2 folder result
    shift 2
    if ! command -v "$python" >/dev/null; then
        echo "| $name | $python | not to be had here |"
        return
    fi
    folder=$(mktemp -d)
    if "$python" -m venv "$folder" && "$folder/bin/pip" install -q . "${tools[@]}" "$@" &&
        result=$("$folder/bin/python" -m pytest -o addopts= -m quick 2>&1 | tail -1); then
        :
    else
        result="failed: ${result:-it can not be installed}"
    fi
    rm -rf "$folder" build ./*.egg-info
    echo "| $name | $python | $result |"
}

for name in "${@:-oldest newest foreign}"; do
    for each in $name; do
        case $each in
            oldest) mapfile -t at <<<"$(floors)" && row oldest python3.10 "${at[@]}" ;;
            newest) row newest python3.12 ;;
            foreign) row foreign python3.14 'numpy>=2.4' 'webdataset>=1' ;;
            *) echo "error: '$each': expected oldest, newest or foreign" >&2 && exit 2 ;;
        esac
    done
done
