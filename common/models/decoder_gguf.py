"""Decoders as llama.cpp keeps them in .gguf files: configurations, key map and tokenizer.

The names of the tensors are others than the transformers library's, but one for one. Of the values
there are two differences: Llama's queries and keys have the two halves of a head interleaved, and
the norms of Gemma already hold the one that the model adds.
"""

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoint import (
    AddConstant,
    GGUFTensors,
    InterleavedRotary,
    Row,
    Transform,
    chain,
    open_gguf_file,
)
from common.data.tokenizers import Tokenizer
from common.data.tokenizers_gguf import gguf_tokenizer
from common.errors import UserError, nearest
from common.models.decoder import GEMMA2_PATTERN, GEMMA3_PATTERN, DecoderConfig
from common.models.decoder_huggingface import FAMILIES, MOST_LAYERS, huggingface_rows
from common.models.loading import Source
from common.nn.rope import RopeScaling

log = logging.getLogger(__name__)

HEAD, TABLE, ROPE_FACTORS = "output.weight", "token_embd.weight", "rope_freqs.weight"
# How llama.cpp calls a family of the transformers library.
ARCHITECTURES: Mapping[str, str] = {
    "llama": "llama",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
# Their largest models, known by their depth, scale scores by D / N, which no file says.
WIDTH_SCALED = {"gemma2": 46, "gemma3": 62}

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"},
}
_POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def open_gguf(path: Path) -> Source:
    """Opens a .gguf file of a decoder.

    Raises:
      UserError: the file is damaged, or of an architecture, or with a setting, that no decoder
        here has.
    """
    file = open_gguf_file(path)
    architecture = _architecture(file)
    config = config_from_gguf(file)
    return Source(
        config,
        file,
        gguf_rows(config, architecture),
        (ROPE_FACTORS,),
        _tokenizer(file),
        _stop_tokens(file, config.vocab_size),
    )


def gguf_rows(config: DecoderConfig, architecture: str) -> list[Row]:
    """Key map of `architecture`, one of `ARCHITECTURES`: the transformers library's, adapted."""
    gemma = config.zero_centred_norm
    interleaved = architecture == "llama"
    rows = []
    for row in huggingface_rows(config):
        transform: Transform = row.transform
        if gemma and row.target.endswith("norm.scale"):
            transform = AddConstant(-1.0)
        elif interleaved and re.search(r"attention\.[qk]\.kernel$", row.target):
            transform = chain(InterleavedRotary(config.head_dim), transform)
        names = tuple(_gguf_name(str(part), config.post_norms) for part in row.parts)
        rows.append(dataclasses.replace(row, sources=names, transform=transform))
    return rows


def _gguf_name(name: str, post_norms: bool) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    stem, _, kind = name.rpartition(".")
    layer = re.match(r"model\.layers\.(\d+)\.", stem)
    names = _NAMES | (_POST_NORMS if post_norms else {"post_attention_layernorm": "ffn_norm"})
    if layer is None:
        return f"{names[stem]}.{kind}"
    return f"blk.{layer[1]}.{names[stem[layer.end() :]]}.{kind}"


def config_from_gguf(file: GGUFTensors) -> DecoderConfig:
    """The shape that the metadata of a .gguf file states.

    Raises:
      UserError: another architecture, or one of these with something that no decoder here has.
    """
    architecture = _architecture(file)
    family = FAMILIES[ARCHITECTURES[architecture]]

    def key(name: str) -> str:
        return f"{architecture}.{name}"

    width = file.integer(key("embedding_length"))
    heads = file.integer(key("attention.head_count"))
    layers = file.integer(key("block_count"))
    if layers > min(MOST_LAYERS, len(file.keys())):
        raise UserError(
            f"{file.path} states {layers} layers, but has only {len(file.keys())} tensors"
        )
    head_dim = file.integer(key("attention.key_length"), max(1, width // max(1, heads)))
    for name in ("attention.value_length", "rope.dimension_count"):
        if file.integer(key(name), head_dim) != head_dim:
            raise UserError(
                f"{file.path}: metadata {key(name)} is {file.integer(key(name))}, but the heads "
                f"have {head_dim} dims; no decoder here has that"
            )
    scaling = _rope_scaling(file, key, head_dim)
    fields: dict[str, Any] = {}
    if architecture in WIDTH_SCALED:
        fields = _gemma(file, key, architecture, layers)
        if layers == WIDTH_SCALED[architecture]:
            fields["query_scale"] = (width / heads) ** -0.5
    return DecoderConfig(
        vocab_size=file.shape(TABLE)[0],
        width=width,
        mlp_width=file.integer(key("feed_forward_length")),
        num_heads=heads,
        num_kv_heads=file.integer(key("attention.head_count_kv"), heads),
        head_dim=head_dim,
        num_layers=layers,
        max_length=file.integer(key("context_length")),
        rope_base=file.number(key("rope.freq_base"), 1e4 if architecture != "gemma3" else 1e6),
        rope_scaling=scaling,
        norm_epsilon=file.number(key("attention.layer_norm_rms_epsilon"), 1e-6),
        activation="gelu_tanh" if architecture in WIDTH_SCALED else "silu",
        tied=HEAD not in set(file.keys()),
        **fields,
        **family.fields,
    )


def _architecture(file: GGUFTensors) -> str:
    name = file.string("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(
            f"{file.path} holds a {name!r} model{nearest(name, ARCHITECTURES)}; "
            f"decoders are read of {', '.join(ARCHITECTURES)}"
        )
    return name


def _gemma(
    file: GGUFTensors, key: Callable[[str], str], architecture: str, layers: int
) -> dict[str, Any]:
    """What sets Gemma 2 and 3 apart."""
    second = architecture == "gemma2"
    caps = {
        name: file.number(key(theirs), default if second else 0.0) or None
        for name, theirs, default in (
            ("attention_softcap", "attn_logit_softcapping", 50.0),
            ("logits_softcap", "final_logit_softcapping", 30.0),
        )
    }
    pattern = GEMMA2_PATTERN if second else GEMMA3_PATTERN
    fields: dict[str, Any] = {
        **caps,
        "pattern": pattern[:layers],
        "window": file.integer(key("attention.sliding_window"), 4096 if second else 1024),
    }
    if not second:
        fields["local_rope_base"] = file.number(key("rope.freq_base_swa"), 10_000.0)
    return fields


def _rope_scaling(
    file: GGUFTensors, key: Callable[[str], str], head_dim: int
) -> RopeScaling | None:
    """The scaling that the metadata names, or the one that the tensor of factors holds."""
    kind = file.string(key("rope.scaling.type"), "none")
    factor = file.number(key("rope.scaling.factor"), file.number(key("rope.scale_linear"), 1.0))
    if kind not in ("none", "linear"):
        raise UserError(f"{file.path}: rope scaling {kind!r} is not supported; none and linear are")
    if factor <= 0:
        raise UserError(f"{file.path}: rope scaling by {factor}, which is not positive")
    if ROPE_FACTORS in set(file.keys()):
        return _llama3_scaling(file, key, head_dim)
    return RopeScaling("linear", factor) if factor != 1.0 else None


def _llama3_scaling(
    file: GGUFTensors, key: Callable[[str], str], head_dim: int
) -> RopeScaling | None:
    """Llama 3's scaling, of which a file holds what became of it: a divisor for every frequency.

    The longest wavelengths are divided by the whole factor; the others of its numbers are the same
    in all the models, and are taken if they give the file's divisors.
    """
    if file.shape(ROPE_FACTORS) != (head_dim // 2,):
        raise UserError(
            f"{file.path}: tensor '{ROPE_FACTORS}' is {list(file.shape(ROPE_FACTORS))}, "
            f"not {[head_dim // 2]}"
        )
    divisors = file.read(ROPE_FACTORS).astype(np.float64)
    if np.all(divisors == 1.0):
        return None
    base = file.number(key("rope.freq_base"), 1e4)
    frequencies = base ** (-np.arange(head_dim // 2) * 2.0 / head_dim)
    if np.isfinite(divisors).all() and divisors.min() > 0:
        scaling = RopeScaling("llama3", float(divisors.max()))
        if np.allclose(frequencies / np.asarray(scaling(frequencies)), divisors, rtol=1e-4):
            return scaling
    raise UserError(f"{file.path}: tensor '{ROPE_FACTORS}' is not Llama 3's rope scaling")


def _tokenizer(file: GGUFTensors) -> Tokenizer | None:
    """The file's tokenizer; the model is of use without one too."""
    try:
        return gguf_tokenizer(file)
    except UserError as error:
        log.warning("The model is loaded without its tokenizer: %s", error)
        return None


def _stop_tokens(file: GGUFTensors, vocab_size: int) -> tuple[int, ...]:
    """The tokens that the metadata calls ends."""
    keys = [f"tokenizer.ggml.{role}_token_id" for role in ("eos", "eot", "eom")]
    found = {file.integer(key) for key in keys if key in file.metadata}
    return tuple(sorted(token for token in found if token < vocab_size))
