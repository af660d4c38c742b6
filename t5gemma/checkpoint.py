"""Loading T5Gemma from any format it comes in, and saving it again."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx

from common.checkpoint import open_checkpoint, open_huggingface, subtree
from common.data.tokenizers import Tokenizer
from common.errors import UserError
from common.launch import config as configs
from common.models.loading import (
    Placement,
    attach_tokenizer,
    check_layers,
    open_workspace,
    read_json,
    recognise,
    save_huggingface,
    save_workspace,
    stop_tokens,
    tokenizer_beside,
    write_as,
)
from common.sharding import DEFAULT_RULES, Rules
from t5gemma import convert
from t5gemma.config import EncoderWindow, T5GemmaConfig
from t5gemma.model import T5Gemma

PACKAGE = "t5gemma"
DEFAULT_EOS = 1


def load(
    path: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    param_dtype: jax.typing.DTypeLike | None = None,
    encoder_window: EncoderWindow | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    remat: Literal["none", "full", "dots"] = "none",
) -> T5Gemma:
    """Loads a model.

    Args:
      path: a Hugging Face folder (config.json and safetensors, one file or shards), the published
        flax parameter tree's folder, a workspace model folder, or the workdir of a training run
        (its newest checkpoint).
      dtype: compute dtype.
      param_dtype: dtype the parameters are kept in; default `dtype`'s.
      encoder_window: how the encoder's window is read, see `T5GemmaConfig`. The default follows
        what the weights were trained with, or what the checkpoint says of itself.
      mesh: places each parameter on its shards, without ever holding the whole model on one host.
      rules: logical axis names to mesh axes.
      remat: what the backward pass recomputes.

    Returns:
      The model; `tokenizer` and `stop_tokens` are set if a tokenizer lies beside it.

    Raises:
      UserError: nothing there, damaged, or another model's checkpoint.
    """
    path = Path(path)
    placement = Placement(dtype if param_dtype is None else param_dtype, mesh, rules)
    options = _Options(dtype, remat, encoder_window)
    kind = recognise(path)
    if kind == "workspace":
        return _load_workspace(path, placement, options)
    read = _load_huggingface if kind == "huggingface" else _load_flax
    model = read(path, placement, options)
    tokenizer = tokenizer_beside(path)
    if tokenizer is not None:
        _attach(model, tokenizer)
    return model


def save(
    model: T5Gemma,
    path: str | Path,
    format: Literal["workspace", "huggingface"] = "workspace",
    dtype: jax.typing.DTypeLike | None = None,
) -> None:
    """Writes a model to a new folder.

    Args:
      model: the model; its tokenizer goes along.
      path: the folder; must not exist or be empty.
      format: "workspace", or "huggingface" as `T5GemmaForConditionalGeneration.from_pretrained`
        reads it.
      dtype: dtype of the stored parameters; default as they are.

    Raises:
      UserError: the folder is not empty, or the format cannot express the model.
    """
    path = Path(path)

    def workspace() -> None:
        save_workspace(model, path, PACKAGE, configs.to_dict(model.config), dtype)

    def huggingface() -> None:
        _save_huggingface(model, path, dtype)

    write_as(path, format, {"workspace": workspace, "huggingface": huggingface})


@dataclasses.dataclass(frozen=True)
class _Options:
    """What the caller decides of the model, whatever its checkpoint says."""

    dtype: Literal["float32", "bfloat16"]
    remat: Literal["none", "full", "dots"]
    encoder_window: EncoderWindow | None

    def builder(self, config: T5GemmaConfig):
        config = config.with_stacks(dtype=self.dtype, remat=self.remat)
        if self.encoder_window is not None:
            config = dataclasses.replace(config, encoder_window=self.encoder_window)
        return lambda: T5Gemma(config, rngs=nnx.Rngs(0))


def _load_huggingface(path: Path, placement: Placement, options: _Options) -> T5Gemma:
    where = path / "config.json"
    data = read_json(where)
    config = convert.config_from_huggingface(data, str(where))
    reader = open_huggingface(path)
    check_layers(where, config.encoder.num_layers + config.decoder.num_layers, reader)
    ignored: tuple[str, ...] = ()
    if config.decoder.tied:
        convert.check_tied_head(reader)
        ignored = (convert.HEAD,)
    rows = convert.huggingface_rows(config)
    model = placement.from_tensors(options.builder(config), reader, rows, ignored)
    model.stop_tokens = stop_tokens(path, data, data["decoder"]) or (DEFAULT_EOS,)
    return model


def _load_flax(path: Path, placement: Placement, options: _Options) -> T5Gemma:
    """The published flax tree `{"params": {"encoder": …, "decoder": …}}`."""
    reader = subtree(open_checkpoint(path), "params/params/", "params/")
    config = convert.config_from_shapes(reader)
    rows = convert.flax_rows(config, reader)
    model = placement.from_tensors(options.builder(config), reader, rows)
    model.stop_tokens = (DEFAULT_EOS,)
    return model


def _load_workspace(path: Path, placement: Placement, options: _Options) -> T5Gemma:
    saved = open_workspace(path, PACKAGE, f"of {PACKAGE}")
    config = configs.from_dict(T5GemmaConfig, saved.config, saved.where)
    model = placement.from_params(options.builder(config), saved.params)
    if saved.tokenizer is None:
        model.stop_tokens = (DEFAULT_EOS,)
    else:
        _attach(model, saved.tokenizer)
    return model


def _attach(model: T5Gemma, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > model.config.encoder.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the encoder "
            f"{model.config.encoder.vocab_size}: they do not belong together"
        )
    attach_tokenizer(model, tokenizer)


def _save_huggingface(model: T5Gemma, path: Path, dtype: jax.typing.DTypeLike | None) -> None:
    def config(stored: str) -> dict[str, Any]:
        fields = convert.config_to_huggingface(model.config, stored)
        stops = sorted(model.stop_tokens)
        if stops:
            fields["eos_token_id"] = stops if len(stops) > 1 else stops[0]
        return fields

    rows = convert.huggingface_rows(model.config)
    save_tokenizer = None if model.tokenizer is None else model.tokenizer.save_huggingface
    save_huggingface(model, path, rows, config, dtype, save_tokenizer)
