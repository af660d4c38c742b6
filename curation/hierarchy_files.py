"""A hierarchy as a folder of plain `.npy` files that map into memory.

    manifest.json        sizes, checksums and settings; written last, so that where it is all is
    level1/centroids.npy float32 [K, D]
    level1/indptr.npy    int64 [K + 1]
    level1/indices.npy   int32 or int64 [N]
    level1/distances.npy float32 [N], squared Euclidean
    level1/sizes.npy     int64 [K], for readers of other programs
    level2/…

`curation.clusters` says what the arrays mean. Files of arrays that are not known are left out.
"""

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.data.files import write_atomically
from common.errors import UserError
from curation.clusters import Hierarchy, Level
from curation.npy_files import map_npy
from curation.reference_files import is_reference, load_reference

MANIFEST = "manifest.json"
_FORMAT = "tenfold-hierarchy-1"
_UNFINISHED = ".unfinished"
_ARRAYS = ("centroids", "indptr", "indices", "distances")
_OPTIONAL = ("centroids", "distances")
_CHUNK_BYTES = 1 << 26


def save(hierarchy: Hierarchy, folder: str | os.PathLike[str]) -> None:
    """Writes a hierarchy into a folder, which may hold other files but no hierarchy.

    Killed at any moment or out of disk space, it leaves no manifest; saving again then works.

    Raises:
      UserError: there is a hierarchy (or something else of its name) already, or the folder cannot
        be written.
    """
    folder = Path(folder)
    try:
        _save(hierarchy, folder)
    except OSError as error:
        _clear_unfinished(folder)
        raise UserError(
            f"cannot write the clusters to {folder}: {error.strerror or error}"
        ) from error


def load(folder: str | os.PathLike[str], *, check: bool = True) -> Hierarchy:
    """Maps a folder by `save` into memory, or reads a result of the paper's own code.

    Args:
      folder: the one that holds `manifest.json`, or `level1/sorted_clusters.npy`.
      check: read every file through and compare it with its checksum. Without it only sizes,
        shapes and dtypes are compared.

    Raises:
      UserError: the folder holds no whole hierarchy, or its files are not what was written.
    """
    folder = Path(folder)
    if not is_hierarchy(folder) and is_reference(folder):
        return load_reference(folder)
    manifest = _read_manifest(folder)
    try:
        files: Mapping[str, Any] = manifest["files"]
        numbers = range(1, int(manifest["levels"]) + 1)
        for name, (size, checksum) in files.items():
            _compare(folder, name, size, checksum if check else None)
        levels = [
            Level(**{name: _map(folder, f"level{n}/{name}.npy", files) for name in _ARRAYS})
            for n in numbers
        ]
        settings = dict(manifest["settings"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST} is not a manifest of clusters") from error
    if check:
        for number, level in zip(numbers, levels):
            level.check(f"{folder}: level {number}")
    return Hierarchy(levels, settings)


def is_hierarchy(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder looks like one by `save`, damaged or not."""
    return (Path(folder) / MANIFEST).is_file()


def write_array(path: Path, array: np.ndarray) -> tuple[int, int]:
    """Writes a `.npy` file in parts and syncs it; returns its bytes and their CRC-32."""
    array = np.asanyarray(array)
    rows = max(1, _CHUNK_BYTES // max(1, array.itemsize * int(np.prod(array.shape[1:]))))
    with open(path, "wb") as stream:
        header = {
            "descr": np.lib.format.dtype_to_descr(array.dtype),
            "fortran_order": False,
            "shape": array.shape,
        }
        np.lib.format.write_array_header_1_0(stream, header)
        for start in range(0, len(array), rows):
            stream.write(np.ascontiguousarray(array[start : start + rows]).data)
        stream.flush()
        os.fsync(stream.fileno())
    return path.stat().st_size, _checksum(path)


def _save(hierarchy: Hierarchy, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if is_hierarchy(folder):
        raise UserError(f"{folder} holds clusters already: give another folder")
    _clear_unfinished(folder)
    names = [f"level{number}" for number in range(1, len(hierarchy.levels) + 1)]
    for name in names:
        if (folder / name).exists():
            raise UserError(f"{folder / name} is there, but no {MANIFEST}: give another folder")
    unfinished = folder / _UNFINISHED
    unfinished.mkdir()
    files: dict[str, tuple[int, int]] = {}
    for name, level in zip(names, hierarchy.levels):
        (unfinished / name).mkdir()
        arrays = {array: getattr(level, array) for array in _ARRAYS} | {"sizes": level.sizes}
        for array, values in arrays.items():
            if values is not None:
                file = f"{name}/{array}.npy"
                files[file] = write_array(unfinished / file, values)
    manifest = {
        "format": _FORMAT,
        "points": hierarchy.num_points,
        "levels": len(hierarchy.levels),
        "clusters": hierarchy.num_clusters,
        "settings": dict(hierarchy.settings),
        "files": files,
    }
    text = json.dumps(manifest, indent=1) + "\n"
    for name in names:
        os.rename(unfinished / name, folder / name)
    write_atomically(folder / MANIFEST, text.encode())
    unfinished.rmdir()


def _clear_unfinished(folder: Path) -> None:
    """Removes what a process that was killed or failed here had written and moved into place."""
    if not (folder / _UNFINISHED).exists() or is_hierarchy(folder):
        return
    for level in folder.glob("level[0-9]*"):
        shutil.rmtree(level, ignore_errors=True)
    shutil.rmtree(folder / _UNFINISHED, ignore_errors=True)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no clusters ({MANIFEST} is missing): make them with "
            "`python -m curation.cluster`, or run it again if it was interrupted"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise UserError(f"{folder / MANIFEST} is not a manifest of clusters of this version")
    return manifest


def _compare(folder: Path, name: str, size: Any, checksum: Any) -> None:
    """Compares a file with the manifest; a name that leads out of the folder is refused."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder / MANIFEST} names a file outside of its folder: '{name}'")
    try:
        whole = path.stat().st_size == size and (checksum is None or _checksum(path) == checksum)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if not whole:
        raise UserError(f"{path} is damaged: it is not what {MANIFEST} says was written")


def _map(folder: Path, name: str, files: Mapping[str, Any]) -> np.ndarray | None:
    if name not in files:
        if Path(name).stem in _OPTIONAL:
            return None
        raise UserError(f"{folder / MANIFEST} does not name {name}")
    # A plain array over the same memory: indexing the memmap class is several times slower.
    return np.asarray(map_npy(folder / name))


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as stream:
        while part := stream.read(_CHUNK_BYTES):
            value = zlib.crc32(part, value)
    return value
