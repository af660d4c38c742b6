"""Record files as documents: array_record, prepared tfds datasets, Parquet.

The libraries are imported when such a corpus is opened, and none of them needs TensorFlow.
"""

import functools
import os
from typing import Any

import numpy as np

from common.data.file_sources import CorpusFile, files_digest, find_files, locate, text_field
from common.data.sources import DocumentSource, digest, record_keys
from common.errors import UserError, nearest


class ArrayRecords(DocumentSource):
    """Records of array_record files: UTF-8 text, or JSON objects with the text in a field."""

    def __init__(self, files: list[CorpusFile], field: str):
        self._files = files
        self._field = field
        self._readers = [array_record_reader(file.path) for file in files]
        self._first = np.cumsum([0] + [reader.num_records() for reader in self._readers])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> str:
        file, record = locate(self._first, index)
        try:
            data = self._readers[file].read([record])[0]
            return text_field(data.decode(), self._field)
        except (RuntimeError, IndexError, ValueError, RecursionError) as error:
            raise self.damaged(index, error) from error

    def describe(self, index: int) -> str:
        file, record = locate(self._first, index)
        return f"{self._files[file].path!r}, record {record}"

    def keys(self) -> np.ndarray:
        return record_keys([file.name for file in self._files], np.diff(self._first).tolist())

    def fingerprint(self) -> str:
        return files_digest(self._files, "array_record", self._field)


def array_record_reader(path: str) -> Any:
    """Opens an array_record file for random access.

    Raises:
        UserError: It is no whole one.
    """
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise UserError("reading array_record needs `pip install array_record`") from error
    try:
        # Random access: the default reads ahead of records nobody asked for.
        reader = array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0")
        if not reader.ok():
            reader.read([0])  # Raises what went wrong at opening; `num_records` would say 0.
    except RuntimeError as error:
        raise UserError(
            f"'{path}' is not a whole array_record file: {first_line(error)}"
        ) from error
    return reader


class PreparedTfds(DocumentSource):
    """A text feature of a dataset that tfds has prepared in array_record files."""

    def __init__(self, path: str, field: str, subset: str):
        builder = tfds_builder(path, field, subset)
        try:
            self._data = builder.as_data_source(split=subset)
            self._length = len(self._data)
        except (NotImplementedError, RuntimeError, ValueError, OSError) as error:
            raise UserError(f"tfds dataset '{path}' cannot be read: {first_line(error)}") from error
        self._path, self._field, self._subset = path, field, subset

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> str:
        try:
            value = self._data[index][self._field]
            return value.decode() if isinstance(value, bytes) else str(value)
        except (RuntimeError, IndexError, ValueError, KeyError) as error:
            raise self.damaged(index, error) from error

    def describe(self, index: int) -> str:
        return f"{self._path!r}, subset {self._subset}, record {index}"

    def keys(self) -> np.ndarray:
        return record_keys([self._subset], [len(self)])

    def fingerprint(self) -> str:
        content = files_digest(find_files(self._path, "*"))
        return digest("tfds", content, self._field, self._subset)


def tfds_builder(path: str, field: str, subset: str) -> Any:
    """What tfds says of the prepared dataset in the folder `path`.

    Raises:
        UserError: It is none, or has no such feature or subset.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            "reading tfds needs `pip install tensorflow-datasets importlib_resources`"
        ) from error
    try:
        builder = tfds.builder_from_directory(path)
    except Exception as error:  # tfds has no one class for a folder it cannot make out.
        raise UserError(f"'{path}' is no prepared tfds dataset: {first_line(error)}") from error
    splits, features = list(builder.info.splits), list(builder.info.features)
    if subset not in splits:
        hint = nearest(subset, splits) or f"; it has {', '.join(splits) or 'none'}"
        raise UserError(f"tfds dataset '{path}' has no subset '{subset}'{hint}")
    if field not in features:
        hint = nearest(field, features) or f"; it has {', '.join(features)}"
        raise UserError(f"tfds dataset '{path}' has no feature '{field}'{hint}")
    return builder


class ParquetRows(DocumentSource):
    """A string column of Parquet files. Reads a row group at a time, so ask in order."""

    def __init__(self, files: list[CorpusFile], column: str):
        self._files = files
        self._column = column
        self._groups: list[tuple[int, int]] = []
        counts, self._file_counts = [0], []
        for number, file in enumerate(files):
            metadata = _parquet_file(file.path, column).metadata
            self._file_counts.append(metadata.num_rows)
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group))
                counts.append(metadata.row_group(group).num_rows)
        self._first = np.cumsum(counts)
        self._read_group = functools.lru_cache(maxsize=2)(self._read_group_uncached)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> str:
        group, row = locate(self._first, index)
        try:
            value = self._read_group(group)[row].as_py()
        except (OSError, ValueError) as error:  # pyarrow's errors derive from these.
            raise self.damaged(index, first_line(error)) from error
        if not isinstance(value, str):
            raise self.damaged(index, f"column '{self._column}' is {type(value).__name__}")
        return value

    def _read_group_uncached(self, group: int) -> Any:
        file, number = self._groups[group]
        reader = _parquet_file(self._files[file].path, self._column)
        return reader.read_row_group(number, columns=[self._column]).column(0)

    def describe(self, index: int) -> str:
        file, row = locate(np.cumsum([0, *self._file_counts]), index)
        return f"{self._files[file].path!r}, row {row}"

    def keys(self) -> np.ndarray:
        return record_keys([file.name for file in self._files], self._file_counts)

    def fingerprint(self) -> str:
        return files_digest(self._files, "parquet", self._column)


def _parquet_file(path: str, column: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("reading Parquet needs `pip install pyarrow`") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is not a whole Parquet file: {first_line(error)}") from error
    names = file.schema_arrow.names
    if column not in names:
        hint = nearest(column, names) or f"; it has {', '.join(names)}"
        raise UserError(f"'{path}' has no column '{column}'{hint}")
    return file


def first_line(error: Exception) -> str:
    """The first line of an error that may print a screenful."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def tfds_folder(path: str | None) -> str:
    """Checks that `path` is a folder with a prepared dataset in it."""
    if not path or "\0" in path or not os.path.isdir(os.path.expanduser(path)):
        raise UserError(f"no prepared tfds dataset at '{path}': a folder was expected there")
    return os.path.expanduser(path)
