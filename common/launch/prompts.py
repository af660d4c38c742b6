"""What launchers that generate share: prompts out of flags and files, results into a file."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.errors import UserError
from common.generate import Generation
from common.launch.workdir import write_atomically


def read_prompts(given: Iterable[str] | None, file: str | None) -> list[str]:
    """The prompts of `--prompt` and then those of the file of `--prompts`.

    The file has one prompt a line, or, called *.jsonl, an object with a field "prompt" a line.

    Raises:
      UserError: there are none, or the file cannot be read; names file and line.
    """
    prompts = [*(given or []), *([] if file is None else _in_file(Path(file)))]
    if not prompts:
        raise UserError("nothing to continue: give --prompt='…' or --prompts=FILE")
    return prompts


def refuse_existing_output(path: str | None) -> None:
    """UserError if there is a file at `--output` already."""
    if path is not None and Path(path).exists():
        raise UserError(f"--output: {path} exists; nothing is written over")


def show(prompts: Sequence[str], results: Sequence[Generation], *, joined: bool = True) -> None:
    """Prints each prompt with its text: continued, or above an answer of its own."""
    for prompt, result in zip(prompts, results, strict=True):
        text = f"\033[1m{result.text}\033[0m" if sys.stdout.isatty() else result.text
        print(f"{prompt}{text}" if joined else f"{prompt}\n→ {text}")
        print("---")


def write_results(path: str, prompts: Sequence[str], results: Sequence[Generation]) -> None:
    """Writes one object a prompt, with its text, tokens and their log-probabilities."""
    lines = [
        json.dumps(
            {"prompt": p, "text": r.text, "tokens": r.tokens, "logprobs": r.logprobs},
            ensure_ascii=False,
        )
        for p, r in zip(prompts, results, strict=True)
    ]
    write_atomically(Path(path), "\n".join(lines) + "\n")
    print(f"written to {path}")


def _in_file(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts: cannot read {path}: {error}") from error
    if not lines:
        raise UserError(f"--prompts: {path} has no prompts")
    if path.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"--prompts: line {number} of {path} has no field 'prompt'") from error
        if not isinstance(prompt, str):
            raise UserError(f"--prompts: line {number} of {path}: 'prompt' is not a text")
        prompts.append(prompt)
    return prompts
