"""Decoders as the transformers library keeps them: configurations and key maps, both ways."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from common.checkpoint import (
    IDENTITY,
    TRANSPOSE,
    Row,
    Stack,
    TensorReader,
    Transpose,
    chain,
)
from common.checkpoint.reader import RenamedTensors
from common.errors import UserError, nearest
from common.models.decoder import DecoderConfig, Reach
from common.nn.rope import RopeScaling

# Files may state any number; these are far beyond every model and still cheap to describe.
MOST_LAYERS = 10_000
LARGEST = 100_000_000
IGNORED = ("*.rotary_emb.inv_freq",)
HEAD = "lm_head.weight"

REACHES: Mapping[str, Reach] = {"full_attention": "global", "sliding_attention": "local"}
LAYER_TYPES = {reach: name for name, reach in REACHES.items()}
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets a `model_type` apart.

    Attributes:
      architecture: class of the transformers library.
      fields: of `DecoderConfig`, the same in all its models.
      defaults: of config.json, where it is silent.
    """

    architecture: str
    fields: Mapping[str, Any]
    defaults: Mapping[str, Any]

    @property
    def gemma(self) -> bool:
        return bool(self.fields.get("post_norms"))


_GEMMA = {
    "post_norms": True,
    "zero_centred_norm": True,
    "scale_embedding": True,
    "bfloat16_scale": False,
}
_LLAMA = {"zero_centred_norm": False, "scale_embedding": False}
# Some released configurations leave out what the library's class has as default.
_GEMMA_2B = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "gemma2": Family(
            "Gemma2ForCausalLM",
            _GEMMA,
            {
                **_GEMMA_2B,
                "vocab_size": 256_000,
                "max_position_embeddings": 8192,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
            },
        ),
        "gemma3_text": Family(
            "Gemma3ForCausalLM",
            {**_GEMMA, "qk_norm": True},
            {
                **_GEMMA_2B,
                "vocab_size": 262_208,
                "max_position_embeddings": 131_072,
                "rope_theta": 1_000_000.0,
                "rope_local_base_freq": 10_000.0,
                "sliding_window_pattern": 6,
            },
        ),
        "llama": Family("LlamaForCausalLM", _LLAMA, {"max_position_embeddings": 2048}),
        "mistral": Family(
            "MistralForCausalLM",
            _LLAMA,
            {
                "num_key_value_heads": 8,
                "max_position_embeddings": 131_072,
                "sliding_window": 4096,
            },
        ),
        "qwen2": Family(
            "Qwen2ForCausalLM", {**_LLAMA, "qkv_bias": True}, {"max_position_embeddings": 32_768}
        ),
        "qwen3": Family(
            "Qwen3ForCausalLM",
            {**_LLAMA, "qk_norm": True},
            {"max_position_embeddings": 32_768, "head_dim": 128},
        ),
    }
)
MULTIMODAL = "gemma3"  # its text part is a gemma3_text
KNOWN = (*FAMILIES, MULTIMODAL)


# Key map.


def huggingface_rows(config: DecoderConfig) -> list[Row]:
    """Key map of `…ForCausalLM` of every family."""
    rows = [
        Row("model.embed_tokens.weight", "embed.table"),
        Row("model.norm.weight", "final_norm.scale"),
    ]
    if not config.tied:
        rows.append(Row(HEAD, "head.table"))
    norms = {"input_layernorm": "attention_norm"}
    if config.post_norms:
        norms |= {
            "post_attention_layernorm": "attention_post_norm",
            "pre_feedforward_layernorm": "mlp_norm",
            "post_feedforward_layernorm": "mlp_post_norm",
        }
    else:
        norms["post_attention_layernorm"] = "mlp_norm"
    if config.qk_norm:
        norms |= {f"self_attn.{x}_norm": f"attention.{x}_norm" for x in "qk"}
    both = chain(Stack(0), Transpose((2, 0, 1)))  # two [F, D] -> [D, 2, F]
    for theirs, ours, index in _blocks(config):

        def add(source, target, transform=IDENTITY, theirs=theirs, ours=ours, index=index):
            sources = source if isinstance(source, tuple) else (source,)
            names = tuple(f"{theirs}.{name}" for name in sources)
            rows.append(Row(names, f"{ours}.{target}", transform, index))

        for source, target in norms.items():
            add(f"{source}.weight", f"{target}.scale")
        for x in "qkvo":
            add(f"self_attn.{x}_proj.weight", f"attention.{x}.kernel", TRANSPOSE)
        for x in "qkv" if config.qkv_bias else "":
            add(f"self_attn.{x}_proj.bias", f"attention.{x}.bias")
        add(("mlp.gate_proj.weight", "mlp.up_proj.weight"), "mlp.up", both)
        add("mlp.down_proj.weight", "mlp.down.kernel", TRANSPOSE)
    return rows


def _blocks(config: DecoderConfig) -> Iterator[tuple[str, str, int | None]]:
    """Each block's name there, its path in our tree, and its index in the stack, if any."""
    size = len(config.pattern)
    stacked = config.num_layers // size * size
    for layer in range(config.num_layers):
        theirs = f"model.layers.{layer}"
        if layer < stacked:
            yield theirs, f"units.blocks.{layer % size}", layer // size
        else:
            yield theirs, f"rest.blocks.{layer - stacked}", None


def ignored(config: DecoderConfig) -> tuple[str, ...]:
    """Patterns of tensors that a checkpoint of `config` may have and nobody needs."""
    return (*IGNORED, HEAD) if config.tied else IGNORED


def text_tensors(reader: TensorReader) -> TensorReader:
    """The tensors of a multimodal checkpoint's language model, named as those of a plain one."""
    names: dict[str, str] = {}
    for name in sorted(reader.keys()):
        for old, new in (
            ("language_model.model.", "model."),
            ("model.language_model.", "model."),
            ("language_model.lm_head.", "lm_head."),
            ("lm_head.", "lm_head."),
        ):
            if name.startswith(old):
                names[new + name[len(old) :]] = name
                break
    if not names:
        raise UserError(f"{reader.path} holds no language model: no tensor 'language_model.…'")
    return RenamedTensors(reader, names)


# Configuration, from theirs.


class _Fields:
    """Values of a config.json, each checked: it is somebody's file."""

    def __init__(self, data: Mapping[str, Any], where: str, defaults: Mapping[str, Any]):
        self.data, self.where, self._defaults = data, where, defaults

    def get(self, name: str, default: Any = None) -> Any:
        """The value; where the file is silent, the family's default, or else `default`."""
        return self.data[name] if name in self.data else self._defaults.get(name, default)

    def whole(self, name: str, default: int | None = None, most: int = LARGEST) -> int:
        value = self.get(name)
        value = default if value is None else value
        if type(value) is not int or not 0 < value <= most:
            raise self.wrong(name, f"a whole number of 1 to {most:,}", value)
        return value

    def real(self, name: str, default: float | None = None) -> float:
        value = self.get(name)
        return self.checked(name, default if value is None else value)

    def real_or_none(self, name: str) -> float | None:
        value = self.get(name)
        return None if value is None else self.checked(name, value)

    def checked(self, name: str, value: Any) -> float:
        number = type(value) in (int, float) and math.isfinite(value) and value > 0
        if not number:
            raise self.wrong(name, "a positive number", value)
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.get(name, False)
        if value not in (True, False, None):
            raise self.wrong(name, "true or false", value)
        return bool(value)

    def group(self, name: str) -> Mapping[str, Any]:
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "an object", value)
        return value or {}

    def wrong(self, name: str, wanted: str, value: Any) -> UserError:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        return UserError(f"{self.where}: '{name}' should be {wanted}, not {shown}")


def config_from_huggingface(data: Mapping[str, Any], where: str) -> DecoderConfig:
    """The shape that a `config.json` states.

    Args:
      data: the file's object.
      where: its path, for errors.

    Raises:
      UserError: another family, or one of these with something that no decoder here has.
    """
    kind = data.get("model_type")
    if kind == MULTIMODAL:
        inner = data.get("text_config")
        if not isinstance(inner, dict):
            raise UserError(f"{where} has no 'text_config'")
        data, kind = inner, "gemma3_text"
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{where} describes a {kind!r} model{nearest(str(kind), KNOWN)}; "
            f"decoders are read of {', '.join(KNOWN)}"
        )
    family = FAMILIES[kind]
    fields = _Fields(data, where, family.defaults)
    for name in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if fields.flag(name):
            raise UserError(f"{where}: {name} of a {kind} model is not supported")
    if kind == "gemma3_text" and fields.get("attn_logit_softcapping") is not None:
        raise UserError(f"{where}: attn_logit_softcapping of a {kind} model is not supported")
    named = "hidden_activation" if family.gemma else "hidden_act"
    activation = fields.get(named) or ("gelu_pytorch_tanh" if family.gemma else "silu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UserError(f"{where}: {named} {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    width, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    head_dim = fields.whole("head_dim", max(1, width // heads))
    layers = fields.whole("num_hidden_layers", most=MOST_LAYERS)
    scalar = fields.real("query_pre_attn_scalar", float(head_dim))
    reaches = _reaches(kind, layers, fields)
    base, scaling, local_base = _rope(fields)
    return DecoderConfig(
        vocab_size=fields.whole("vocab_size"),
        width=width,
        mlp_width=fields.whole("intermediate_size"),
        num_heads=heads,
        num_kv_heads=fields.whole("num_key_value_heads", heads),
        head_dim=head_dim,
        num_layers=layers,
        max_length=fields.whole("max_position_embeddings"),
        pattern=shortest_pattern(reaches),
        window=fields.whole("sliding_window") if "local" in reaches else None,
        rope_base=base,
        rope_scaling=scaling,
        local_rope_base=local_base if "local" in reaches else None,
        query_scale=None if scalar == head_dim else scalar**-0.5,
        attention_softcap=fields.real_or_none("attn_logit_softcapping"),
        norm_epsilon=fields.real("rms_norm_eps", 1e-6),
        activation=ACTIVATIONS[activation],  # type: ignore[arg-type]
        tied=fields.flag("tie_word_embeddings"),
        logits_softcap=fields.real_or_none("final_logit_softcapping"),
        **family.fields,
    )


def _reaches(kind: str, layers: int, fields: _Fields) -> tuple[Reach, ...]:
    """What the attention of every layer reaches."""
    named = fields.get("layer_types")
    if named is not None:
        if (
            not isinstance(named, list)
            or len(named) != layers
            or set(map(str, named)) - set(REACHES)
        ):
            raise UserError(
                f"{fields.where}: 'layer_types' should name {' or '.join(REACHES)} for each of "
                f"{layers} layers"
            )
        return tuple(REACHES[name] for name in named)
    if kind == "gemma2":
        period = 2
    elif kind == "gemma3_text":
        period = fields.whole("sliding_window_pattern")
    elif kind == "mistral":
        return (("global" if fields.get("sliding_window") is None else "local"),) * layers
    elif fields.flag("use_sliding_window"):
        full = fields.whole("max_window_layers", 28)
        return tuple("global" if layer < full else "local" for layer in range(layers))
    else:
        period = 1
    return tuple("local" if (layer + 1) % period else "global" for layer in range(layers))


def shortest_pattern(reaches: tuple[Reach, ...]) -> tuple[Reach, ...]:
    """The shortest pattern that, repeated and cut off, gives `reaches`."""
    sizes = range(1, len(reaches) + 1)
    return next(
        reaches[:size] for size in sizes if reaches[size:] == reaches[: len(reaches) - size]
    )


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None, float | None]:
    """Base and scaling, and the base of local layers where it is another.

    Newer files have `rope_parameters`, one group or one for each type of layer; older ones
    `rope_theta`, `rope_local_base_freq` and `rope_scaling`.
    """
    groups = fields.group("rope_parameters")
    nested = any(name in groups for name in REACHES)
    whole = _inner(fields, groups, "full_attention") if nested else groups
    local = _inner(fields, groups, "sliding_attention") if nested else {}
    if _scaling(fields, {**local}) is not None:
        raise UserError(f"{fields.where}: a rope scaling of sliding layers is not supported")
    base = whole.get("rope_theta")
    base = (
        fields.real("rope_theta", 10_000.0) if base is None else fields.checked("rope_theta", base)
    )
    scaling = _scaling(fields, {**whole, **fields.group("rope_scaling")})
    local_base = local.get("rope_theta", fields.get("rope_local_base_freq"))
    if local_base is None or (local_base == base and scaling is None):
        return base, scaling, None
    return base, scaling, fields.checked("rope_local_base_freq", local_base)


def _inner(fields: _Fields, groups: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    group = groups.get(name) or {}
    if not isinstance(group, dict):
        raise fields.wrong(f"rope_parameters.{name}", "an object", group)
    return group


def _scaling(fields: _Fields, data: Mapping[str, Any]) -> RopeScaling | None:
    kind = data.get("rope_type") or data.get("type") or "default"
    share = data.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if share != 1.0:
        raise UserError(f"{fields.where}: partial_rotary_factor {share!r} is not supported")
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise UserError(
            f"{fields.where}: rope type {kind!r} is not supported; default, linear and llama3 are"
        )
    factor = fields.checked("rope factor", data.get("factor"))
    if kind == "linear":
        return RopeScaling("linear", factor)
    length = data.get("original_max_position_embeddings", fields.get("max_position_embeddings"))
    try:
        return RopeScaling(
            "llama3",
            factor,
            fields.checked("low_freq_factor", data.get("low_freq_factor")),
            fields.checked("high_freq_factor", data.get("high_freq_factor")),
            int(fields.checked("original_max_position_embeddings", length)),
        )
    except ValueError as error:
        raise UserError(f"{fields.where}: {error}") from error


# Configuration, to theirs.


def config_to_huggingface(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` with which the transformers library loads our export.

    Of the families, it is the first whose file reads back as `config`.

    Raises:
      UserError: there is none.
    """
    if config.width % config.num_heads:
        raise UserError(
            f"the transformers library needs model.width ({config.width}) to be a multiple of "
            f"model.num_heads ({config.num_heads})"
        )
    for kind in FAMILIES:
        data = _written(kind, config, dtype)
        try:
            again = config_from_huggingface(json.loads(json.dumps(data)), "config.json")
        except UserError:
            continue
        if _compared(again) == _compared(config):
            return data
    raise UserError(
        f"no family of the transformers library has this model's shape ({', '.join(FAMILIES)} "
        "were tried): export it in the workspace's format"
    )


def _compared(config: DecoderConfig) -> DecoderConfig:
    """`config` with everything alike that makes no difference to a family."""
    pattern = shortest_pattern(config.reaches())
    local_base = config.local_rope_base
    if "local" not in pattern or (local_base == config.rope_base and config.rope_scaling is None):
        local_base = None
    scale = config.query_scale
    if scale is not None and math.isclose(scale, config.head_dim**-0.5, rel_tol=1e-12):
        scale = None
    return dataclasses.replace(
        config,
        max_length=None,
        pattern=pattern,
        window=config.window if "local" in pattern else None,
        local_rope_base=local_base,
        query_scale=scale,
        bfloat16_scale=config.bfloat16_scale and config.scale_embedding,
        dtype="float32",
        remat="none",
    )


def _written(kind: str, config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """A config.json of family `kind`, whether or not it can say all that `config` does."""
    family = FAMILIES[kind]
    reaches = config.reaches()
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[config.activation]
    data: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length or 131_072,
        "rms_norm_eps": config.norm_epsilon,
        "attention_bias": False,
        "tie_word_embeddings": config.tied,
        "hidden_activation" if family.gemma else "hidden_act": activation,
        "torch_dtype": dtype,
        **_written_rope(kind, config),
    }
    if kind == "llama":
        data["mlp_bias"] = False
        return data
    data["sliding_window"] = config.window
    if kind == "mistral":
        data["sliding_window"] = config.window if "local" in reaches else None
        return data
    data["layer_types"] = [LAYER_TYPES[reach] for reach in reaches]
    if not family.gemma:
        data["use_sliding_window"] = "local" in reaches
        data["max_window_layers"] = reaches.index("local") if "local" in reaches else len(reaches)
        return data
    scale = config.query_scale
    scalar = config.head_dim if scale is None else scale**-2
    whole = round(scalar)
    data["query_pre_attn_scalar"] = whole if math.isclose(scalar, whole, rel_tol=1e-9) else scalar
    data["final_logit_softcapping"] = config.logits_softcap
    data["attn_logit_softcapping"] = config.attention_softcap
    return data


def _written_rope(kind: str, config: DecoderConfig) -> dict[str, Any]:
    """The rotary positions in the newer and in the older way."""
    scaling = config.rope_scaling
    group: dict[str, Any] | None = None
    if scaling is not None:
        group = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            group |= {
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_length,
            }
    whole = {"rope_theta": config.rope_base, **(group or {"rope_type": "default"})}
    older: dict[str, Any] = {"rope_theta": config.rope_base}
    if group is not None:
        older["rope_scaling"] = group
    if kind != "gemma3_text":
        return {**older, "rope_parameters": whole}
    local = config.rope_base if config.local_rope_base is None else config.local_rope_base
    types = {
        "full_attention": whole,
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
    return {**older, "rope_local_base_freq": local, "rope_parameters": types}
