"""Beam search in one compiled loop, for every model whose decode cache can be re-ordered.

The rules are those of the transformers library, so that results can be compared: a hypothesis ends
with a stop token among the best `num_beams` candidates, its score is its log-probability over
`length ** length_penalty`, and a row is done when no open beam is expected to beat its worst.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError

EarlyStopping = bool | Literal["never"]
# Below any score; sums of a few of them still differ from each other and from scores.
_NEVER = -1.0e9


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """How hypotheses are kept and compared.

    Attributes:
      num_beams: n, open hypotheses of a row, and ended ones that are kept.
      length_penalty: exponent of the length by which log-probabilities are divided; above 0
        favours long texts.
      early_stopping: True ends a row at n ended hypotheses; False when the best open beam, judged
        at its present length, cannot beat the worst of them; "never" judges it at the length that
        favours it most.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise UserError(f"num_beams must be at least 1, not {self.num_beams}")
        if self.early_stopping not in (True, False, "never"):
            raise UserError(
                f"early_stopping must be true, false or 'never', not {self.early_stopping!r}"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hypotheses:
    """Texts of each row, best first.

    Attributes:
      tokens: `[B, n, N]` int32.
      logprobs: `[B, n, N]` fp32 of each token.
      scores: `[B, n]` fp32: of open ones their log-probability, of ended ones that by length.
      lengths: `[B, n]` int32, a stop token counted.
      ended: `[B, n]` bool.
    """

    tokens: jax.Array
    logprobs: jax.Array
    scores: jax.Array
    lengths: jax.Array
    ended: jax.Array

    def pick(self, index: jax.Array) -> "Hypotheses":
        """Those at `index [B, m]`."""

        def one(x: jax.Array) -> jax.Array:
            expanded = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
            return jnp.take_along_axis(x, expanded, axis=1)

        return jax.tree.map(one, self)

    def best(self, count: int) -> "Hypotheses":
        """The `count` of each row with the highest scores, in order."""
        return self.pick(jax.lax.top_k(self.scores, count)[1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamState:
    """What the loop carries.

    Attributes:
      step: [] int32 tokens written so far.
      logits: `[B n, V]` fp32 for the next token of each open hypothesis.
      open: `[B]` hypotheses being written.
      ended: `[B]` those that are done; until there are n, some are placeholders.
      hopeful: `[B]` bool, False once no open beam is expected to beat the worst ended one.
      cache: the model's, of `B n` rows.
    """

    step: jax.Array
    logits: jax.Array
    open: Hypotheses
    ended: Hypotheses
    hopeful: jax.Array
    cache: Any


@functools.partial(jax.jit, static_argnames=("graphdef", "search", "max_new_tokens", "in_place"))
def beam_search(
    graphdef: nnx.GraphDef,
    state: Any,
    logits: jax.Array,
    cache: Any,
    stop: jax.Array,
    *,
    search: BeamSearch,
    max_new_tokens: int,
    in_place: bool = False,
) -> Hypotheses:
    """Returns the ended hypotheses of each row, `[B, n]`, best first.

    Args:
      graphdef, state: the model, split.
      logits: `[B, V]` of each prompt's last token.
      cache: the model's cache behind the prompts.
      stop: `[S]` int32 tokens that end a text (-1: none).
      search, max_new_tokens: static.
      in_place: as for `decode`.
    """
    batch, vocab_size = logits.shape
    beams, longest = search.num_beams, max_new_tokens
    # So many that enough of them are open, should every beam's best continuations be stop tokens.
    candidates = min(beams * max(2, 1 + stop.shape[0]), beams * vocab_size)
    if not in_place:
        graphdef, state = nnx.split(nnx.merge(graphdef, state).unrolled())

    def empty() -> Hypotheses:
        shape = (batch, beams)
        return Hypotheses(
            tokens=jnp.zeros((*shape, longest), jnp.int32),
            logprobs=jnp.zeros((*shape, longest), jnp.float32),
            scores=jnp.full(shape, _NEVER, jnp.float32),
            lengths=jnp.zeros(shape, jnp.int32),
            ended=jnp.zeros(shape, bool),
        )

    def continued(loop: BeamState) -> tuple[Hypotheses, jax.Array]:
        """The likeliest continuations, and the beam `[B, candidates]` that each comes from."""
        logprobs = jax.nn.log_softmax(loop.logits.astype(jnp.float32), axis=-1)
        logprobs = logprobs.reshape(batch, beams, vocab_size)
        totals = (logprobs + loop.open.scores[..., None]).reshape(batch, -1)
        scores, index = jax.lax.top_k(totals, candidates)
        beam, token = index // vocab_size, (index % vocab_size).astype(jnp.int32)
        chosen = jnp.take_along_axis(logprobs.reshape(batch, -1), index, axis=1)
        parents = loop.open.pick(beam)
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=loop.step, axis=2)
        ended = (token[..., None] == stop).any(axis=-1) | (loop.step + 1 == longest)
        texts = Hypotheses(
            tokens=put(parents.tokens, token),
            logprobs=put(parents.logprobs, chosen),
            scores=scores,
            lengths=jnp.full_like(token, loop.step + 1),
            ended=ended,
        )
        return texts, beam

    def select(loop: BeamState) -> tuple[BeamState, jax.Array]:
        """One token further; also the beam `[B, n]` that each open hypothesis comes from."""
        texts, beam = continued(loop)
        scores = texts.scores + jnp.where(texts.ended, _NEVER, 0.0)
        index = jax.lax.top_k(scores, beams)[1]
        going = dataclasses.replace(texts, scores=scores).pick(index)

        # Only what ended among the best n counts: the rest stands by to keep n beams open.
        done = texts.ended & (jnp.arange(candidates) < beams)
        full = loop.ended.ended.all(axis=1) & (search.early_stopping is True)
        closed = full | ~loop.hopeful
        shut = jnp.where(done, 0.0, _NEVER) + jnp.where(closed, _NEVER, 0.0)[:, None]
        length = (loop.step + 1).astype(jnp.float32)
        scores = texts.scores / length**search.length_penalty + shut
        new = dataclasses.replace(texts, scores=scores, ended=done)
        both = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), loop.ended, new)
        ended = both.best(beams)

        judged = jnp.float32(longest) if _judged_at_the_end(search) else length
        hoped = going.scores[:, :1] / judged**search.length_penalty
        worst = jnp.where(ended.ended, ended.scores.min(axis=1, keepdims=True), _NEVER)
        hopeful = loop.hopeful & (hoped > worst).any(axis=1)
        loop = dataclasses.replace(
            loop, step=loop.step + 1, open=going, ended=ended, hopeful=hopeful
        )
        return loop, jnp.take_along_axis(beam, index, axis=1)

    def body(loop: BeamState) -> BeamState:
        loop, beam = select(loop)
        rows = (beam + beams * jnp.arange(batch)[:, None]).reshape(-1)
        token = jax.lax.dynamic_index_in_dim(loop.open.tokens, loop.step - 1, 2, keepdims=False)
        if in_place:
            # Tied to the token, so that the compiler does not cut before the loop after all.
            weights, token = jax.lax.optimization_barrier((state, token))
            model = nnx.merge(graphdef, weights).unrolled()
        else:
            model = nnx.merge(graphdef, state)
        logits, cache = model.extend(token.reshape(-1, 1), loop.cache.take_rows(rows))
        return dataclasses.replace(loop, logits=logits[:, 0], cache=cache)

    def unfinished(loop: BeamState) -> jax.Array:
        full = loop.ended.ended.all() & (search.early_stopping is True)
        return (loop.step < longest - 1) & loop.hopeful.any() & ~full

    first = jnp.full((batch, beams), _NEVER, jnp.float32).at[:, 0].set(0.0)
    loop = BeamState(
        step=jnp.zeros((), jnp.int32),
        logits=jnp.repeat(logits, beams, axis=0),
        open=dataclasses.replace(empty(), scores=first),  # All are alike: one counts.
        ended=empty(),
        hopeful=jnp.ones((batch,), bool),
        cache=cache.unrolled().take_rows(jnp.repeat(jnp.arange(batch), beams)),
    )
    # The last token is chosen outside: nobody needs the logits behind it. Where all rows are done
    # before, this changes nothing any more.
    loop, _ = select(jax.lax.while_loop(unfinished, body, loop))
    return loop.ended


def _judged_at_the_end(search: BeamSearch) -> bool:
    return search.early_stopping == "never" and search.length_penalty > 0.0
