#!/usr/bin/env bash
# Virtual environment in .venv with longvila and its tools. Does only what is missing: a stamp remembers which
# pyproject.toml was installed. PYTHON names another interpreter (python3 when not set).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
stamp=.venv/installed

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    found=$("$python" -V 2>/dev/null) || found="not there"
    echo "error: longvila needs Python 3.11 or newer, but '$python' is $found; name another with PYTHON=..." >&2
    exit 1
fi
if [ ! -x .venv/bin/pip ]; then
    "$python" -m venv .venv
fi
wanted=$(.venv/bin/python -c 'import hashlib; print(hashlib.sha256(open("pyproject.toml", "rb").read()).hexdigest())')
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[deepspeed,dev,gguf]'
    echo "$wanted" >"$stamp"
fi
