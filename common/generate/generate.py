"""Text or tokens in, continuations out: ragged prompts, samplers, per-row stop."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.data.tokenizers import Tokenizer
from common.errors import UserError
from common.generate.beam import BeamSearch, EarlyStopping, beam_search
from common.generate.decode import READ_IN_PLACE, begin, decode, prefill, prefill_more, unroll
from common.generate.sampling import Sampling
from common.models import CausalLM, DecodeCache

Prompt = str | Sequence[int]
Stop = Sequence[int | str] | int | str | None


@dataclasses.dataclass(frozen=True)
class Generation:
    """One continuation.

    Attributes:
      tokens: the new tokens alone; the stop token, if one came, is the last.
      text: their text without stop token or stop string; None without a tokenizer.
      logprobs: log-probability of each token under the model (temperature 1, nothing cut off).
    """

    tokens: list[int]
    text: str | None
    logprobs: list[float]


@runtime_checkable
class EncoderDecoder(Protocol):
    """A model that reads a prompt whole, and then writes a text of its own about it."""

    encoder: Any  # With `vocab_size` and `max_length`.
    decoder: CausalLM
    tokenizer: Any
    stop_tokens: tuple[int, ...]

    def begin(
        self, tokens: jax.Array, valid: jax.Array | None = None, *, max_length: int | None = None
    ) -> tuple[jax.Array, DecodeCache]: ...


def generate(
    model: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Stop = None,
    *,
    tokenizer: Tokenizer | None = None,
    add_bos: bool = True,
    max_prompt_tokens: int | None = None,
    prefill_chunk: int = 2048,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
) -> list[Generation]:
    """Continues every prompt; an encoder-decoder answers it.

    Each row is computed as if it were alone: padding never reaches a state. The same arguments give
    the same result; a row's random draws depend on its index and the seed alone.

    Args:
      model: any `CausalLM` or `EncoderDecoder`.
      prompts: strings (need a tokenizer) or lists of token ids, of any mix of lengths.
      max_new_tokens: N, the most tokens a row may get.
      temperature, top_k, top_p: see `Sampling`; temperature 0 is greedy.
      seed: of the random draws.
      stop: tokens or strings that end a row; None takes the model's `stop_tokens`. A stop string is
        looked for in the decoded text, across token borders.
      tokenizer: default the model's own (`model.tokenizer`).
      add_bos: put the beginning-of-sequence token in front of string prompts, if there is one.
      max_prompt_tokens: refuse longer prompts. A model with a `max_length` refuses prompts that
        leave no room for `max_new_tokens` in any case.
      prefill_chunk: most prompt tokens read in one call; bounds memory on long prompts. An encoder
        reads a prompt in one call.
      num_beams: above 1 searches for the likeliest text with so many hypotheses (`BeamSearch`).
      length_penalty, early_stopping: see `BeamSearch`.

    Returns:
      One `Generation` a prompt, in order.
    """
    sampling = Sampling(temperature, top_k, top_p)
    search = BeamSearch(num_beams, length_penalty, early_stopping)
    if num_beams > 1 and temperature > 0.0:
        raise UserError("beam search takes the likeliest tokens: leave temperature at 0")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if prefill_chunk < 1:
        raise UserError(f"prefill_chunk must be at least 1, not {prefill_chunk}")
    if isinstance(prompts, str):
        raise UserError("prompts must be a list; for one prompt pass [prompt]")
    if not prompts:
        return []
    tokenizer = tokenizer if tokenizer is not None else model.tokenizer
    reader = model.encoder if isinstance(model, EncoderDecoder) else model
    rows = [_encode(p, n, tokenizer, add_bos, reader.vocab_size) for n, p in enumerate(prompts)]
    stop_tokens, stop_strings = _split_stop(stop, model.stop_tokens)
    if stop_strings and tokenizer is None:
        raise UserError("stop strings need a tokenizer; pass token ids or load one")

    graphdef, state = nnx.split(model)
    if isinstance(model, EncoderDecoder):
        _check_lengths(rows, 0, max_prompt_tokens, reader.max_length)
        _check_text_length(max_new_tokens, model.decoder.max_length)
        logits, cache = _begin(graphdef, state, rows, max_new_tokens)
        graphdef, state = nnx.split(model.decoder)
    else:
        _check_lengths(rows, max_new_tokens, max_prompt_tokens, reader.max_length)
        logits, cache = _prefill(graphdef, state, rows, max_new_tokens, prefill_chunk)
    in_place = _platform(logits) in READ_IN_PLACE
    ends = jnp.asarray(sorted(stop_tokens) or [-1], jnp.int32)
    if num_beams > 1:
        found = beam_search(
            graphdef,
            state,
            logits,
            cache,
            ends,
            search=search,
            max_new_tokens=max_new_tokens,
            in_place=in_place,
        )
        best = jax.tree.map(lambda x: x[:, 0], (found.tokens, found.logprobs, found.lengths))
    else:
        cache = unroll(cache)
        loop = decode(
            graphdef,
            state,
            logits,
            cache,
            jax.random.key(seed),
            ends,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            in_place=in_place,
        )
        best = (loop.tokens, loop.logprobs, loop.lengths)
    tokens, logprobs, lengths = jax.device_get(best)
    return [
        _finish(
            tokens[r, :n].tolist(), logprobs[r, :n].tolist(), tokenizer, stop_tokens, stop_strings
        )
        for r, n in enumerate(lengths[: len(rows)])
    ]


def _encode(
    prompt: Prompt, index: int, tokenizer: Tokenizer | None, add_bos: bool, vocab_size: int
) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UserError(
                "a text prompt needs a tokenizer, and this model came without one; "
                "pass token ids or tokenizer=…"
            )
        begins = add_bos and tokenizer.bos_id >= 0
        ids = ([tokenizer.bos_id] if begins else []) + list(tokenizer.encode(prompt))
    else:
        ids = [int(token) for token in prompt]
    if not ids:
        raise UserError(f"prompt {index} is empty: give at least one token")
    if min(ids) < 0 or max(ids) >= vocab_size:
        bad = min(ids) if min(ids) < 0 else max(ids)
        raise UserError(
            f"prompt {index} has token {bad}, but the model's vocabulary is 0..{vocab_size - 1}: "
            "is this the model's tokenizer?"
        )
    return ids


def _check_lengths(
    rows: list[list[int]], new: int, max_prompt_tokens: int | None, max_length: int | None
) -> None:
    longest = max(range(len(rows)), key=lambda r: len(rows[r]))
    size = len(rows[longest])
    if max_prompt_tokens is not None and size > max_prompt_tokens:
        raise UserError(
            f"prompt {longest} has {size} tokens, more than the {max_prompt_tokens} allowed"
        )
    if max_length is not None and size + new > max_length:
        raise UserError(
            f"prompt {longest} has {size} tokens and {new} are to come, "
            f"more than the model's {max_length}"
        )


def _check_text_length(new: int, max_length: int | None) -> None:
    if max_length is not None and new + 1 > max_length:
        raise UserError(
            f"{new} tokens are to come behind the first, more than the model's {max_length}"
        )


def _split_stop(stop: Stop, default: Sequence[int]) -> tuple[set[int], list[str]]:
    if stop is None:
        return set(default), []
    items = [stop] if isinstance(stop, int | str) else list(stop)
    return {s for s in items if not isinstance(s, str)}, [
        s for s in items if isinstance(s, str) and s
    ]


def _padded(rows: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows, padded on the right: tokens and where they are real, `[B, length]`."""
    tokens = np.zeros((len(rows), length), np.int32)
    valid = np.zeros((len(rows), length), bool)
    for r, row in enumerate(rows):
        tokens[r, : len(row)] = row
        valid[r, : len(row)] = True
    return tokens, valid


def _begin(graphdef, state, rows: list[list[int]], new: int):
    """An encoder reads the prompts, padded to a power of two so that few lengths are compiled."""
    tokens, valid = _padded(rows, _next_power_of_two(max(len(row) for row in rows)))
    return begin(graphdef, state, tokens, valid, capacity=_next_power_of_two(new + 1))


def _prefill(graphdef, state, rows: list[list[int]], new: int, chunk: int):
    """Reads the prompts, right-padded to a power of two so that few lengths are ever compiled."""
    longest = max(len(row) for row in rows)
    padded = min(_next_power_of_two(longest), -(-longest // chunk) * chunk)
    tokens, valid = _padded(rows, padded)
    capacity = _next_power_of_two(longest + new)
    logits, cache = prefill(graphdef, state, tokens[:, :chunk], valid[:, :chunk], capacity=capacity)
    for start in range(chunk, padded, chunk):
        part = slice(start, start + chunk)
        logits, cache = prefill_more(
            graphdef, state, tokens[:, part], valid[:, part], cache, logits
        )
    return logits, cache


def _platform(array: jax.Array) -> str:
    return next(iter(array.devices())).platform


def _next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _finish(
    tokens: list[int],
    logprobs: list[float],
    tokenizer: Tokenizer | None,
    stop_tokens: set[int],
    stop_strings: list[str],
) -> Generation:
    if tokenizer is None:
        return Generation(tokens, None, logprobs)
    body = tokens[:-1] if tokens and tokens[-1] in stop_tokens else tokens
    text = tokenizer.decode(body)
    cuts = [at for at in (text.find(s) for s in stop_strings) if at >= 0]
    if cuts:
        text = text[: min(cuts)]
        # The shortest run of tokens whose text reaches the cut.
        keep = next(n for n in range(len(body) + 1) if len(tokenizer.decode(body[:n])) >= min(cuts))
        tokens, logprobs = tokens[:keep], logprobs[:keep]
    return Generation(tokens, text, logprobs)
