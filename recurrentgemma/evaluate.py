"""`python -m recurrentgemma.evaluate`: held-out loss of a checkpoint, at any context length."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx

from common.data.corpus import CorpusConfig, open_corpus
from common.data.sources import HealthyDocuments
from common.errors import UserError
from common.launch import Figure, Line, Run, Table, launch, write_report
from common.launch import config as configs
from common.launch.workdir import write_atomically
from common.nn.losses import chunked_nll
from recurrentgemma.checkpoint import load
from recurrentgemma.config import Config
from recurrentgemma.model import Griffin

EXAMPLES = [
    "python -m recurrentgemma.evaluate --checkpoint=runs/demo",
    "python -m recurrentgemma.evaluate --checkpoint=runs/cpu --lengths=512,1024,2048,4096",
    "python -m recurrentgemma.evaluate --checkpoint=recurrentgemma-2b --dtype=bfloat16 "
    "--corpus='texts/*.txt' --lengths=2048",
]
OPTIONS = flags.FlagValues()
_own: dict[str, Any] = {"flag_values": OPTIONS}
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "what to load: anything recurrentgemma.load takes", required=True, **_own
)
CORPUS = flags.DEFINE_string(
    "corpus", None, "text files (a glob); default the held-out part of the run's own corpus", **_own
)
LENGTHS = flags.DEFINE_list("lengths", None, "row lengths, in tokens; default the run's", **_own)
TOKENS = flags.DEFINE_integer("tokens", 65_536, "how many tokens to score at each length", **_own)
BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 4096, "tokens of one batch", **_own)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "compute dtype", **_own)
OUTPUT = flags.DEFINE_string(
    "output", None, "folder of the report; default <checkpoint>/report/evaluation for a run", **_own
)


@dataclasses.dataclass(frozen=True)
class Score:
    """Held-out figures at one row length.

    Attributes:
      length: of the rows, in tokens.
      tokens: that were scored.
      loss: mean, nats per token.
      last_quarter: mean over the last quarter of the positions, where the context is longest.
      bits_per_byte: loss per byte of UTF-8 text.
    """

    length: int
    tokens: int
    loss: float
    last_quarter: float
    bits_per_byte: float


def evaluate(
    model: Griffin, documents: Sequence[list[int]], length: int, budget: int, batch: int
) -> Score:
    """Scores rows of `length` tokens cut from a stream of documents.

    The rows are cut out of the concatenated documents without restarting positions inside, so that
    every row is one context of exactly `length` tokens: what is to be measured is the use of it.

    Args:
      model: a language model with a tokenizer.
      documents: token ids of whole documents.
      length: row length.
      budget: about how many tokens to score.
      batch: rows computed at a time.

    Raises:
      UserError: the text is shorter than one row.
    """
    stream = np.concatenate([np.asarray(ids, np.int32) for ids in documents])
    rows = min(max(1, budget // length), (stream.size - 1) // length)
    if rows < 1:
        raise UserError(f"the text has {stream.size} tokens, too few for a row of {length}")
    graphdef, state = nnx.split(model)

    @jax.jit
    def losses(state: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)
        hidden = model.hidden(tokens[:, :-1])
        return chunked_nll(model.logits, hidden, tokens[:, 1:], chunk=256)

    starts = np.arange(rows) * length
    table = np.stack([stream[s : s + length + 1] for s in starts])
    padded = np.pad(table, ((0, -rows % batch), (0, 0)), mode="edge")
    parts = [losses(state, padded[i : i + batch]) for i in range(0, len(padded), batch)]
    nll = np.concatenate([np.asarray(part, np.float64) for part in parts])[:rows]
    text_bytes = sum(len(model.tokenizer.decode(row[1:].tolist()).encode()) for row in table)
    return Score(
        length=length,
        tokens=int(nll.size),
        loss=float(nll.mean()),
        last_quarter=float(nll[:, -max(1, length // 4) :].mean()),
        bits_per_byte=float(nll.sum() / math.log(2) / max(1, text_bytes)),
    )


def _main(run: Run) -> None:
    lengths = _lengths()
    if TOKENS.value < 1 or BATCH_TOKENS.value < 1:
        raise UserError("--tokens and --batch_tokens must be at least 1")
    path = Path(CHECKPOINT.value)
    model = load(path, dtype=DTYPE.value)
    if model.tokenizer is None:
        raise UserError(f"there is no tokenizer.model beside {path}")
    corpus, own_length = _corpus(path)
    source = HealthyDocuments(open_corpus(corpus), corpus.error_budget)
    tokenizer = model.tokenizer
    lengths = lengths or [own_length, 2 * own_length, 4 * own_length]
    wanted = 1 + max(max(lengths), TOKENS.value)
    documents: list[list[int]] = []
    for text in source:
        documents.append([tokenizer.bos_id, *tokenizer.encode(text)])
        if sum(map(len, documents)) > wanted:
            break
    scores = []
    for length in lengths:
        rows = max(1, BATCH_TOKENS.value // length)
        scores.append(evaluate(model, documents, length, TOKENS.value, rows))
        print(
            f"length {length:>6}  loss {scores[-1].loss:.4f} nats per token, "
            f"last quarter {scores[-1].last_quarter:.4f}, "
            f"{scores[-1].bits_per_byte:.4f} bits per byte"
        )
    _report(path, corpus, scores)


def _lengths() -> list[int]:
    try:
        lengths = [int(text) for text in LENGTHS.value or []]
    except ValueError as error:
        raise UserError(f"--lengths takes numbers such as 512,1024, not {LENGTHS.value}") from error
    if any(length < 2 for length in lengths):
        raise UserError("--lengths must be at least 2")
    return lengths


def _corpus(path: Path) -> tuple[CorpusConfig, int]:
    """What to read, and the run's row length (a released model's: 2048)."""
    if CORPUS.value is not None:
        return CorpusConfig(kind="text", path=CORPUS.value, split="all"), 2048
    if (path / "checkpoints").is_dir():
        config = configs.from_json(
            Config, (path / "config.json").read_text(), f"{path}/config.json"
        )
        corpus = dataclasses.replace(config.data.corpus, split="heldout")
        return corpus, config.data.sequence_length
    return CorpusConfig(split="heldout"), 2048


def _report(path: Path, corpus: CorpusConfig, scores: list[Score]) -> None:
    """Writes JSON, a table and a figure where the user asked, or into the run's own folder."""
    if OUTPUT.value is not None:
        folder = Path(OUTPUT.value)
    elif (path / "checkpoints").is_dir():
        folder = path / "report" / "evaluation"
    else:
        return
    columns = [field.name.replace("_", " ") for field in dataclasses.fields(Score)]
    table = Table("Held-out text", columns, [list(dataclasses.astuple(s)) for s in scores])
    x = [score.length for score in scores]
    figure = Figure(
        "loss_by_length",
        "Held-out loss by context length",
        "row length (tokens)",
        "nats per token",
        [
            Line("all positions", x, [score.loss for score in scores]),
            Line("last quarter", x, [score.last_quarter for score in scores]),
        ],
        log_x=True,
    )
    write_report(
        folder,
        "Evaluation",
        text=f"Checkpoint {path}, {corpus.kind} corpus, {corpus.split} documents.",
        tables=[table],
        figures=[figure],
    )
    text = json.dumps([dataclasses.asdict(score) for score in scores], indent=2) + "\n"
    write_atomically(folder / "scores.json", text)
    print(f"report: {folder / 'README.md'}")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="recurrentgemma",
        verb="evaluate",
        description="Measures held-out loss, perplexity and bits per byte of a checkpoint.",
        examples=EXAMPLES,
        flags=OPTIONS,
        argv=argv,
    )


if __name__ == "__main__":
    main()
