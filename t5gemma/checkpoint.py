"""Loading T5Gemma from any format it comes in, and saving it again."""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
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
from t5gemma import convert
from t5gemma.config import EncoderWindow, T5GemmaConfig
from t5gemma.model import T5Gemma

PACKAGE = "t5gemma"
TOKENIZER = "tokenizer.model"
DEFAULT_EOS = 1
MAX_JSON_BYTES = 10_000_000


@dataclasses.dataclass(frozen=True)
class _Target:
    """What a model is to be loaded as."""

    dtype: Literal["float32", "bfloat16"]
    param_dtype: Any
    encoder_window: EncoderWindow | None
    mesh: jax.sharding.Mesh | None
    rules: Rules

    def adjusted(self, config: T5GemmaConfig) -> T5GemmaConfig:
        """`config` with what the caller asked for."""
        if self.encoder_window is not None:
            config = dataclasses.replace(config, encoder_window=self.encoder_window)
        return config.with_stacks(dtype=self.dtype)

    def abstract(self, config: T5GemmaConfig) -> tuple[nnx.GraphDef, nnx.State, dict[str, Any]]:
        """Graph, abstract state, and the abstract pure dict with shardings, nothing allocated."""
        model = nnx.eval_shape(lambda: T5Gemma(config, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(model)
        abstract = nnx.to_pure_dict(state)
        if self.mesh is None:
            return graphdef, state, abstract
        placed = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            abstract,
            state_shardings(state, self.mesh, self.rules),
        )
        return graphdef, state, placed


def load(
    path: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    param_dtype: jax.typing.DTypeLike | None = None,
    encoder_window: EncoderWindow | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
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

    Returns:
      The model; `tokenizer` and `stop_tokens` are set if a tokenizer lies beside it.

    Raises:
      UserError: nothing there, damaged, or another model's checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no checkpoint at {path}: check the path")
    kept = jnp.dtype(dtype if param_dtype is None else param_dtype)
    target = _Target(dtype, kept, encoder_window, mesh, rules)
    if (path / "model.json").is_file() or (path / "checkpoints").is_dir():
        return _load_workspace(path, target)
    if (path / "config.json").is_file():
        model = _load_huggingface(path, target)
    else:
        model = _load_flax(path, target)
    folder = path if path.is_dir() else path.parent
    for place in (folder / TOKENIZER, folder.parent / TOKENIZER):
        if model.tokenizer is None and place.is_file():
            _attach_tokenizer(model, load_tokenizer(place))
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


def _load_huggingface(path: Path, target: _Target) -> T5Gemma:
    where = path / "config.json"
    data = _read_json(where)
    config = convert.config_from_huggingface(data, str(where), target.encoder_window)
    reader = open_checkpoint(path)
    ignored: tuple[str, ...] = ()
    if config.decoder.tied:
        convert.check_tied_head(reader)
        ignored = (convert.HEAD,)
    model = _built(config, reader, convert.huggingface_rows(config), target, ignored)
    model.stop_tokens = _stop_tokens(path, data)
    return model


def _load_flax(path: Path, target: _Target) -> T5Gemma:
    """The published flax tree `{"params": {"encoder": …, "decoder": …}}`."""
    reader = subtree(open_checkpoint(path), "params/params/", "params/")
    config = convert.config_from_shapes(reader)
    model = _built(config, reader, convert.flax_rows(config, reader), target)
    model.stop_tokens = (DEFAULT_EOS,)
    return model


def _load_workspace(path: Path, target: _Target) -> T5Gemma:
    """A model folder, or a run's workdir with its checkpoints."""
    if (path / "model.json").is_file():
        package, data, params_path, tokenizer_path = read_model_folder(path)
        where = str(path / "model.json")
    else:
        package, data = PACKAGE, _read_json(path / "config.json").get("model")
        params_path, tokenizer_path = path / "checkpoints", path / TOKENIZER
        where = str(path / "config.json")
    if package != PACKAGE or not isinstance(data, dict):
        raise UserError(f"{where} describes a model of '{package}', not of {PACKAGE}")
    config = target.adjusted(configs.from_dict(T5GemmaConfig, data, where))
    graphdef, state, abstract = target.abstract(config)
    params = load_params(params_path, abstract)
    model = _filled(graphdef, state, jax.tree.map(lambda x: x.astype(target.param_dtype), params))
    model.stop_tokens = (DEFAULT_EOS,)
    if tokenizer_path is not None and Path(tokenizer_path).is_file():
        _attach_tokenizer(model, load_tokenizer(tokenizer_path))
    return model


def _built(
    config: T5GemmaConfig,
    reader: TensorReader,
    rows: Sequence[Row],
    target: _Target,
    ignore: Sequence[str] = (),
) -> T5Gemma:
    """A model of `config` filled from `reader` by the key map `rows`."""
    graphdef, state, abstract = target.abstract(target.adjusted(config))
    return _filled(
        graphdef, state, load_tensors(reader, rows, abstract, target.param_dtype, ignore)
    )


def _filled(graphdef: nnx.GraphDef, state: Any, params: dict[str, Any]) -> T5Gemma:
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def _save_huggingface(model: T5Gemma, path: Path, params: dict[str, Any], dtype: Any) -> None:
    kept = jnp.dtype(dtype) if dtype is not None else jax.tree.leaves(params)[0].dtype
    config = convert.config_to_huggingface(model.config, kept.name)
    if model.stop_tokens:
        stops = sorted(model.stop_tokens)
        config["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    tensors = export_tensors(params, convert.huggingface_rows(model.config), dtype)
    write_safetensors(path, tensors)
    if model.tokenizer is not None:
        model.tokenizer.save(path / TOKENIZER)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _attach_tokenizer(model: T5Gemma, tokenizer: Tokenizer) -> None:
    """Gives the model its tokenizer and the tokens that end a text with it."""
    for side, config in (("encoder", model.config.encoder), ("decoder", model.config.decoder)):
        if tokenizer.vocab_size > config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens but the {side} "
                f"{config.vocab_size}: they do not belong together"
            )
    model.tokenizer = tokenizer
    # Instruction-tuned models end their turn with a token of its own.
    turn = tokenizer.encode("<end_of_turn>")
    ends = (tokenizer.eos_id, *turn) if len(turn) == 1 else (tokenizer.eos_id,)
    model.stop_tokens = tuple(sorted({*model.stop_tokens, *ends}))


def _stop_tokens(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """The end-of-text tokens that a Hugging Face folder names."""
    found: set[int] = set()
    generation = _read_json(folder / "generation_config.json", missing_ok=True)
    for data in (config, config.get("decoder"), generation):
        eos = data.get("eos_token_id") if isinstance(data, dict) else None
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
