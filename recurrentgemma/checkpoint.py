"""Loading RecurrentGemma from any format it comes in, and saving it again."""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from common.checkpoint import (
    Row,
    TensorReader,
    export_tensors,
    load_tensors,
    open_checkpoint,
    subtree,
    write_safetensors,
)
from common.checkpoint.model_folder import read_model_folder, save_model_folder
from common.checkpoint.safetensors import parse_json_object
from common.checkpoint.store import load_params
from common.data.tokenizers import Tokenizer, load_tokenizer
from common.errors import UserError
from common.launch import config as configs
from common.sharding import DEFAULT_RULES, Rules, state_shardings
from recurrentgemma import convert
from recurrentgemma.model import Griffin, GriffinConfig

PACKAGE = "recurrentgemma"
TOKENIZER = "tokenizer.model"
DEFAULT_EOS = 1
MAX_JSON_BYTES = 10_000_000


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
    if param_dtype is None:
        param_dtype = jnp.dtype(dtype)
    build = functools.partial(_build, options=options, mesh=mesh, rules=rules, dtype=param_dtype)
    if (path / "model.json").is_file() or (path / "checkpoints").is_dir():
        model = _load_workspace(path, build)
    elif (path / "config.json").is_file():
        data = _read_json(path / "config.json")
        config = convert.config_from_huggingface(data, str(path / "config.json"))
        rows = convert.huggingface_rows
        model = build(config, open_checkpoint(path), rows, ignore=convert.HUGGINGFACE_TIED)
        model.stop_tokens = _stop_tokens(path, data)
    else:
        model = _load_release(path, build)
    folder = path if path.is_dir() else path.parent
    for place in (folder / TOKENIZER, folder.parent / TOKENIZER):
        if model.tokenizer is None and place.is_file() and not (folder / "model.json").is_file():
            _attach_tokenizer(model, load_tokenizer(place))
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
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is not empty: nothing is written over; give another folder")
    params = nnx.to_pure_dict(nnx.state(model))
    if format == "workspace":
        if dtype is not None:
            params = jax.tree.map(lambda x: x.astype(dtype), params)
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer = None
            if model.tokenizer is not None:
                tokenizer = Path(scratch) / TOKENIZER
                model.tokenizer.save(tokenizer)
            if path.exists():
                path.rmdir()
            save_model_folder(path, PACKAGE, configs.to_dict(model.config), params, tokenizer)
    elif format == "huggingface":
        _save_huggingface(model, path, params, dtype)
    else:
        raise UserError(f"unknown format '{format}': choose 'workspace' or 'huggingface'")


def _build(
    config: GriffinConfig,
    reader: TensorReader,
    rows: Any,
    *,
    options: dict[str, Any],
    mesh: jax.sharding.Mesh | None,
    rules: Rules,
    dtype: jax.typing.DTypeLike,
    ignore: tuple[str, ...] = (),
) -> Griffin:
    """A model of `config` filled from `reader` by the key map `rows(config)`."""
    config = dataclasses.replace(config, **options)
    graphdef, state, abstract = _abstract(config, mesh, rules)
    key_map: list[Row] = rows(config)
    return _fill(graphdef, state, load_tensors(reader, key_map, abstract, dtype, ignore))


def _abstract(config: GriffinConfig, mesh: jax.sharding.Mesh | None, rules: Rules):
    """Graph, abstract state, and the abstract pure dict with shardings, nothing allocated."""
    model = nnx.eval_shape(lambda: Griffin(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    abstract = nnx.to_pure_dict(state)
    if mesh is None:
        return graphdef, state, abstract
    return (
        graphdef,
        state,
        jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            abstract,
            state_shardings(state, mesh, rules),
        ),
    )


def _fill(graphdef: nnx.GraphDef, state: Any, params: dict[str, Any]) -> Griffin:
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


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


def _load_workspace(path: Path, build) -> Griffin:
    """A model folder, or a run's workdir with its checkpoints."""
    options, mesh, rules = (build.keywords[name] for name in ("options", "mesh", "rules"))
    if (path / "model.json").is_file():
        package, data, params_path, tokenizer_path = read_model_folder(path)
        where = str(path / "model.json")
    else:
        package, data = PACKAGE, _read_json(path / "config.json").get("model")
        params_path, tokenizer_path = path / "checkpoints", path / TOKENIZER
        where = str(path / "config.json")
    if package != PACKAGE or not isinstance(data, dict):
        raise UserError(f"{where} describes a model of '{package}', not of {PACKAGE}")
    config = configs.from_dict(GriffinConfig, data, where)
    config = dataclasses.replace(config, **options)
    graphdef, state, abstract = _abstract(config, mesh, rules)
    params = load_params(params_path, abstract)
    dtype = build.keywords["dtype"]
    model = _fill(graphdef, state, jax.tree.map(lambda x: x.astype(dtype), params))
    if tokenizer_path is not None and Path(tokenizer_path).is_file():
        _attach_tokenizer(model, load_tokenizer(tokenizer_path))
    return model


def _save_huggingface(model: Griffin, path: Path, params: dict[str, Any], dtype: Any) -> None:
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


def _attach_tokenizer(model: Griffin, tokenizer: Tokenizer) -> None:
    """Gives the model its tokenizer and the tokens that end a text with it."""
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model {model.vocab_size}: "
            "they do not belong together"
        )
    model.tokenizer = tokenizer
    model.stop_tokens = tuple(sorted({*model.stop_tokens, *tokenizer.stop_tokens}))


def _stop_tokens(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """The end-of-text tokens that a Hugging Face folder names."""
    found: set[int] = set()
    for data in (config, _read_json(folder / "generation_config.json", missing_ok=True)):
        eos = data.get("eos_token_id")
        found.update(e for e in (eos if isinstance(eos, list) else [eos]) if isinstance(e, int))
    return tuple(sorted(found)) or (DEFAULT_EOS,)


def _read_json(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    if missing_ok and not path.is_file():
        return {}
    if not path.is_file():
        raise UserError(f"{path} is missing")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{path} is too large to be a configuration")
    return parse_json_object(path, path.read_bytes(), "configuration")
