"""A model to keep or pass on: its package, its config, its parameters, its tokenizer.

model.json         {"format": "tenfold", "version": 1, "package": …, "config": {…}}
params/            the parameters, as the checkpoints of a run hold them
tokenizer.model    where the model reads text
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax

from common.checkpoint import array_folder as arrays
from common.errors import UserError
from common.sharding import barrier

_FORMAT = "tenfold"
_VERSION = 1


def save_params(path: Path, params: Any) -> None:
    """Writes a pure dict of arrays as a new folder; it appears complete or not at all.

    Raises:
      UserError: `path` exists.
    """
    path = Path(path).absolute()
    _refuse_existing(path)
    partial = _clear_partial(path)
    arrays.start_writing(partial, {"params": params}, {})()
    _appear(partial, path)


def save_model_folder(
    path: Path,
    package: str,
    config: dict[str, Any],
    params: Any,
    tokenizer_path: Path | None = None,
) -> None:
    """Writes a model folder; it appears complete or not at all.

    Args:
      path: the new folder.
      package: the paper's package, which knows how to build the model.
      config: JSON-able fields of the model's config.
      params: pure dict of arrays.
      tokenizer_path: a SentencePiece model to copy in.

    Raises:
      UserError: `path` exists, or there is no tokenizer at `tokenizer_path`.
    """
    path = Path(path).absolute()
    _refuse_existing(path)
    if tokenizer_path is not None and not Path(tokenizer_path).is_file():
        raise UserError(f"there is no tokenizer at {tokenizer_path}")
    partial = _clear_partial(path)
    arrays.start_writing(partial / "params", {"params": params}, {})()
    if jax.process_index() == 0:
        if tokenizer_path is not None:
            shutil.copyfile(tokenizer_path, partial / "tokenizer.model")
        head = {"format": _FORMAT, "version": _VERSION, "package": package, "config": config}
        (partial / "model.json").write_text(json.dumps(head, indent=2) + "\n", encoding="utf-8")
    _appear(partial, path)


def read_model_folder(path: Path) -> tuple[str, dict[str, Any], Path, Path | None]:
    """Returns package, config, the path for `load_params`, and the tokenizer's path if any.

    Raises:
      UserError: not a model folder, or `model.json` is damaged or of a newer format.
    """
    file = Path(path) / "model.json"
    try:
        head = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not a model folder: it has no model.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    if not isinstance(head, dict) or head.get("format") != _FORMAT:
        raise UserError(f"{file} is not a workspace model: its format is not '{_FORMAT}'")
    if head.get("version") != _VERSION:
        raise UserError(f"{file} has version {head.get('version')!r}; this reads {_VERSION}")
    package, config = head.get("package"), head.get("config")
    if not isinstance(package, str) or not package or not isinstance(config, dict):
        raise UserError(f"{file} must name a 'package' and hold a 'config' object")
    params = Path(path) / "params"
    if not params.is_dir():
        raise UserError(f"{path} has no params folder: the copy is not complete")
    tokenizer = Path(path) / "tokenizer.model"
    return package, config, params, tokenizer if tokenizer.is_file() else None


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists; name another folder or remove it")


def _clear_partial(path: Path) -> Path:
    partial = path.with_name(f"{path.name}.partial")
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f"{path.name}.partial*"):
            shutil.rmtree(leftover)
    barrier("partial_cleared")
    return partial


def _appear(partial: Path, path: Path) -> None:
    if jax.process_index() == 0:
        partial.rename(path)
    barrier("folder_complete")
