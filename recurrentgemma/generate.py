"""`python -m recurrentgemma.generate`: continues prompts with a trained or released model."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from common.data.tokenizers import check_vocabulary, load_tokenizer
from common.errors import UserError
from common.generate import generate
from common.launch import Run, launch
from common.launch.workdir import write_atomically
from recurrentgemma.chat import chat_tokens
from recurrentgemma.checkpoint import load

EXAMPLES = [
    "python -m recurrentgemma.generate --checkpoint=runs/demo --prompt='def main('",
    "python -m recurrentgemma.generate --checkpoint=recurrentgemma-2b-it --chat "
    "--prompt='Why is the sky blue?' --temperature=0.7 --top_p=0.95",
    "python -m recurrentgemma.generate --checkpoint=runs/cpu --prompts=prompts.txt "
    "--output=continuations.jsonl",
]
OPTIONS = flags.FlagValues()
_own: dict[str, Any] = {"flag_values": OPTIONS}
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "what to load: anything recurrentgemma.load takes", required=True, **_own
)
PROMPT = flags.DEFINE_multi_string("prompt", None, "a text to continue; repeatable", **_own)
PROMPTS = flags.DEFINE_string(
    "prompts", None, "a file: one prompt a line, or JSONL with a field 'prompt'", **_own
)
OUTPUT = flags.DEFINE_string("output", None, "a JSONL file to write, besides printing", **_own)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "most tokens a prompt gets", **_own)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token", **_own)
TOP_K = flags.DEFINE_integer("top_k", None, "draw among the k likeliest tokens", **_own)
TOP_P = flags.DEFINE_float("top_p", None, "draw among the likeliest tokens of mass p", **_own)
SEED = flags.DEFINE_integer("seed", 0, "of the draws", **_own)
STOP = flags.DEFINE_multi_string("stop", None, "a text that ends a continuation", **_own)
CHAT = flags.DEFINE_bool("chat", False, "prompts are messages to a tuned model", **_own)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "compute dtype", **_own)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "a SentencePiece model, if not beside", **_own)
MAX_PROMPT_TOKENS = flags.DEFINE_integer(
    "max_prompt_tokens",
    8192,
    "refuse longer prompts; the released models were trained on 8192 tokens",
    **_own,
)


def _main(run: Run) -> None:
    prompts = _prompts()
    if OUTPUT.value is not None and Path(OUTPUT.value).exists():
        raise UserError(f"--output: {OUTPUT.value} exists; nothing is written over")
    model = load(CHECKPOINT.value, dtype=DTYPE.value)
    if TOKENIZER.value is not None:
        model.tokenizer = load_tokenizer(TOKENIZER.value)
        check_vocabulary(model.tokenizer, model.vocab_size)
    if model.tokenizer is None:
        raise UserError(
            f"there is no tokenizer.model beside {CHECKPOINT.value}: name one with --tokenizer"
        )
    texts = [chat_tokens(p, model.tokenizer) if CHAT.value else p for p in prompts]
    start = time.perf_counter()
    # The flags of the sampler keep the model's stop tokens beside the texts.
    results = generate(
        model,
        texts,
        MAX_NEW_TOKENS.value,
        TEMPERATURE.value,
        TOP_K.value,
        TOP_P.value,
        SEED.value,
        [*model.stop_tokens, *STOP.value] if STOP.value else None,
        max_prompt_tokens=MAX_PROMPT_TOKENS.value,
    )
    seconds = time.perf_counter() - start
    for prompt, result in zip(prompts, results):
        print(
            f"{prompt}\033[1m{result.text}\033[0m"
            if sys.stdout.isatty()
            else f"{prompt}{result.text}"
        )
        print("---")
    if OUTPUT.value is not None:
        lines = [
            json.dumps(
                {"prompt": p, "text": r.text, "tokens": r.tokens, "logprobs": r.logprobs},
                ensure_ascii=False,
            )
            for p, r in zip(prompts, results)
        ]
        write_atomically(Path(OUTPUT.value), "\n".join(lines) + "\n")
        print(f"written to {OUTPUT.value}")
    count = sum(len(result.tokens) for result in results)
    print(f"{count} tokens in {seconds:.1f} s, compilation included")


def _prompts() -> list[str]:
    """The prompts of the flags, read before anything heavy is loaded."""
    prompts = list(PROMPT.value or [])
    if PROMPTS.value is not None:
        prompts += _read_prompts(Path(PROMPTS.value))
    if not prompts:
        raise UserError("nothing to continue: give --prompt='…' or --prompts=FILE")
    return prompts


def _read_prompts(path: Path) -> list[str]:
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


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="recurrentgemma",
        verb="generate",
        description="Continues prompts; ragged prompts are decoded together in one compiled loop.",
        examples=EXAMPLES,
        flags=OPTIONS,
        argv=argv,
    )


if __name__ == "__main__":
    main()
