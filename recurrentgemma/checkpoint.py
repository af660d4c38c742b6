"""Loading RecurrentGemma from any format it comes in, and saving it again."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from common.checkpoint import (
    Row,
    TensorReader,
    export_tensors,
    open_checkpoint,
    read_model_folder,
    subtree,
    write_safetensors,
)
from common.data.tokenizers import load_tokenizer
from common.errors import UserError
from common.launch import config as configs
from common.models.loading import (
    TOKENIZER,
    Placement,
    attach_tokenizer,
    read_json,
    require_new,
    save_workspace,
    stop_tokens,
)
from common.sharding import DEFAULT_RULES, Rules
from recurrentgemma import convert
from recurrentgemma.model import Griffin, GriffinConfig

PACKAGE = "recurrentgemma"
DEFAULT_EOS = 1


def load(
    path: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    param_dtype: jax.typing.DTypeLike | None = None,
    window_counts_self: bool | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
) -> Griffin:
    """Loads a model.

    Args:
      path: a Hugging Face folder (config.json and safetensors, one file or shards), an original
        release (the flax parameter tree's folder, or the torch `.pt` file), a workspace model
        folder, or the workdir of a training run (its newest checkpoint).
      dtype: compute dtype.
      param_dtype: dtype the parameters are kept in; default `dtype`'s for bfloat16, else float32.
      window_counts_self: read the window's size as the transformers library does. The default
        follows what the weights were trained with: W earlier keys and the query's own.
      mesh: places each parameter on its shards, without ever holding the whole model on one host.
      rules: logical axis names to mesh axes.

    Returns:
      The model; `tokenizer` and `stop_tokens` are set if a tokenizer lies beside it.

    Raises:
      UserError: nothing there, damaged, or another model's checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no checkpoint at {path}: check the path")
    options: dict[str, Any] = {"dtype": dtype}
    if window_counts_self is not None:
        options["window_counts_self"] = window_counts_self
    placement = Placement(dtype if param_dtype is None else param_dtype, mesh, rules)
    build = functools.partial(_build, options=options, placement=placement)
    if (path / "model.json").is_file() or (path / "checkpoints").is_dir():
        model = _load_workspace(path, options, placement)
    elif (path / "config.json").is_file():
        data = read_json(path / "config.json")
        config = convert.config_from_huggingface(data, str(path / "config.json"))
        rows = convert.huggingface_rows
        model = build(config, open_checkpoint(path), rows, ignore=convert.HUGGINGFACE_TIED)
        model.stop_tokens = stop_tokens(path, data) or (DEFAULT_EOS,)
    else:
        model = _load_release(path, build)
    folder = path if path.is_dir() else path.parent
    for place in (folder / TOKENIZER, folder.parent / TOKENIZER):
        if model.tokenizer is None and place.is_file() and not (folder / "model.json").is_file():
            attach_tokenizer(model, load_tokenizer(place))
    return model


def save(
    model: Griffin,
    path: str | Path,
    format: Literal["workspace", "huggingface"] = "workspace",
    dtype: jax.typing.DTypeLike | None = None,
) -> None:
    """Writes a model to a new folder.

    Args:
      model: the model; its tokenizer goes along.
      path: the folder; must not exist or be empty.
      format: "workspace", or "huggingface" as `RecurrentGemmaForCausalLM.from_pretrained` reads it.
      dtype: dtype of the stored parameters; default as they are.

    Raises:
      UserError: the folder is not empty, or the format cannot express the model.
    """
    path = Path(path)
    require_new(path)
    if format == "workspace":
        save_workspace(model, path, PACKAGE, configs.to_dict(model.config), dtype)
    elif format == "huggingface":
        _save_huggingface(model, path, dtype)
    else:
        raise UserError(f"unknown format '{format}': choose 'workspace' or 'huggingface'")


def _build(
    config: GriffinConfig,
    reader: TensorReader,
    rows: Callable[[GriffinConfig], list[Row]],
    *,
    options: dict[str, Any],
    placement: Placement,
    ignore: tuple[str, ...] = (),
) -> Griffin:
    """A model of `config` filled from `reader` by the key map `rows(config)`."""
    config = dataclasses.replace(config, **options)
    return placement.from_tensors(_builder(config), reader, rows(config), ignore)


def _builder(config: GriffinConfig) -> Callable[[], Griffin]:
    return lambda: Griffin(config, rngs=nnx.Rngs(0))


def _load_release(path: Path, build) -> Griffin:
    """The original release: a flax tree `{"params": …}` or torch's dotted state dict."""
    reader = subtree(open_checkpoint(path), "params/", "model.", "state_dict.")
    torch = "embedder.input_embedding" in set(reader.keys())
    separator = "." if torch else "/"
    config = convert.config_from_shapes(reader, separator, torch)
    rows = functools.partial(convert.release_rows, separator=separator, torch=torch)
    model = build(config, reader, rows)
    model.stop_tokens = (DEFAULT_EOS,)
    return model


def _load_workspace(path: Path, options: dict[str, Any], placement: Placement) -> Griffin:
    """A model folder, or a run's workdir with its checkpoints."""
    if (path / "model.json").is_file():
        package, data, params_path, tokenizer_path = read_model_folder(path)
        where = str(path / "model.json")
    else:
        package, data = PACKAGE, read_json(path / "config.json").get("model")
        params_path, tokenizer_path = path / "checkpoints", path / TOKENIZER
        where = str(path / "config.json")
    if package != PACKAGE or not isinstance(data, dict):
        raise UserError(f"{where} describes a model of '{package}', not of {PACKAGE}")
    config = dataclasses.replace(configs.from_dict(GriffinConfig, data, where), **options)
    model = placement.from_params(_builder(config), params_path)
    if tokenizer_path is not None and Path(tokenizer_path).is_file():
        attach_tokenizer(model, load_tokenizer(tokenizer_path))
    return model


def _save_huggingface(model: Griffin, path: Path, dtype: Any) -> None:
    params = nnx.to_pure_dict(nnx.state(model))
    kept = jnp.dtype(dtype) if dtype is not None else jax.tree.leaves(params)[0].dtype
    config = convert.config_to_huggingface(model.config, kept.name)
    tensors = export_tensors(params, convert.huggingface_rows(model.config), dtype)
    write_safetensors(path, tensors)
    if model.tokenizer is not None:
        config |= {
            "bos_token_id": model.tokenizer.bos_id,
            "eos_token_id": model.tokenizer.eos_id,
            "pad_token_id": model.tokenizer.pad_id,
        }
        model.tokenizer.save(path / TOKENIZER)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
