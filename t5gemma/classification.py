"""Text classification with an encoder, in the SuperGLUE manner (section 3.8).

A head on one vector of the text, the last token's or the mean of all, drawn anew and trained
together with the whole encoder. The same head on a decoder-only model is what the paper compares
with.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.data.rows import Batch, Rows
from common.data.tokenizers import Tokenizer
from common.errors import UserError
from common.nn.linear import Linear
from common.train import Loss, Task
from common.train.task import PureDict
from t5gemma.json_lines import Record, read_json_lines

Pooling = Literal["last", "mean"]


@dataclasses.dataclass(frozen=True)
class LabelledText:
    """One example of a classification task.

    Attributes:
      texts: one text, or two that belong together.
      label: its class.
      where: file and line, for messages.
    """

    texts: tuple[str, ...]
    label: str
    where: str


def read_labelled(path: str | Path, labels: Sequence[str] | None = None) -> list[LabelledText]:
    """Reads JSONL with `text`, or `text_a` and `text_b`, and `label` in each line.

    Args:
      path: the file.
      labels: those that are known, if any others are a mistake.

    Raises:
      UserError: see `read_json_lines`; a field is missing or of another type, or the label is not
        known. The message has the file and the line.
    """
    found = []
    for record in read_json_lines(path):
        pair = "text" not in record.values and "text_a" in record.values
        texts = tuple(record.text(field) for field in (("text_a", "text_b") if pair else ("text",)))
        label = _label(record)
        if labels is not None and label not in labels:
            raise record.error(f"label '{label}' is none of the training labels {list(labels)}")
        found.append(LabelledText(texts, label, f"{record.path}, line {record.line}"))
    return found


def _label(record: Record) -> str:
    """A label as a text, however JSON has it."""
    value = record.values.get("label")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    label = record.text("label")
    if not label:
        raise record.error("field 'label' is empty")
    return label


class LabelledRows(Rows):
    """One text a row: `tokens` [L], its `lengths`, `labels` and `weights`, a number each.

    Args:
      texts: the examples.
      labels: the classes, in the order of their numbers.
      tokenizer: what reads them; bos comes first, and a line break between two texts.
      max_length: longer ones are cut at the end, of the first text where there are two.

    Attributes:
      length: L, the longest text's length, up to the next multiple of 8.
      cut: how many texts were cut.
    """

    def __init__(
        self,
        texts: Sequence[LabelledText],
        labels: Sequence[str],
        tokenizer: Tokenizer,
        max_length: int,
    ):
        numbers = {label: number for number, label in enumerate(labels)}
        self._labels = np.array([numbers[text.label] for text in texts], np.int32)
        self.cut = 0
        self._tokens = [self._ids(text, tokenizer, max_length) for text in texts]
        longest = max(len(tokens) for tokens in self._tokens)
        self.length = min(-(-longest // 8) * 8, max_length)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> Batch:
        tokens = self._tokens[index]
        return {
            "tokens": np.pad(tokens, (0, self.length - len(tokens))),
            "lengths": np.array(len(tokens), np.int32),
            "labels": self._labels[index],
            "weights": np.array(1.0, np.float32),
        }

    def _ids(self, text: LabelledText, tokenizer: Tokenizer, max_length: int) -> np.ndarray:
        first, *others = tokenizer.encode_batch(text.texts)
        tail = [token for ids in others for token in (*tokenizer.encode("\n"), *ids)]
        head = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
        room = max_length - len(head) - len(tail)
        if len(first) > room:
            self.cut += 1
        ids = [*head, *first[: max(room, 0)], *tail][:max_length]
        if not ids:
            raise UserError(f"{text.where}: the text has no tokens")
        return np.array(ids, np.int32)


class Classifier(nnx.Module):
    """An encoder with a head: `dropout(pooled) W + b`.

    Args:
      body: a T5Gemma, of which the encoder is used, or a decoder-only language model.
      classes: C.
      pooling: the vector of the text: its last token's, or the mean of all.
    """

    def __init__(self, body: nnx.Module, classes: int, pooling: Pooling, *, rngs: nnx.Rngs):
        if pooling not in ("last", "mean"):
            raise UserError(f"pooling is '{pooling}'; use last or mean")
        self.body = body
        self.pooling = pooling
        self.head = Linear(
            _width(body),
            classes,
            axes=("embed", None),
            use_bias=True,
            init=_head_init(classes),
            rngs=rngs,
        )

    def __call__(
        self, tokens: jax.Array, lengths: jax.Array, dropout: float = 0.0, key: Any = None
    ) -> jax.Array:
        """Logits `[B, C]` fp32 of `tokens [B, L]`, of which `lengths [B]` are real in each row."""
        real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        if hasattr(self.body, "encode"):
            states = self.body.encode(tokens, valid=real)
        else:
            states = self.body.hidden(tokens)  # Causal: what stands behind a text changes nothing.
        states = states.astype(jnp.float32)
        if self.pooling == "last":
            last = jnp.maximum(lengths - 1, 0)[:, None, None]
            pooled = jnp.take_along_axis(states, last, axis=1)[:, 0]
        else:
            total = jnp.sum(jnp.where(real[..., None], states, 0.0), axis=1)
            pooled = total / jnp.maximum(lengths, 1)[:, None]
        if dropout:
            keep = jax.random.bernoulli(key, 1.0 - dropout, pooled.shape)
            pooled = jnp.where(keep, pooled / (1.0 - dropout), 0.0)
        return self.head(pooled)


def _head_init(classes: int) -> Any:
    """Small: at first all classes are as likely (as the transformers library's heads)."""
    return jax.nn.initializers.normal(0.02 * classes**-0.5)


def _width(body: Any) -> int:
    return body.config.encoder.width if hasattr(body, "encode") else body.width


class Classification(Task):
    """Cross-entropy of the class; the metric `accuracy` is the share that is right.

    Args:
      build_body: makes what `Classifier` takes.
      classes: C.
      pooling: see `Classifier`.
      dropout: share of the pooled vector that training leaves out.
    """

    unit = "texts"

    def __init__(
        self,
        build_body: Callable[[nnx.Rngs], nnx.Module],
        classes: int,
        *,
        pooling: Pooling = "last",
        dropout: float = 0.0,
    ):
        if not 0.0 <= dropout < 1.0:
            raise UserError(f"dropout must lie between 0 and 1; got {dropout}")
        self._build_body, self._classes = build_body, classes
        self._pooling, self._dropout = pooling, dropout

    def build(self, rngs: nnx.Rngs) -> Classifier:
        body = self._build_body(rngs)
        if hasattr(body, "encode"):
            body.decoder = None  # Not used, so neither held nor decayed.
        return Classifier(body, self._classes, self._pooling, rngs=rngs)

    def fresh_head(self, abstract: PureDict, key: jax.Array) -> PureDict:
        """A head's parameters as `build` draws them, for a body that is there already."""
        kernel, bias = abstract["kernel"], abstract["bias"]
        init = _head_init(self._classes)
        return {"kernel": init(key, kernel.shape), "bias": jnp.zeros(bias.shape)}

    def loss(self, model: Any, batch: Any, key: jax.Array) -> Loss:
        return _loss(model(batch["tokens"], batch["lengths"], self._dropout, key), batch)

    def evaluate(self, model: Any, batch: Any, key: jax.Array) -> Loss:
        return _loss(model(batch["tokens"], batch["lengths"]), batch)


def _loss(logits: jax.Array, batch: Any) -> Loss:
    weights, labels = batch["weights"].astype(jnp.float32), batch["labels"]
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    nll = jax.nn.logsumexp(logits, axis=1) - chosen
    right = (jnp.argmax(logits, axis=1) == labels) * weights
    return Loss(jnp.sum(nll * weights), jnp.sum(weights), {"accuracy": jnp.sum(right)})
