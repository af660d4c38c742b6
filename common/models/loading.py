"""What loading a model takes, whatever its family: configuration files, placement, tokenizers."""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from common.checkpoint import Row, TensorReader, load_params, load_tensors, save_model_folder
from common.checkpoint.safetensors import parse_json_object
from common.data.tokenizers import Tokenizer
from common.errors import UserError
from common.sharding import DEFAULT_RULES, Rules, state_shardings

TOKENIZER = "tokenizer.model"  # of the workspace's folders, whatever its kind
MAX_JSON_BYTES = 10_000_000

M = TypeVar("M", bound=nnx.Module)
Build = Callable[[], M]


@dataclasses.dataclass(frozen=True)
class Source:
    """A foreign checkpoint, opened: all that the model is made from.

    Attributes:
      config: of the model.
      reader: its tensors.
      rows: key map from them to the model's parameters.
      ignore: shell patterns of tensors that are not needed.
      tokenizer: its tokenizer, or None.
      stop_tokens: ids that end a text.
    """

    config: Any
    reader: TensorReader
    rows: Sequence[Row]
    ignore: Sequence[str] = ()
    tokenizer: Tokenizer | None = None
    stop_tokens: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Placement:
    """How parameters are kept.

    Attributes:
      dtype: of all of them.
      mesh: on whose devices each parameter is cut up; None keeps it whole.
      rules: logical axis names to mesh axes.
    """

    dtype: jax.typing.DTypeLike = jnp.float32
    mesh: jax.sharding.Mesh | None = None
    rules: Rules = DEFAULT_RULES

    def from_tensors(
        self,
        build: Build[M],
        reader: TensorReader,
        rows: Sequence[Row],
        ignore: Sequence[str] = (),
    ) -> M:
        """The model that `build` describes, filled from a foreign checkpoint."""
        graphdef, state, abstract = self._abstract(build)
        params = load_tensors(reader, rows, abstract, ignore=ignore)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)

    def from_params(self, build: Build[M], path: Path, within: Sequence[str] = ()) -> M:
        """The model that `build` describes, filled from what `load_params` reads at `path`."""
        graphdef, state, abstract = self._abstract(build)
        nnx.replace_by_pure_dict(state, load_params(path, abstract, within))
        return nnx.merge(graphdef, state)

    def _abstract(self, build: Build[M]) -> tuple[nnx.GraphDef, nnx.State, dict[str, Any]]:
        """Graph, abstract state, and its pure dict with dtype and shardings; nothing allocated."""
        graphdef, state = nnx.split(nnx.eval_shape(build))
        abstract = nnx.to_pure_dict(state)
        if self.mesh is None:
            kept = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, self.dtype), abstract)
            return graphdef, state, kept
        placed = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, self.dtype, sharding=s),
            abstract,
            state_shardings(state, self.mesh, self.rules),
        )
        return graphdef, state, placed


def read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    """The object in a configuration file.

    Raises:
      UserError: the file is missing, too large, or holds no object.
    """
    if not path.is_file():
        if missing_ok:
            return {}
        raise UserError(f"{path} is missing")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{path} is too large to be a configuration")
    return parse_json_object(path, path.read_bytes(), "configuration")


def stop_tokens(folder: Path, *configs: Any) -> tuple[int, ...]:
    """The end-of-text tokens that `configs`, or the folder's generation_config.json, name."""
    found: set[int] = set()
    for data in (*configs, read_json(folder / "generation_config.json", missing_ok=True)):
        eos = data.get("eos_token_id") if isinstance(data, dict) else None
        found.update(e for e in (eos if isinstance(eos, list) else [eos]) if type(e) is int)
    return tuple(sorted(found))


def attach_tokenizer(model: Any, tokenizer: Tokenizer) -> None:
    """Gives a language model its tokenizer and the tokens that end a text with it.

    Raises:
      UserError: the tokenizer has more tokens than the model.
    """
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model {model.vocab_size}: "
            "they do not belong together"
        )
    model.tokenizer = tokenizer
    model.stop_tokens = tuple(sorted({*model.stop_tokens, *tokenizer.stop_tokens}))


def require_new(path: Path) -> None:
    """UserError unless `path` is free for a new folder: not there, or an empty one."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is not empty: nothing is written over; give another folder")


def save_workspace(
    model: Any,
    path: Path,
    package: str,
    config: dict[str, Any],
    dtype: jax.typing.DTypeLike | None = None,
) -> None:
    """Writes a model folder of the workspace, the model's tokenizer with it, if it has one.

    Args:
      model: a module; a language model has a `tokenizer`.
      path: the new folder (`require_new`).
      package: which knows how to build the model.
      config: JSON-able fields of the model's config.
      dtype: of the stored parameters; None keeps theirs.
    """
    params = nnx.to_pure_dict(nnx.state(model))
    if dtype is not None:
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = None
        if getattr(model, "tokenizer", None) is not None:
            tokenizer = Path(scratch) / TOKENIZER
            model.tokenizer.save(tokenizer)
        if path.exists():
            path.rmdir()
        save_model_folder(path, package, config, params, tokenizer)
