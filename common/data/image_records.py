"""Encoded images in record files: array_record, and tfds datasets prepared in it.

The libraries are imported when such a set is opened, and neither needs TensorFlow: images are
decoded by `common.data.images`.
"""

import base64
import functools
import json
from typing import Any

import numpy as np

from common.data.file_sources import CorpusFile, files_digest, find_files, locate
from common.data.image_sources import Decoding, ImageSource, Labelling, labelling_by_name
from common.data.images import open_image
from common.data.record_sources import array_record_reader, first_line, tfds_builder
from common.data.sources import DamagedRecord, digest, record_keys
from common.errors import UserError


class ImageRecords(ImageSource):
    """Records of array_record files: encoded images (PNG, JPEG, …), or JSON objects.

    A JSON object holds the encoded image in base64 as `image`, and may hold a `label`: a whole
    number, or the name of a class. Whether records have labels is decided by the first one; who
    asks for labels has all records read once.
    """

    def __init__(self, files: list[CorpusFile], decoding: Decoding | None = None):
        self._files = files
        self._decoding = decoding or Decoding()
        self._readers = [array_record_reader(file.path) for file in files]
        self._first = np.cumsum([0] + [reader.num_records() for reader in self._readers])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        data = self._read(index)
        if data[:1] == b"{":
            try:
                data = base64.b64decode(_fields(data)["image"], validate=True)
            except (KeyError, TypeError, ValueError) as error:
                raise DamagedRecord(f"{self.describe(index)}: no base64 'image'") from error
        return _decoded(data, self._decoding, self.describe(index))

    def _read(self, index: int) -> bytes:
        file, record = locate(self._first, index)
        try:
            return self._readers[file].read([record])[0]
        except (RuntimeError, IndexError) as error:
            raise DamagedRecord(f"{self.describe(index)}: {first_line(error)}") from error

    @functools.cached_property
    def labelling(self) -> Labelling | None:
        if not len(self) or "label" not in _fields(self._read(0)):
            return None
        labels: list[Any] = []
        for index in range(len(self)):
            try:
                labels.append(_fields(self._read(index)).get("label"))
            except DamagedRecord:
                labels.append(labels[0])  # Never seen: its image cannot be read either.
        if all(isinstance(label, str) for label in labels):
            return labelling_by_name(labels)
        if all(type(label) is int and label >= 0 for label in labels):
            numbers = np.array(labels, np.int64)
            return Labelling(tuple(map(str, range(int(numbers.max()) + 1))), numbers)
        wrong = next(i for i, label in enumerate(labels) if type(label) is not type(labels[0]))
        raise UserError(
            f"{self.describe(wrong)}: label {labels[wrong]!r}, where the first record has "
            f"{labels[0]!r}; use numbers from 0, or names, for all"
        )

    def describe(self, index: int) -> str:
        file, record = locate(self._first, index)
        return f"{self._files[file].path!r}, record {record}"

    def keys(self) -> np.ndarray:
        return record_keys([file.name for file in self._files], np.diff(self._first).tolist())

    def fingerprint(self) -> str:
        return files_digest(self._files, "image records", repr(self._decoding))


class PreparedImages(ImageSource):
    """An image feature, and a label if there is one, of a prepared tfds dataset."""

    def __init__(
        self, path: str, field: str, label_field: str, subset: str, decoding: Decoding | None = None
    ):
        import tensorflow_datasets as tfds

        builder = tfds_builder(path, field, subset)
        if not isinstance(builder.info.features[field], tfds.features.Image):
            raise UserError(f"tfds dataset '{path}': feature '{field}' is no image")
        self._path, self._field, self._subset = path, field, subset
        self._decoding = decoding or Decoding()
        try:
            # The bytes as they are stored: their decoding here is bounded, and like any file's.
            self._data = builder.as_data_source(
                split=subset, decoders={field: tfds.decode.SkipDecoding()}
            )
            self._length = len(self._data)
        except (NotImplementedError, RuntimeError, ValueError, OSError) as error:
            raise UserError(f"tfds dataset '{path}' cannot be read: {first_line(error)}") from error
        self._label_field = label_field if label_field in builder.info.features else None
        self._features = builder.info.features

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            data = self._data[index][self._field]
        except (RuntimeError, IndexError, ValueError, KeyError) as error:
            raise DamagedRecord(f"{self.describe(index)}: {first_line(error)}") from error
        if not isinstance(data, bytes):
            raise DamagedRecord(f"{self.describe(index)}: no encoded image")
        return _decoded(data, self._decoding, self.describe(index))

    @functools.cached_property
    def labelling(self) -> Labelling | None:
        if self._label_field is None:
            return None
        labels = np.empty(len(self), np.int64)
        for index in range(len(self)):
            try:
                labels[index] = self._data[index][self._label_field]
            except (RuntimeError, IndexError, KeyError):
                labels[index] = 0  # Never seen: its image cannot be read either.
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"{self.describe(index)}: feature '{self._label_field}' is no label"
                ) from error
        feature = self._features[self._label_field]
        count = max(getattr(feature, "num_classes", 0) or 0, int(labels.max(initial=-1)) + 1)
        names = getattr(feature, "names", None) or []
        return Labelling(tuple(names if len(names) == count else map(str, range(count))), labels)

    def describe(self, index: int) -> str:
        return f"{self._path!r}, subset {self._subset}, record {index}"

    def keys(self) -> np.ndarray:
        return record_keys([self._subset], [len(self)])

    def fingerprint(self) -> str:
        content = files_digest(find_files(self._path, "*"))
        return digest("tfds images", content, self._field, self._subset, repr(self._decoding))


def _decoded(data: bytes, decoding: Decoding, name: str) -> np.ndarray:
    return open_image(data, background=decoding.background, stretch=decoding.stretch, name=name)


def _fields(data: bytes) -> dict[str, Any]:
    """What a record that is a JSON object holds; nothing of any other."""
    if data[:1] != b"{":
        return {}
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
