"""Adaptation: an encoder-decoder from decoder-only models (specification, 2.8).

Every weight of a donor is kept: the encoder only loses its mask, the decoder only gains cross
attention. That is copied from the decoder's own self-attention, layer by layer, where the encoder
is as wide as the decoder, and drawn at random where it is not.
"""

from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.models import Decoder, LanguageModel
from common.sharding import DEFAULT_RULES, Rules, state_shardings
from t5gemma.config import EncoderWindow, T5GemmaConfig
from t5gemma.model import T5Gemma

CrossInit = Literal["copy", "random", "zero"]
CROSS_INITS = ("copy", "random", "zero")
# What a decoder block has besides its donor's, and which of the donor's it is copied from.
CROSS_PARTS = {
    "cross": "attention",
    "cross_norm": "attention_norm",
    "cross_post_norm": "attention_post_norm",
}
_Tree = dict[Any, Any]


def adapt(
    encoder_donor: LanguageModel,
    decoder_donor: LanguageModel | None = None,
    *,
    cross: CrossInit | None = None,
    encoder_window: EncoderWindow = "published",
    causal_encoder: bool = False,
    seed: int = 0,
    rules: Rules = DEFAULT_RULES,
) -> T5Gemma:
    """Makes an encoder-decoder of one decoder-only model, or of two.

    Args:
      encoder_donor: becomes the encoder; a `Decoder` of any family.
      decoder_donor: becomes the decoder; default the same model.
      cross: how cross attention begins. "copy": as the self-attention of the same layer, norms
        included; "random": drawn, with fresh norms; "zero": drawn, but for an output of zeros, so
        that the decoder begins exactly as its donor. None copies where the widths are equal and
        draws where they are not; then train `in_cross_attention` alone for the first steps.
      encoder_window, causal_encoder: see `T5GemmaConfig`.
      seed: of what is drawn.
      rules: where what is drawn lies, for donors that lie on a mesh.

    Returns:
      A model that shares no array with its donors. Tokenizer and stop tokens are the decoder
      donor's.

    Raises:
      UserError: donors that do not fit together, or that are no decoders.
    """
    decoder_donor = encoder_donor if decoder_donor is None else decoder_donor
    for role, donor in (("encoder", encoder_donor), ("decoder", decoder_donor)):
        if not isinstance(donor, Decoder):
            raise UserError(
                f"the {role}'s donor must be a decoder of common.models (Gemma 2 or 3, Llama), not "
                f"{type(donor).__name__}"
            )
    read, written = encoder_donor.config, decoder_donor.config
    if cross is None:
        cross = "copy" if read.width == written.width else "random"
    if cross not in CROSS_INITS:
        raise UserError(f"cross must be one of {', '.join(CROSS_INITS)}, not {cross!r}")
    if cross == "copy" and read.width != written.width:
        raise UserError(
            f"cross attention cannot be copied: the encoder is {read.width} wide and the decoder "
            f"{written.width}; use cross='random'"
        )
    special = _special_tokens(encoder_donor, decoder_donor)
    config = T5GemmaConfig(
        read, written, encoder_window=encoder_window, causal_encoder=causal_encoder, **special
    )
    graphdef, state = nnx.split(nnx.eval_shape(lambda: T5Gemma(config, rngs=nnx.Rngs(0))))
    encoder, decoder = _copied(encoder_donor), _copied(decoder_donor)
    encoder.pop("head", None)
    drawn = {} if cross == "copy" else _drawn(config, seed, decoder_donor, rules)
    for place, block in _blocks(decoder):
        for part, source in CROSS_PARTS.items():
            if source in block:
                given = _copy(block[source]) if cross == "copy" else drawn[place][part]
                block[part] = given
        if cross == "zero":
            kernel = block["cross"]["o"]["kernel"]
            block["cross"]["o"]["kernel"] = jnp.zeros_like(kernel)
    nnx.replace_by_pure_dict(state, {"encoder": encoder, "decoder": decoder})
    model = nnx.merge(graphdef, state)
    model.tokenizer = decoder_donor.tokenizer
    model.stop_tokens = decoder_donor.stop_tokens
    return model


def in_cross_attention(path: tuple[Any, ...]) -> bool:
    """Whether a parameter at `path` of a `T5Gemma` is the cross attention's, norms included.

    These alone are trained in the first steps after an unbalanced adaptation (paper, section 3).
    """
    return not CROSS_PARTS.keys().isdisjoint(path)


def _special_tokens(encoder_donor: LanguageModel, decoder_donor: LanguageModel) -> dict[str, int]:
    """The tokens that a configuration needs to know, of the donors' tokenizer."""
    tokenizer, other = decoder_donor.tokenizer, encoder_donor.tokenizer
    if tokenizer is None:
        return {}
    if other is not None and other.fingerprint() != tokenizer.fingerprint():
        raise UserError("the donors' tokenizers differ: adapt models that share one")
    # Texts of a vocabulary without a beginning are told apart by their ends.
    begin = tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eos_id
    found = {"bos_token": begin} if begin >= 0 else {}
    # Padding must not be mistaken for a token that texts are made of.
    pad = tokenizer.pad_id
    return found | {"pad_token": -1 if pad in (begin, tokenizer.eos_id) else pad}


def _copied(model: nnx.Module) -> _Tree:
    return _copy(nnx.to_pure_dict(nnx.state(model)))


def _copy(tree: _Tree) -> _Tree:
    """Arrays of their own: a training step gives its parameters' memory away."""
    return jax.tree.map(jnp.copy, tree)


def _blocks(stack: _Tree) -> Iterator[tuple[tuple[Any, ...], _Tree]]:
    """Yields path and parameters of every block of a stack, repeated ones as one."""
    for part in ("units", "rest"):
        for number, block in stack.get(part, {}).get("blocks", {}).items():
            yield (part, "blocks", number), block


def _drawn(
    config: T5GemmaConfig, seed: int, donor: LanguageModel, rules: Rules
) -> dict[tuple[Any, ...], _Tree]:
    """Fresh cross attention of each block of the decoder, where the donor's mesh wants it."""

    def draw(key: jax.Array) -> dict[tuple[Any, ...], _Tree]:
        return parts(nnx.to_pure_dict(nnx.state(T5Gemma(config, rngs=nnx.Rngs(params=key)))))

    def parts(tree: _Tree) -> dict[tuple[Any, ...], _Tree]:
        return {
            place: {part: block[part] for part in CROSS_PARTS if part in block}
            for place, block in _blocks(tree["decoder"])
        }

    place = donor.embed.table[...].sharding
    shardings = None
    if isinstance(place, jax.sharding.NamedSharding):
        abstract = nnx.state(nnx.eval_shape(lambda: T5Gemma(config, rngs=nnx.Rngs(0))))
        shardings = parts(state_shardings(abstract, place.mesh, rules))
    # Compiled, so that nothing but what is returned is ever drawn.
    drawn = jax.jit(draw, out_shardings=shardings)(jax.random.key(seed))
    dtype = donor.embed.table[...].dtype
    return jax.tree.map(lambda x: x.astype(dtype), drawn)
