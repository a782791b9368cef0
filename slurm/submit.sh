#!/usr/bin/env bash
# Submit a study, or say what it would cost: slurm/submit.sh [--dry-run] STUDY ... (see plan.py)
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${VIRTUAL_ENV:-.venv}/bin/python
[ -x "$environment" ] || environment=python # conda's, where one is activated
exec "${PYTHON:-$environment}" -m slurm.plan "$@"
