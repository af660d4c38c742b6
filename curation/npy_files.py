"""`.npy` files from anywhere, mapped into memory and believed in nothing."""

from pathlib import Path

import numpy as np

from common.errors import UserError


def map_npy(path: Path) -> np.ndarray:
    """Maps a `.npy` file of numbers or fixed strings into memory.

    Raises:
      UserError: it is missing, truncated, or something else.
    """
    try:
        with open(path, "rb") as stream:
            if stream.read(6) != b"\x93NUMPY":
                raise UserError(f"{path} is not a .npy file: write embeddings with numpy.save")
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError:
            array = np.load(path, allow_pickle=False)  # An array without elements does not map.
            if array.size:
                raise
            return array
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, SyntaxError, MemoryError, OverflowError) as error:
        size = path.stat().st_size
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path} is truncated or damaged ({size} bytes; {reason}): write it again"
        ) from error
