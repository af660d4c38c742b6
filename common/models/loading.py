"""What loading and saving a model takes, whatever its family.

Which kind of checkpoint lies somewhere, configuration files, placement, tokenizers; and the folders
that are written.
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from common.checkpoint import (
    Row,
    TensorReader,
    export_tensors,
    load_params,
    load_tensors,
    read_model_folder,
    save_model_folder,
    write_safetensors,
)
from common.checkpoint.safetensors import parse_json_object
from common.data.tokenizers import Tokenizer, folder_tokenizer, load_tokenizer
from common.errors import UserError
from common.sharding import DEFAULT_RULES, Rules, barrier, state_shardings

TOKENIZER = "tokenizer.model"  # of the workspace's folders, whatever its kind
MAX_JSON_BYTES = 10_000_000

M = TypeVar("M", bound=nnx.Module)
Build = Callable[[], M]
Kind = Literal["workspace", "huggingface", "other"]


def recognise(path: Path) -> Kind:
    """Returns what lies at `path`.

    "workspace": a model folder, or the workdir of a training run (`open_workspace`).
    "huggingface": a folder with a config.json.
    "other": a file, or a folder of tensors alone: a .gguf file, or a release of some other form.

    Raises:
      UserError: nothing is there.
    """
    if not path.exists():
        raise UserError(f"no checkpoint at {path}: check the path")
    if (path / "model.json").is_file() or (path / "checkpoints").is_dir():
        return "workspace"
    return "huggingface" if (path / "config.json").is_file() else "other"


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A model that this workspace wrote.

    Attributes:
      config: JSON fields of its config.
      where: the file that they come from.
      params: where `Placement.from_params` reads its parameters.
      tokenizer: its tokenizer, or None.
    """

    config: dict[str, Any]
    where: str
    params: Path
    tokenizer: Tokenizer | None


def open_workspace(path: Path, package: str, wanted: str) -> SavedModel:
    """Opens a model folder, or a run's workdir with its checkpoints.

    Args:
      path: the folder.
      package: that must know how to build the model.
      wanted: what a model of that package is, in the words that refuse another.

    Raises:
      UserError: damaged, or a model of another package.
    """
    config: Any
    file: Path | None
    if (path / "model.json").is_file():
        where = str(path / "model.json")
        found, config, params, file = read_model_folder(path)
        if found != package:
            raise UserError(f"{where} describes a model of '{found}', not {wanted}")
    else:
        where = str(path / "config.json")
        config = read_json(path / "config.json").get("model")
        params, file = path / "checkpoints", path / TOKENIZER
        if not isinstance(config, dict):
            raise UserError(f"{where} has no 'model': not the run of a model")
    tokenizer = None if file is None or not file.is_file() else load_tokenizer(file)
    return SavedModel(config, where, params, tokenizer)


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


def check_layers(where: Path, layers: int, reader: TensorReader) -> None:
    """UserError if a configuration states more layers than its checkpoint has tensors.

    Building so many of them would take very long, to be refused in the end.
    """
    if layers > len(reader.keys()):
        raise UserError(
            f"{where} states {layers} layers, but the checkpoint has only {len(reader.keys())} "
            "tensors"
        )


def tokenizer_beside(
    path: Path, find: Callable[[Path], Tokenizer | None] = folder_tokenizer
) -> Tokenizer | None:
    """What `find` finds in the folder of a foreign checkpoint, or else in the one above."""
    folder = path if path.is_dir() else path.parent
    found = (find(place) for place in (folder, folder.parent))
    return next((tokenizer for tokenizer in found if tokenizer is not None), None)


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


def write_as(path: Path, format: str, writers: Mapping[str, Callable[[], None]]) -> None:
    """Calls the writer of `format`, if `path` is free for its folder.

    Raises:
      UserError: the folder is not empty, or there is no such format.
    """
    require_new(path)
    if format not in writers:
        known = " or ".join(f"'{name}'" for name in writers)
        raise UserError(f"unknown format '{format}': choose {known}")
    writers[format]()


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


def save_huggingface(
    model: Any,
    path: Path,
    rows: Sequence[Row],
    config: Callable[[str], dict[str, Any]],
    dtype: jax.typing.DTypeLike | None = None,
    save_tokenizer: Callable[[Path], None] | None = None,
) -> None:
    """Writes a Hugging Face folder; one process of several does.

    Args:
      model: the model.
      path: the new folder (`require_new`).
      rows: key map from the folder's tensors to the model's parameters.
      config: makes config.json, given the name of the stored dtype.
      dtype: of the stored parameters; None keeps theirs.
      save_tokenizer: writes the tokenizer to a folder; None: there is none.

    Raises:
      UserError: the format cannot express the model or its tokenizer.
    """
    params = nnx.to_pure_dict(nnx.state(model))
    kept = jnp.dtype(dtype) if dtype is not None else jax.tree.leaves(params)[0].dtype
    text = json.dumps(config(kept.name), indent=2) + "\n"
    primary = jax.process_index() == 0  # The others take part in gathering what lies on them.
    if primary:
        path.mkdir(parents=True, exist_ok=True)
        if save_tokenizer is not None:
            save_tokenizer(path)  # First: not every tokenizer can be told to others.
    write_safetensors(path, export_tensors(params, rows, dtype), write=primary)
    if primary:
        (path / "config.json").write_text(text, encoding="utf-8")
    barrier("huggingface_saved")
