"""Loading decoder-only models from any format they come in, and saving them again."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from common import values
from common.checkpoint import (
    export_tensors,
    open_huggingface,
    read_model_folder,
    write_safetensors,
)
from common.data.tokenizers import folder_tokenizer, load_tokenizer
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
    TOKENIZER,
    Placement,
    Source,
    attach_tokenizer,
    read_json,
    require_new,
    save_workspace,
    stop_tokens,
)
from common.sharding import DEFAULT_RULES, Rules, barrier

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
    if not path.exists():
        raise UserError(f"no checkpoint at {path}: check the path")
    placement = Placement(dtype if param_dtype is None else param_dtype, mesh, rules)
    options: dict[str, Any] = {"dtype": dtype, "remat": remat}
    if (path / "model.json").is_file() or (path / "checkpoints").is_dir():
        return _load_workspace(path, placement, options)
    source = _open_huggingface(path) if path.is_dir() else open_gguf(path)
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
    require_new(path)
    if format == "workspace":
        config = values.encode(model.config, DecoderConfig)
        save_workspace(model, path, PACKAGE, config, dtype)
    elif format == "huggingface":
        _save_huggingface(model, path, dtype)
    else:
        raise UserError(f"unknown format '{format}': choose 'huggingface' or 'workspace'")


def _builder(config: DecoderConfig, options: dict[str, Any]):
    adjusted = dataclasses.replace(config, **options)
    return lambda: Decoder(adjusted, rngs=nnx.Rngs(0))


def _open_huggingface(path: Path) -> Source:
    where = path / "config.json"
    if not where.is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return open_gguf(files[0])
        if files:
            raise UserError(f"{path} has {len(files)} .gguf files: name one, as {files[0]}")
        raise UserError(f"{path} is no model: it has neither config.json nor model.json")
    data = read_json(where)
    config = config_from_huggingface(data, str(where))
    reader = open_huggingface(path)
    if data.get("model_type") == MULTIMODAL:
        reader = text_tensors(reader)
    if config.num_layers > len(reader.keys()):
        raise UserError(
            f"{where} states {config.num_layers} layers, but the checkpoint has only "
            f"{len(reader.keys())} tensors"
        )
    return Source(
        config,
        reader,
        huggingface_rows(config),
        ignored(config),
        folder_tokenizer(path),
        stop_tokens(path, data, data.get("text_config")),
    )


def _load_workspace(path: Path, placement: Placement, options: dict[str, Any]) -> Decoder:
    """A model folder, or a run's workdir with its checkpoints."""
    data: Any
    tokenizer: Path | None
    if (path / "model.json").is_file():
        package, data, params, tokenizer = read_model_folder(path)
        where = str(path / "model.json")
        if package != PACKAGE:
            raise UserError(f"{where} describes a model of '{package}', not a decoder")
    else:
        data = read_json(path / "config.json").get("model")
        params, tokenizer = path / "checkpoints", path / TOKENIZER
        where = str(path / "config.json")
        if not isinstance(data, dict):
            raise UserError(f"{where} has no 'model': not the run of a decoder")
    config = values.decode(data, DecoderConfig, "", where)
    model = placement.from_params(_builder(config, options), params)
    if tokenizer is not None and tokenizer.is_file():
        attach_tokenizer(model, load_tokenizer(tokenizer))
    return model


def _save_huggingface(model: Decoder, path: Path, dtype: Any) -> None:
    params = nnx.to_pure_dict(nnx.state(model))
    kept = jnp.dtype(dtype) if dtype is not None else jax.tree.leaves(params)[0].dtype
    config = config_to_huggingface(model.config, kept.name)
    if model.stop_tokens:
        config["eos_token_id"] = list(model.stop_tokens)
    if model.tokenizer is not None:
        ids = {"bos_token_id": model.tokenizer.bos_id, "pad_token_id": model.tokenizer.pad_id}
        config |= {name: value if value >= 0 else None for name, value in ids.items()}
    primary = jax.process_index() == 0  # The others take part in gathering what lies on them.
    if primary:
        path.mkdir(parents=True, exist_ok=True)
    if primary and model.tokenizer is not None:
        model.tokenizer.save_huggingface(path)  # First: not every tokenizer can be told to others.
    tensors = export_tensors(params, huggingface_rows(model.config), dtype)
    write_safetensors(path, tensors, write=primary)
    if primary:
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    barrier("decoder_saved")
