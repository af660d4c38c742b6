"""What the commands read besides clusters: embeddings, row numbers, labels, and what rows show."""

import os
from pathlib import Path

import numpy as np

from common.data.corpus import CorpusConfig, open_corpus
from common.data.embedding_folder import FEATURES, INDEX, read_index
from common.data.image_corpus import ImageConfig, open_images
from common.data.sources import DamagedRecord, DocumentSource
from common.errors import UserError
from curation.npy_files import map_npy
from curation.page import Show, image_html, text_html
from curation.parquet import is_parquet, parquet_to_npy

_CORPORA = {".jsonl": "jsonl", ".parquet": "parquet", ".array_record": "array_record"}


def open_rows(path: str, folder: Path, column: str = "embedding") -> np.ndarray:
    """Maps embeddings `[N, D]` into memory.

    Args:
      path: a `.npy` file, a folder that `embed` wrote, or Parquet files (which `folder` then gets
        a copy of as an array).
      folder: the command's output.
      column: of the Parquet files.

    Raises:
      UserError: it is none of these, or no matrix of floating-point numbers.
    """
    path = os.path.expanduser(path)
    if (Path(path) / FEATURES).is_file():
        rows = map_npy(Path(path) / FEATURES)
    elif is_parquet(path):
        rows = map_npy(parquet_to_npy(path, folder, column))
    else:
        rows = map_npy(Path(path))
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise UserError(
            f"{path} holds {rows.dtype} {list(rows.shape)}: embeddings are floating-point numbers "
            "[N, D]"
        )
    return rows


def open_row_numbers(path: str, below: int | None = None) -> np.ndarray:
    """Reads row numbers, int64 [M], from a `.npy` file; each may be there once.

    Raises:
      UserError: they are no such numbers, or not below the number of rows.
    """
    numbers = map_npy(Path(path).expanduser())
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise UserError(
            f"{path} holds {numbers.dtype} {list(numbers.shape)}: row numbers are integers [M]"
        )
    numbers = np.asarray(numbers).astype(np.int64)
    if len(numbers) and (numbers.min() < 0 or (below is not None and numbers.max() >= below)):
        raise UserError(f"{path} names rows {numbers.min()} to {numbers.max()} of {below} rows")
    if len(np.unique(numbers)) != len(numbers):
        raise UserError(f"{path} names a row twice")
    return numbers


def open_labels(path: str, rows: int) -> np.ndarray:
    """Reads one label for each row, numbers or strings, from a `.npy` file.

    Raises:
      UserError: it holds something else, or for another number of rows.
    """
    labels = map_npy(Path(path).expanduser())
    if labels.ndim != 1 or labels.dtype.kind not in "iuUSb":
        raise UserError(
            f"{path} holds {labels.dtype} {list(labels.shape)}: labels are integers or strings [N]"
        )
    if len(labels) != rows:
        raise UserError(f"{path} holds {len(labels)} labels for {rows} rows")
    return np.asarray(labels)


def open_texts(path: str) -> DocumentSource:
    """Opens texts: JSONL and Parquet by their field "text", other files by lines, folders by files.

    Raises:
      UserError: there are none.
    """
    suffix = Path(path).suffix
    if path == "python":
        return open_corpus(CorpusConfig(kind="python", split="all"))
    if suffix in _CORPORA:
        return open_corpus(CorpusConfig(kind=_CORPORA[suffix], path=path, split="all"))
    unit = "file" if os.path.isdir(os.path.expanduser(path)) else "line"
    return open_corpus(CorpusConfig(kind="text", path=path, unit=unit, split="all"))


def shown_rows(
    rows: int, images: str | None, texts: str | None, embeddings: str | None = None
) -> Show:
    """Returns what shows a row on a page: its image, its text, or its number alone.

    Args:
      rows: how many there are.
      images, texts: what was embedded, at most one of them.
      embeddings: a folder that `embed` wrote tells which items could be read; otherwise rows are
        all of them in order.

    Raises:
      UserError: there are not as many images or texts as rows.
    """
    if images is not None and texts is not None:
        raise UserError("give --images or --texts, not both")
    if images is not None:
        pictures = open_images(ImageConfig(path=images, split="all"))
        items = _items(rows, len(pictures), embeddings)
        return _showing(lambda n: image_html(pictures[n], pictures.describe(n)), items)
    if texts is not None:
        documents = open_texts(texts)
        items = _items(rows, len(documents), embeddings)
        return _showing(lambda n: text_html(documents[n], documents.describe(n)), items)
    return lambda row: f"<figcaption>row {row}</figcaption>"


def _showing(show: Show, items: np.ndarray) -> Show:
    def of_row(row: int) -> str:
        try:
            return show(int(items[row]))
        except DamagedRecord as error:
            return text_html(str(error), f"row {row}")

    return of_row


def _items(rows: int, count: int, embeddings: str | None) -> np.ndarray:
    """Which item each row is of."""
    items, total = np.arange(count), count
    if embeddings is not None and (Path(embeddings) / INDEX).is_file():
        lines = read_index(embeddings)
        items, total = np.flatnonzero([line["row"] is not None for line in lines]), len(lines)
    if len(items) != rows or total != count:
        raise UserError(f"there are {count} items to show, and embeddings of {rows} of {total}")
    return items
