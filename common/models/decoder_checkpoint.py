"""Loading decoder-only models from any format they come in, and saving them again."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx

from common import values
from common.checkpoint import open_huggingface
from common.data.tokenizers import folder_tokenizer
from common.errors import UserError
from common.models.decoder import Decoder, DecoderConfig
from common.models.decoder_gguf import open_gguf
from common.models.decoder_huggingface import (
    MULTIMODAL,
    config_from_huggingface,
    config_to_huggingface,
    huggingface_rows,
    ignored,
    text_tensors,
)
from common.models.loading import (
    Placement,
    Source,
    attach_tokenizer,
    check_layers,
    open_workspace,
    read_json,
    recognise,
    save_huggingface,
    save_workspace,
    stop_tokens,
    write_as,
)
from common.sharding import DEFAULT_RULES, Rules

PACKAGE = "common.models"


def load(
    path: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    param_dtype: jax.typing.DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    remat: Literal["none", "full", "dots"] = "none",
) -> Decoder:
    """Loads a decoder.

    Args:
      path: a Hugging Face folder of a Gemma 2, Gemma 3 (of a multimodal one, its language model),
        Llama, Mistral, Qwen 2 or Qwen 3 (config.json and safetensors, one file or shards), a
        .gguf file of one of these, a workspace model folder, or the workdir of a training run (its
        newest checkpoint).
      dtype: compute dtype.
      param_dtype: dtype the parameters are kept in; default `dtype`.
      mesh: places each parameter on its shards, without ever holding the whole model on one host.
      rules: logical axis names to mesh axes.
      remat: what the backward pass recomputes.

    Returns:
      The model; `tokenizer` and `stop_tokens` are set as far as the folder tells.

    Raises:
      UserError: nothing there, damaged, or another model's checkpoint.
    """
    path = Path(path)
    placement = Placement(dtype if param_dtype is None else param_dtype, mesh, rules)
    options: dict[str, Any] = {"dtype": dtype, "remat": remat}
    kind = recognise(path)
    if kind == "workspace":
        return _load_workspace(path, placement, options)
    source = _open_huggingface(path) if kind == "huggingface" else _open_gguf(path)
    model = placement.from_tensors(
        _builder(source.config, options), source.reader, source.rows, source.ignore
    )
    model.stop_tokens = source.stop_tokens
    if source.tokenizer is not None:
        attach_tokenizer(model, source.tokenizer)
    return model


def save(
    model: Decoder,
    path: str | Path,
    format: Literal["huggingface", "workspace"] = "huggingface",
    dtype: jax.typing.DTypeLike | None = None,
) -> None:
    """Writes a decoder to a new folder.

    Args:
      model: the model; its tokenizer goes along.
      path: the folder; must not exist or be empty.
      format: "huggingface" as `AutoModelForCausalLM.from_pretrained` reads it, or "workspace".
      dtype: dtype of the stored parameters; default as they are.

    Raises:
      UserError: the folder is not empty, or the format cannot express the model.
    """
    path = Path(path)

    def workspace() -> None:
        save_workspace(model, path, PACKAGE, values.encode(model.config, DecoderConfig), dtype)

    def huggingface() -> None:
        _save_huggingface(model, path, dtype)

    write_as(path, format, {"huggingface": huggingface, "workspace": workspace})


def _builder(config: DecoderConfig, options: dict[str, Any]):
    adjusted = dataclasses.replace(config, **options)
    return lambda: Decoder(adjusted, rngs=nnx.Rngs(0))


def _open_gguf(path: Path) -> Source:
    """A .gguf file, or a folder with one."""
    if not path.is_dir():
        return open_gguf(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return open_gguf(files[0])
    if files:
        raise UserError(f"{path} has {len(files)} .gguf files: name one, as {files[0]}")
    raise UserError(f"{path} is no model: it has neither config.json nor model.json")


def _open_huggingface(path: Path) -> Source:
    where = path / "config.json"
    data = read_json(where)
    config = config_from_huggingface(data, str(where))
    reader = open_huggingface(path)
    if data.get("model_type") == MULTIMODAL:
        reader = text_tensors(reader)
    check_layers(where, config.num_layers, reader)
    return Source(
        config,
        reader,
        huggingface_rows(config),
        ignored(config),
        folder_tokenizer(path),
        stop_tokens(path, data, data.get("text_config")),
    )


def _load_workspace(path: Path, placement: Placement, options: dict[str, Any]) -> Decoder:
    saved = open_workspace(path, PACKAGE, "a decoder")
    config = values.decode(saved.config, DecoderConfig, "", saved.where)
    model = placement.from_params(_builder(config, options), saved.params)
    if saved.tokenizer is not None:
        attach_tokenizer(model, saved.tokenizer)
    return model


def _save_huggingface(model: Decoder, path: Path, dtype: jax.typing.DTypeLike | None) -> None:
    tokenizer = model.tokenizer

    def config(stored: str) -> dict[str, Any]:
        fields = config_to_huggingface(model.config, stored)
        if model.stop_tokens:
            fields["eos_token_id"] = list(model.stop_tokens)
        if tokenizer is not None:
            ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
            fields |= {name: value if value >= 0 else None for name, value in ids.items()}
        return fields

    save_tokenizer = None if tokenizer is None else tokenizer.save_huggingface
    save_huggingface(model, path, huggingface_rows(model.config), config, dtype, save_tokenizer)
