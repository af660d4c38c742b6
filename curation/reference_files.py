"""The result folder and the configuration of the paper's own code (ssl-data-curation).

    config.yaml                   lists with an entry for each level
    level1/centroids.npy          [K, D] float32 or float64
    level1/sorted_clusters.npy    a pickled array of K arrays of members, the nearest first
    level1/step3/…                the same for every clustering of the level; those above link here
    level2/…

The pickles are read by an unpickler that knows NumPy's arrays of numbers and runs nothing.
"""

import dataclasses
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from common.errors import UserError
from curation.clusters import Hierarchy, Level
from curation.npy_files import map_npy

CLUSTERS = "sorted_clusters.npy"
CENTROIDS = "centroids.npy"
_UNFINISHED = ".unfinished-reference"


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    """What the paper's `config.yaml` says of the clustering; one entry for each level.

    Attributes:
      clusters: k; with splits, of the first of two steps.
      iterations: rounds of Lloyd's algorithm, for all levels.
      splits: into how many each cluster is divided in a second step; 1 for no such step.
      resampling_steps: clusterings of a level, the first one on all points counted.
      sample_sizes: members of each cluster that a further clustering takes.
      strategy: "c" for the members closest to their centroid, "r" for random ones.
      subset: a file of row numbers to which the clustering was confined, or None.
      dtype: of the data on the devices.
    """

    clusters: tuple[int, ...]
    iterations: int
    splits: tuple[int, ...]
    resampling_steps: tuple[int, ...]
    sample_sizes: tuple[int, ...]
    strategy: str
    subset: str | None
    dtype: str


def is_reference(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder looks like a result of the paper's code."""
    return _find(Path(folder) / "level1", CLUSTERS) is not None


def load_reference(folder: str | os.PathLike[str]) -> Hierarchy:
    """Reads all levels of a result of the paper's code; distances are not known.

    Raises:
      UserError: a level is missing or damaged, or asks for more than arrays of numbers.
    """
    folder = Path(folder)
    levels: list[Level] = []
    if not is_reference(folder):
        raise UserError(f"{folder} is no result of ssl-data-curation: it has no level1/{CLUSTERS}")
    while (level := folder / f"level{len(levels) + 1}").exists():
        levels.append(_read_level(level))
    return Hierarchy(levels, {"source": "ssl-data-curation"})


def save_reference(hierarchy: Hierarchy, folder: str | os.PathLike[str]) -> None:
    """Writes the levels as the paper's code reads them.

    Raises:
      UserError: there is a level already, or the folder cannot be written.
    """
    folder = Path(folder)
    names = [f"level{number}" for number in range(1, len(hierarchy.levels) + 1)]
    taken = [name for name in names if (folder / name).exists()]
    if taken:
        raise UserError(f"{folder / taken[0]} is there already: give another folder")
    unfinished = folder / _UNFINISHED
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        for name, level in zip(names, hierarchy.levels):
            (unfinished / name).mkdir(parents=True)
            np.save(unfinished / name / CLUSTERS, _object_array(level), allow_pickle=True)
            if level.centroids is not None:
                np.save(unfinished / name / CENTROIDS, level.centroids)
        # Their reader counts the levels up to the first that is missing: that of level 1 is last.
        for name in reversed(names):
            os.rename(unfinished / name, folder / name)
        unfinished.rmdir()
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


def read_reference_config(path: str | os.PathLike[str]) -> ReferenceConfig:
    """Reads a `config.yaml`; keys about machines are of no consequence and passed over.

    Raises:
      UserError: the file is no such configuration; says which key.
    """
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} cannot be read as YAML: {reason}") from error
    if not isinstance(data, Mapping):
        raise UserError(f"{path} is no configuration: it holds no keys")
    levels = _number(path, data, "n_levels", None)
    strategy, dtype = data.get("sampling_strategy", "c"), data.get("dtype", "float64")
    subset = data.get("subset_indices_path")
    if strategy not in ("c", "r"):
        raise UserError(f"{path}: sampling_strategy must be c or r, not {strategy!r}")
    if dtype not in ("float16", "float32", "float64"):
        raise UserError(f"{path}: dtype must be float16, float32 or float64, not {dtype!r}")
    if not isinstance(subset, str | None):
        raise UserError(f"{path}: subset_indices_path must be a path or null")
    return ReferenceConfig(
        clusters=_numbers(path, data, "n_clusters", levels, None),
        iterations=_number(path, data, "n_iters", 50),
        splits=_numbers(path, data, "n_splits", levels, 1),
        resampling_steps=_numbers(path, data, "n_resampling_steps", levels, 1),
        sample_sizes=_numbers(path, data, "sample_size", levels, 1),
        strategy=strategy,
        subset=subset,
        dtype=dtype,
    )


def _read_level(folder: Path) -> Level:
    file = _find(folder, CLUSTERS)
    if file is None:
        raise UserError(f"{folder} has no {CLUSTERS}: the clustering did not end")
    clusters = _read_clusters(file)
    indptr = np.zeros(len(clusters) + 1, np.int64)
    np.cumsum([len(members) for members in clusters], out=indptr[1:])
    indices = np.concatenate([np.zeros(0, np.int64), *clusters])
    centroids = None
    place = _find(folder, CENTROIDS)
    if place is not None:
        centroids = np.asarray(map_npy(place))
        if centroids.dtype.kind != "f":
            raise UserError(f"{place} holds {centroids.dtype}: centroids are floating-point")
        centroids = centroids.astype(np.float32)
    level = Level(centroids, indptr, indices)
    level.check(str(file))
    return level


def _find(folder: Path, name: str) -> Path | None:
    """The file of a level, or that of its last step where a link was lost on the way here."""
    if (folder / name).is_file():
        return folder / name
    steps = [
        (int(step.name[4:]), step / name)
        for step in folder.glob("step*")
        if step.name[4:].isdecimal() and (step / name).is_file()
    ]
    return max(steps)[1] if steps else None


def _read_clusters(file: Path) -> list[np.ndarray]:
    """The members of each cluster: int64 arrays."""
    try:
        with open(file, "rb") as stream:
            version = np.lib.format.read_magic(stream)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read(stream)
            if dtype != np.dtype(object):
                stream.seek(0)  # Clusters of one size, stored as a plain table.
                table = np.load(stream, allow_pickle=False)
                return [_members(row) for row in np.atleast_2d(table)]
            value = _ArrayUnpickler(stream).load()
        if not isinstance(value, _Array):
            raise ValueError("it holds no array")
        return _all_members(value.rows(shape), file.stat().st_size)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # A hostile pickle can make the unpickler raise nearly anything.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UserError(f"{file} is damaged ({reason})") from error


def _all_members(items: list[Any], most: int) -> list[np.ndarray]:
    """The members of each cluster, unless a pickle tells of one list over and over."""
    clusters: list[np.ndarray] = []
    for item in items:
        clusters.append(_members(_elements(item)))
        most -= len(clusters[-1])
        if most < 0:
            raise ValueError("it holds more members than bytes")
    return clusters


def _elements(item: Any) -> np.ndarray:
    if isinstance(item, _Array):
        return item.numbers()
    if isinstance(item, list) and all(type(number) is int for number in item):
        return np.array(item, np.int64)
    raise ValueError("a cluster is no array of whole numbers")


def _members(array: np.ndarray) -> np.ndarray:
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise ValueError("a cluster is no array of whole numbers")  # Empty ones come as floats.
    return array.astype(np.int64)


class _Known:
    """Stands for a NumPy name in the pickle; has no attribute that a pickle could set."""

    __slots__ = ("_build",)
    _build: Callable[..., Any]

    def __init__(self, build: Callable[..., Any]) -> None:
        object.__setattr__(self, "_build", build)

    def __call__(self, *arguments: Any) -> Any:
        return self._build(*arguments)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise pickle.UnpicklingError("a NumPy name is changed")

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("a NumPy name is changed")


class _DType:
    """Stands for a dtype: kind and width, then the byte order as a state."""

    __slots__ = ("_code", "_order")

    def __init__(self, code: Any, *_: Any) -> None:
        self._code, self._order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self._order = state[1]

    def resolve(self) -> np.dtype:
        if not (isinstance(self._code, str) and self._code[:1] in tuple("iufO")):
            raise ValueError(f"an array of {self._code!r}")
        return np.dtype(self._code).newbyteorder(">" if self._order == ">" else "<")


class _Array:
    """Stands for an array, with what the pickle claims of it: not yet checked."""

    __slots__ = ("_data", "_dtype", "_shape")

    def __init__(self) -> None:
        self._shape, self._dtype, self._data = (0,), _DType("i8"), b""

    def __setstate__(self, state: Any) -> None:
        _, self._shape, self._dtype, _, self._data = state

    def numbers(self) -> np.ndarray:
        """The array, of numbers or of Python's integers."""
        dtype = self._dtype.resolve()
        if dtype.hasobject:
            values = [v.item() if isinstance(v, np.ndarray) else v for v in list(self._data)]
            if not all(type(value) is int for value in values):
                raise ValueError("a cluster is no array of whole numbers")
            return np.array(values, np.int64)
        return np.frombuffer(self._data, dtype).reshape(self._shape)

    def rows(self, shape: tuple[int, ...]) -> list[Any]:
        """The elements of an array of objects, or the rows of one of two axes."""
        if not (self._dtype.resolve().hasobject and isinstance(self._data, list)):
            raise ValueError("it holds no array of clusters")
        if tuple(self._shape) != tuple(shape) or len(shape) not in (1, 2):
            raise ValueError("it holds no array of clusters")
        if len(shape) == 1:
            return self._data
        width = shape[1]
        numbers = [v.item() if isinstance(v, np.ndarray) else v for v in self._data]
        return [numbers[row * width : (row + 1) * width] for row in range(shape[0])]


def _scalar(dtype: Any, data: Any) -> np.ndarray:
    return np.frombuffer(data, dtype.resolve(), count=1).reshape(())


class _ArrayUnpickler(pickle.Unpickler):
    """Knows NumPy arrays of numbers and of arrays, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct":
                return _Known(lambda *_: _Array())
            case "numpy.core.multiarray" | "numpy._core.multiarray", "scalar":
                return _Known(_scalar)
            case "numpy", "dtype":
                return _Known(_DType)
            case "numpy", "ndarray":
                return _Known(_no_call)
        raise UserError(f"it wants to run {module}.{name}"[:120] + ": refused")


def _no_call(*_: Any) -> NoReturn:
    raise pickle.UnpicklingError("an array type is called")


def _object_array(level: Level) -> np.ndarray:
    clusters = np.empty(level.num_clusters, object)
    for k in range(level.num_clusters):
        clusters[k] = np.array(level.members(k), np.int64)
    return clusters


def _number(path: Any, data: Mapping[str, Any], key: str, default: int | None) -> int:
    value = data.get(key, default)
    if type(value) is not int or value < 1:
        raise UserError(f"{path}: {key} must be a whole number from 1, not {value!r}")
    return value


def _numbers(
    path: Any, data: Mapping[str, Any], key: str, levels: int, default: int | None
) -> tuple[int, ...]:
    value = data.get(key)
    if value is None and default is not None:
        return (default,) * levels
    if not isinstance(value, list) or any(type(v) is not int or v < 1 for v in value):
        raise UserError(f"{path}: {key} must be a list of whole numbers from 1, not {value!r}")
    if len(value) != levels:
        raise UserError(f"{path}: {key} has {len(value)} entries for {levels} levels")
    return tuple(value)
