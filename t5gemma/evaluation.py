"""Scores of a T5Gemma: how well it continues text, and how near its answers come to references."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.data.pipeline import evaluation_batches
from common.errors import UserError
from common.generate import generate
from common.models.decoder import DecoderConfig
from t5gemma.instruction import Instruction, InstructionExamples, Pair
from t5gemma.metrics import generation_metrics
from t5gemma.model import T5Gemma
from t5gemma.objective import TargetTokens
from t5gemma.packing import PackedExamples
from t5gemma.ul2 import MODES, UL2Tokens

LOSS_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class TextScore:
    """Held-out text, continued.

    Attributes:
      prefix, continuation: tokens that the encoder reads and the decoder is scored on, in each row.
      tokens: that were scored.
      loss: mean, nats per token.
      perplexity: its exponential.
      bits_per_byte: loss per byte of UTF-8 text.
    """

    prefix: int
    continuation: int
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float


def score_text(
    model: T5Gemma,
    documents: Sequence[Sequence[int]],
    *,
    prefix: int,
    continuation: int,
    tokens: int = 65_536,
    batch: int = 8,
    encoder_bos: bool = True,
    special: UL2Tokens | None = None,
) -> TextScore:
    """Perplexity of the second part of pieces of text, given the first.

    The pieces are cut out of the concatenated documents, so that each has exactly these lengths.

    Args:
      model: with a tokenizer.
      documents: token ids of whole documents.
      prefix: tokens of each piece for the encoder.
      continuation: tokens of each piece for the decoder.
      tokens: about how many to score.
      batch: rows computed at a time.
      encoder_bos: begin the prefix with bos, where the tokenizer has one.
      special: UL2's ids, for a model trained by it: the prefix then has the sequential mode's token
        in front and a sentinel behind, which the decoder is given and not scored on.

    Raises:
      UserError: the text is shorter than one piece.
    """
    if prefix < 1 or continuation < 1:
        raise UserError("prefix and continuation must have at least one token")
    stream = np.concatenate([np.asarray(ids, np.int32) for ids in documents])
    length = prefix + continuation
    rows = min(max(1, tokens // continuation), stream.size // length)
    if rows < 1:
        raise UserError(f"the text has {stream.size} tokens, too few for a piece of {length}")
    pieces = stream[: rows * length].reshape(rows, length)
    bos = model.tokenizer.bos_id
    head = [bos] if encoder_bos and bos >= 0 else []
    between: list[int] = []
    if special is not None:
        head += [] if special.modes is None else [special.modes[MODES.index("S")]]
        between = [special.first_sentinel]
    encoder = _framed(head, pieces[:, :prefix], between)
    targets = _framed(between, pieces[:, prefix:], [])
    nll = _row_losses(model, encoder, targets, batch)[:, len(between) :]
    size = sum(len(model.tokenizer.decode(row[prefix:].tolist()).encode()) for row in pieces)
    mean = float(nll.mean())
    return TextScore(
        prefix=prefix,
        continuation=continuation,
        tokens=int(nll.size),
        loss=mean,
        perplexity=math.exp(min(mean, 50.0)),
        bits_per_byte=float(nll.sum() / math.log(2) / max(1, size)),
    )


def _framed(before: list[int], rows: np.ndarray, after: list[int]) -> np.ndarray:
    return np.pad(rows, ((0, 0), (len(before), len(after))), constant_values=0) + np.array(
        [*before, *[0] * rows.shape[1], *after], np.int32
    )


def _row_losses(model: T5Gemma, encoder: np.ndarray, targets: np.ndarray, batch: int) -> np.ndarray:
    """`[N, S]` and `[N, T]` without padding -> `[N, T]` nats."""
    graphdef, state = nnx.split(model)
    start = np.full((len(targets), 1), model.config.bos_token, np.int32)
    decoder = np.concatenate([start, targets[:, :-1]], axis=1)
    extra = ((0, -len(targets) % batch), (0, 0))
    padded = [np.pad(x, extra, mode="edge") for x in (encoder, decoder, targets)]
    parts = [
        _losses(graphdef, state, *(x[i : i + batch] for x in padded))
        for i in range(0, len(padded[0]), batch)
    ]
    return np.concatenate([np.asarray(part, np.float64) for part in parts])[: len(targets)]


@functools.partial(jax.jit, static_argnames="graphdef")  # Models of one shape share the program.
def _losses(
    graphdef: nnx.GraphDef[T5Gemma],
    state: nnx.State,
    encoder: jax.Array,
    decoder: jax.Array,
    targets: jax.Array,
) -> jax.Array:
    """`[B, S]`, `[B, T]`, `[B, T]` -> `[B, T]` nats."""
    model = nnx.merge(graphdef, state)
    hidden = model.hidden(
        encoder,
        decoder,
        encoder_valid=jnp.ones(encoder.shape, bool),
        decoder_valid=jnp.ones(decoder.shape, bool),
    )
    return model.nll(hidden, targets, LOSS_CHUNK)


@dataclasses.dataclass(frozen=True)
class AnswerScores:
    """Answers to prompts beside their references.

    Attributes:
      loss: of the references, mean nats per token, their end included.
      perplexity: its exponential.
      metrics: see `metrics.generation_metrics`.
      answers: the texts generated, in the order of the pairs.
    """

    loss: float
    perplexity: float
    metrics: dict[str, float]
    answers: list[str]


def score_answers(
    model: T5Gemma,
    pairs: Sequence[Pair],
    transform: Instruction,
    *,
    max_new_tokens: int = 128,
    num_beams: int = 1,
    batch: int = 16,
    stemmer: bool = False,
) -> AnswerScores:
    """Generates an answer to every prompt, greedily or by beam search, and compares it.

    Args:
      model: with a tokenizer.
      pairs: prompts and references.
      transform: how a prompt is put to the model; as in its training.
      max_new_tokens: most tokens of an answer.
      num_beams: hypotheses of the search; 1 is greedy.
      batch: prompts answered at a time.
      stemmer: see `generation_metrics`.
    """
    examples = transform.of_all(pairs)
    answers = [""] * len(pairs)
    # Prompts of about the same length together: less padding.
    order = sorted(range(len(pairs)), key=lambda n: len(examples[n].encoder))
    for start in range(0, len(order), batch):
        numbers = order[start : start + batch]
        prompts = [examples[n].encoder.tolist() for n in numbers]
        found = generate(model, prompts, max_new_tokens, num_beams=num_beams)
        for number, generation in zip(numbers, found, strict=True):
            answers[number] = generation.text or ""
    loss = reference_loss(model, pairs, transform, batch)
    metrics = generation_metrics(answers, [pair.response for pair in pairs], stemmer=stemmer)
    return AnswerScores(loss, math.exp(min(loss, 50.0)), metrics, answers)


def reference_loss(
    model: T5Gemma, pairs: Sequence[Pair], transform: Instruction, batch: int = 16
) -> float:
    """Mean loss of the references' tokens, in nats."""
    examples = InstructionExamples(
        pairs, transform, _longest(model.config.encoder), _longest(model.config.decoder)
    )
    # A length that is a round number, so that few programs are compiled.
    encoder, decoder = (int(-(-sizes.max() // 64) * 64) for sizes in examples.sizes())
    rows = PackedExamples(
        examples,
        encoder,
        decoder,
        start_id=model.config.bos_token,
        pad_id=model.config.pad_token,
    )
    graphdef, state = nnx.split(model)
    task = TargetTokens(lambda rngs: model, loss_chunk=64)

    @jax.jit
    def sums(state: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        loss = task.loss(nnx.merge(graphdef, state), batch, jax.random.key(0))
        return loss.total, loss.weight

    batches = evaluation_batches(rows, global_batch=batch, process_index=0, process_count=1)
    total, weight = np.sum([jax.device_get(sums(state, b)) for b in batches], axis=0)
    return float(total / weight)


def _longest(stack: DecoderConfig) -> int:
    return stack.max_length or 1 << 30
