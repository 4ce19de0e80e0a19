#!/usr/bin/env bash
# Everything that must hold before a change goes in: style, types, import rules, tests. Arguments go to pytest:
#     scripts/test.sh -k caption
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1

ruff check .
ruff format --check .
pyright
lint-imports
# A file stays with one worker, which makes its fixtures once; the longest files come first, as pyproject.toml lists them.
pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
