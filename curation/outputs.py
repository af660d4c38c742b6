"""The folder that a command writes: arrays are whole or not there, and nothing is written over."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.data.files import write_atomically
from common.errors import UserError
from curation.hierarchy_files import write_array


@contextlib.contextmanager
def output_folder(path: str, *names: str) -> Iterator[Path]:
    """Makes the output folder, and takes it away again if a mistake leaves it empty.

    Raises:
      UserError: it cannot be made, or one of `names` is in it already.
    """
    folder = Path(path).expanduser()
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot use {folder}: {error.strerror or error}") from error
    for name in names:
        if (folder / name).exists():
            raise UserError(f"--output: {folder / name} exists; nothing is written over")
    try:
        yield folder
    except UserError:
        with contextlib.suppress(OSError):  # Something is in it, or another process was first.
            for each in made:
                each.rmdir()
        raise


def write_outputs(
    folder: Path, arrays: Mapping[str, np.ndarray], name: str, settings: Mapping[str, Any]
) -> None:
    """Writes arrays as `.npy` files, and last how they were made as a JSON file.

    Raises:
      UserError: the folder cannot be written; what is not whole is removed.
    """
    unfinished = {folder / f".{file}.unfinished": folder / file for file in arrays}
    try:
        for path, array in zip(unfinished, arrays.values()):
            write_array(path, array)
        for path, target in unfinished.items():
            os.replace(path, target)
        write_atomically(folder / name, (json.dumps(settings, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    finally:
        for path in unfinished:
            path.unlink(missing_ok=True)
