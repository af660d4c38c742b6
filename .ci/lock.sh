#!/usr/bin/env bash
# Writes the constraints files anew from the bounds of pyproject.toml; needs `uv` on PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

lock() { # the Python resolved for, the file's name, whom it is for
    local out=".ci/constraints-$2.txt" resolved
    resolved=$(uv pip compile -q --no-annotate --no-header --python-version "$1" \
        --extra test --extra lint --extra parity --extra compile pyproject.toml)
    {
        echo "# What CI installs on Python $3: pip install -e .[test] -c $out"
        echo "# Written by .ci/lock.sh; CUDA's packages come with their own exact pins."
        grep -v -E '^(nvidia-|cuda-|triton)' <<<"$resolved"
    } >"$out"
}

lock 3.11 3.11 "3.11"
lock 3.13 3.12 "3.12 and newer"
