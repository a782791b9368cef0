#!/usr/bin/env bash
# Submit a study, or say what it would cost: slurm/submit.sh [--dry-run] STUDY ... (see plan.py)
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-.venv/bin/python}" -m slurm.plan "$@"
