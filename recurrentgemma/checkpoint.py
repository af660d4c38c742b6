"""Loading RecurrentGemma from any format it comes in, and saving it again."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx

from common.checkpoint import Row, TensorReader, open_checkpoint, subtree
from common.data.tokenizers import Tokenizer, load_tokenizer
from common.launch import config as configs
from common.models.loading import (
    TOKENIZER,
    Placement,
    attach_tokenizer,
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
    options: dict[str, Any] = {"dtype": dtype}
    if window_counts_self is not None:
        options["window_counts_self"] = window_counts_self
    placement = Placement(dtype if param_dtype is None else param_dtype, mesh, rules)
    kind = recognise(path)
    if kind == "workspace":
        return _load_workspace(path, options, placement)
    build = functools.partial(_build, options=options, placement=placement)
    read = _load_huggingface if kind == "huggingface" else _load_release
    model = read(path, build)
    tokenizer = tokenizer_beside(path, _sentencepiece)
    if tokenizer is not None:
        attach_tokenizer(model, tokenizer)
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

    def workspace() -> None:
        save_workspace(model, path, PACKAGE, configs.to_dict(model.config), dtype)

    def huggingface() -> None:
        _save_huggingface(model, path, dtype)

    write_as(path, format, {"workspace": workspace, "huggingface": huggingface})


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


def _load_huggingface(path: Path, build: Callable[..., Griffin]) -> Griffin:
    data = read_json(path / "config.json")
    config = convert.config_from_huggingface(data, str(path / "config.json"))
    rows = convert.huggingface_rows
    model = build(config, open_checkpoint(path), rows, ignore=convert.HUGGINGFACE_TIED)
    model.stop_tokens = stop_tokens(path, data) or (DEFAULT_EOS,)
    return model


def _load_release(path: Path, build: Callable[..., Griffin]) -> Griffin:
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
    saved = open_workspace(path, PACKAGE, f"of {PACKAGE}")
    config = configs.from_dict(GriffinConfig, saved.config, saved.where)
    model = placement.from_params(_builder(dataclasses.replace(config, **options)), saved.params)
    if saved.tokenizer is not None:
        attach_tokenizer(model, saved.tokenizer)
    return model


def _sentencepiece(folder: Path) -> Tokenizer | None:
    """The tokenizer.model of the releases, which stands first here where others lie beside it."""
    file = folder / TOKENIZER
    return load_tokenizer(file) if file.is_file() else None


def _save_huggingface(model: Griffin, path: Path, dtype: jax.typing.DTypeLike | None) -> None:
    tokenizer = model.tokenizer

    def config(stored: str) -> dict[str, Any]:
        fields = convert.config_to_huggingface(model.config, stored)
        if tokenizer is not None:
            fields |= {
                "bos_token_id": tokenizer.bos_id,
                "eos_token_id": tokenizer.eos_id,
                "pad_token_id": tokenizer.pad_id,
            }
        return fields

    def save_tokenizer(folder: Path) -> None:
        if tokenizer is not None:
            tokenizer.save(folder / TOKENIZER)

    rows = convert.huggingface_rows(model.config)
    save_huggingface(model, path, rows, config, dtype, save_tokenizer)
