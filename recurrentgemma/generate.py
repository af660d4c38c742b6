"""`python -m recurrentgemma.generate`: continues prompts with a trained or released model."""

from collections.abc import Sequence

from common.launch import Run, launch
from common.launch.generation import GenerationFlags
from recurrentgemma.checkpoint import load

EXAMPLES = [
    "python -m recurrentgemma.generate --checkpoint=runs/demo --prompt='def main('",
    "python -m recurrentgemma.generate --checkpoint=recurrentgemma-2b-it --chat "
    "--prompt='Why is the sky blue?' --temperature=0.7 --top_p=0.95",
    "python -m recurrentgemma.generate --checkpoint=runs/cpu --prompts=prompts.txt "
    "--output=continuations.jsonl",
]
FLAGS = GenerationFlags(
    "recurrentgemma",
    prompt="a text to continue",
    result="a continuation",
    max_prompt_tokens=8192,
    why="the released models were trained on 8192 tokens",
)


def _main(run: Run) -> None:
    FLAGS.generate(lambda: load(FLAGS.checkpoint.value, dtype=FLAGS.dtype.value))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="recurrentgemma",
        verb="generate",
        description="Continues prompts; ragged prompts are decoded together in one compiled loop.",
        examples=EXAMPLES,
        flags=FLAGS.values,
        argv=argv,
    )


if __name__ == "__main__":
    main()
