"""Real images of public packages, read as the untrusted files that they are."""

import gzip
import hashlib
import pickle

import numpy as np
import pytest

from common.data import image_assets
from common.data.assets import ASSETS, asset
from common.data.image_corpus import ImageConfig, open_images
from common.errors import UserError

pytestmark = pytest.mark.parity

# `make parity` installs these; scikit-image's is left to who wants it.
HERE = ("animal-mnist", "animal-mnist-labels", "mnist-5k")


@pytest.mark.parametrize("name", HERE)
def test_files_are_those_that_were_looked_at(name):
    assert hashlib.sha256(asset(name).read_bytes()).hexdigest() == ASSETS[name].sha256


@pytest.mark.parametrize(("kind", "count"), [("animals", 10_000), ("digits", 5_000)])
def test_sets(kind, count):
    source = open_images(ImageConfig(kind, split="all"))
    assert len(source) == count
    np.testing.assert_array_equal(np.bincount(source.labels), count // 10)
    assert source[0].shape == (28, 28, 3)
    # Classes differ on average, so labels belong to the images.
    means = [
        np.mean([source[int(i)] for i in np.flatnonzero(source.labels == c)[:50]], 0)
        for c in range(10)
    ]
    right = 0
    for i in range(60, count, 97):
        distances = [np.square(source[i] - mean).sum() for mean in means]
        right += int(np.argmin(distances) == source.labels[i])
    assert right / len(range(60, count, 97)) > 0.3


class Touches:
    def __reduce__(self):
        return (open, ("touched", "w"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Touches(), "asks for io.open|asks for _io.open"),
        (np.array([Touches()]), "asks for"),
        ([1, 2], "no array of whole numbers"),
        (np.zeros(3), "no array of whole numbers"),
    ],
)
def test_a_pickle_runs_nothing(tmp_path, monkeypatch, value, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(pickle.dumps(value)))
    with pytest.raises(UserError, match=message):
        image_assets._pickled_array(path)
    assert not (tmp_path / "touched").exists()


def test_what_unpacks_to_too_much_is_not_unpacked(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"\0" * (1 << 26)))
    with pytest.raises(UserError, match="unpacks to more than"):
        image_assets._pickled_array(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        image_assets._pickled_array(path)
