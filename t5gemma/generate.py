"""`python -m t5gemma.generate`: answers prompts with an adapted, trained or released model."""

from collections.abc import Sequence
from typing import Any

from absl import flags

from common.launch import Run, launch
from common.launch.generation import GenerationFlags
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
FLAGS = GenerationFlags(
    "t5gemma",
    prompt="a text for the encoder",
    result="an answer",
    max_prompt_tokens=None,
    why="the model's longest by default",
)
_own: dict[str, Any] = {"flag_values": FLAGS.values}
NUM_BEAMS = flags.DEFINE_integer("num_beams", 1, "hypotheses of beam search; 1: none", **_own)
LENGTH_PENALTY = flags.DEFINE_float(
    "length_penalty", 1.0, "of beam search: above 0 favours long texts", **_own
)
EARLY = flags.DEFINE_enum(
    "early_stopping", "false", list(EARLY_STOPPING), "when beam search ends, see BeamSearch", **_own
)
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


def _main(run: Run) -> None:
    def model() -> Any:
        return load(
            FLAGS.checkpoint.value, dtype=FLAGS.dtype.value, encoder_window=ENCODER_WINDOW.value
        )

    options = {
        "add_bos": ENCODER_BOS.value,
        "num_beams": NUM_BEAMS.value,
        "length_penalty": LENGTH_PENALTY.value,
        "early_stopping": EARLY_STOPPING[EARLY.value],
    }
    FLAGS.generate(model, options, joined=False)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="t5gemma",
        verb="generate",
        description="Answers prompts; ragged prompts are decoded together in one compiled loop.",
        examples=EXAMPLES,
        flags=FLAGS.values,
        argv=argv,
    )


if __name__ == "__main__":
    main()
