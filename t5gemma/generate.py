"""`python -m t5gemma.generate`: answers prompts with an adapted, trained or released model."""

import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from common.data.chat import chat_tokens
from common.data.tokenizers import check_vocabulary, load_tokenizer
from common.errors import UserError
from common.generate import generate
from common.launch import Run, launch
from common.launch.prompts import read_prompts, refuse_existing_output, show, write_results
from common.models.loading import attach_tokenizer
from t5gemma.checkpoint import load

EXAMPLES = [
    "python -m t5gemma.generate --checkpoint=t5gemma-2b-2b-prefixlm-it --chat "
    "--prompt='Why is the sky blue?'",
    "python -m t5gemma.generate --checkpoint=runs/t5gemma --prompt='The capital of Italy is' "
    "--num_beams=4 --length_penalty=0.6",
    "python -m t5gemma.generate --checkpoint=runs/t5gemma --prompts=prompts.jsonl "
    "--temperature=0.7 --top_p=0.95 --output=answers.jsonl",
]
EARLY_STOPPING = {"true": True, "false": False, "never": "never"}
OPTIONS = flags.FlagValues()
_own: dict[str, Any] = {"flag_values": OPTIONS}
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "what to load: anything t5gemma.load takes", required=True, **_own
)
PROMPT = flags.DEFINE_multi_string("prompt", None, "a text for the encoder; repeatable", **_own)
PROMPTS = flags.DEFINE_string(
    "prompts", None, "a file: one prompt a line, or JSONL with a field 'prompt'", **_own
)
OUTPUT = flags.DEFINE_string("output", None, "a JSONL file to write, besides printing", **_own)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "most tokens a prompt gets", **_own)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token", **_own)
TOP_K = flags.DEFINE_integer("top_k", None, "draw among the k likeliest tokens", **_own)
TOP_P = flags.DEFINE_float("top_p", None, "draw among the likeliest tokens of mass p", **_own)
SEED = flags.DEFINE_integer("seed", 0, "of the draws", **_own)
NUM_BEAMS = flags.DEFINE_integer("num_beams", 1, "hypotheses of beam search; 1: none", **_own)
LENGTH_PENALTY = flags.DEFINE_float(
    "length_penalty", 1.0, "of beam search: above 0 favours long texts", **_own
)
EARLY = flags.DEFINE_enum(
    "early_stopping", "false", list(EARLY_STOPPING), "when beam search ends, see BeamSearch", **_own
)
STOP = flags.DEFINE_multi_string("stop", None, "a text that ends an answer", **_own)
CHAT = flags.DEFINE_bool("chat", False, "prompts are messages to a tuned model", **_own)
ENCODER_BOS = flags.DEFINE_bool(
    "encoder_bos",
    True,
    "prompts begin with the token of beginnings, as transformers has it",
    **_own,
)
ENCODER_WINDOW = flags.DEFINE_enum(
    "encoder_window",
    None,
    ["published", "transformers"],
    "how the encoder's window is read; as the checkpoint says by default",
    **_own,
)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "compute dtype", **_own)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "a tokenizer's file, if not beside", **_own)
MAX_PROMPT_TOKENS = flags.DEFINE_integer(
    "max_prompt_tokens", None, "refuse longer prompts; the model's longest by default", **_own
)


def _main(run: Run) -> None:
    prompts = read_prompts(PROMPT.value, PROMPTS.value)
    refuse_existing_output(OUTPUT.value)
    model = load(CHECKPOINT.value, dtype=DTYPE.value, encoder_window=ENCODER_WINDOW.value)
    if TOKENIZER.value is not None:
        attach_tokenizer(model, load_tokenizer(TOKENIZER.value))
        check_vocabulary(model.tokenizer, model.vocab_size)
    if model.tokenizer is None:
        raise UserError(
            f"there is no tokenizer beside {CHECKPOINT.value}: name one with --tokenizer"
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
        add_bos=ENCODER_BOS.value,
        max_prompt_tokens=MAX_PROMPT_TOKENS.value,
        num_beams=NUM_BEAMS.value,
        length_penalty=LENGTH_PENALTY.value,
        early_stopping=EARLY_STOPPING[EARLY.value],
    )
    seconds = time.perf_counter() - start
    show(prompts, results, joined=False)
    if OUTPUT.value is not None:
        write_results(OUTPUT.value, prompts, results)
    count = sum(len(result.tokens) for result in results)
    print(f"{count} tokens in {seconds:.1f} s, compilation included")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="t5gemma",
        verb="generate",
        description="Answers prompts; ragged prompts are decoded together in one compiled loop.",
        examples=EXAMPLES,
        flags=OPTIONS,
        argv=argv,
    )


if __name__ == "__main__":
    main()
