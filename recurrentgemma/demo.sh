#!/usr/bin/env bash
# The demo: trains a small RecurrentGemma on Python's own sources, kills it after its first
# checkpoint, resumes it, generates from it. Run again, it resumes what is there.
set -euo pipefail

PYTHON=${PYTHON:-python3}
DEMO=${DEMO:-runs/demo}
train=("$PYTHON" -m recurrentgemma.train --config=demo "--workdir=$DEMO")

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

finished_checkpoint() { compgen -G "$DEMO/checkpoints/step_[0-9]*[0-9]" >/dev/null; }

if finished_checkpoint; then
    say "A run lies in $DEMO: the same command goes on from its newest checkpoint."
else
    say "Training: ${train[*]}"
    "${train[@]}" &
    trainer=$!
    trap 'kill "$trainer" 2>/dev/null || true' EXIT
    while kill -0 "$trainer" 2>/dev/null && ! finished_checkpoint; do sleep 1; done
    if kill -KILL "$trainer" 2>/dev/null; then
        wait "$trainer" 2>/dev/null || true
        say "Killed (SIGKILL) after its first checkpoint. The same command resumes it:"
    else
        wait "$trainer" # It ended by itself; if it failed, so does the demo.
    fi
    trap - EXIT
fi
"${train[@]}"

prompt=$'def mean(values):\n    """Return the'
say "Generating from it:"
"$PYTHON" -m recurrentgemma.generate "--checkpoint=$DEMO" "--prompt=$prompt" \
    --max_new_tokens=64 --temperature=0.8

say "Curves and the table of results: $DEMO/report/README.md"
