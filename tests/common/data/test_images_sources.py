"""Sets of images: folders, arrays, record files, drawn ones; damage within a budget."""

import base64
import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from common.data.assets import asset
from common.data.image_corpus import ImageConfig, open_images, parse_images
from common.data.image_scenes import AnimalScenes, LetterScenes, ShapeScenes
from common.data.image_sets import Glyphs, Shapes
from common.data.image_sources import HealthyImages, ImageArrays, find_images
from common.data.sources import DamagedRecord
from common.errors import UserError


def flat(value, size=4):
    """An image of one colour, by which it is told from others."""
    return Image.fromarray(np.full((size, size, 3), value, np.uint8))


def encoded(value, kind="PNG"):
    stream = io.BytesIO()
    flat(value).save(stream, kind)
    return stream.getvalue()


def shades(source):
    return [int(source[i][0, 0, 0]) for i in range(len(source))]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "set"
    for value, name in enumerate(["cat/b.png", "cat/deep/a.PNG", "dog/a.bmp", "ant/z.png"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        flat(value * 10).save(root / name)
    return root


def opened(path, **options):
    return open_images(ImageConfig(path=str(path), split="all", **options))


def test_class_folders(folder):
    source = opened(folder)
    assert source.classes == ("ant", "cat", "dog")
    assert shades(source) == [30, 0, 10, 20]
    np.testing.assert_array_equal(source.labels, [0, 1, 1, 2])
    assert source.describe(3).endswith("dog/a.bmp'")
    assert opened(folder, classes="none").labels is None


def test_loose_images_are_no_class(folder):
    flat(99).save(folder / "loose.jpg")
    source = opened(folder)
    assert (len(source), source.labels, source.classes) == (5, None, ())
    with pytest.raises(UserError, match=r"loose\.jpg' lies in no class folder"):
        opened(folder, classes="folders")


def test_what_is_left_out(folder, tmp_path, caplog):
    """Hidden names, other files, links to folders, and links that lead out; not those that stay."""
    flat(0).save(tmp_path / "outside.png")
    (folder / "cat" / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "cat" / "inside.png").symlink_to(folder / "dog" / "a.bmp")
    (folder / "loop").symlink_to(folder)
    (folder / ".hidden").mkdir()
    flat(0).save(folder / ".hidden" / "a.png")
    flat(0).save(folder / "cat" / ".a.png")
    (folder / "cat" / "notes.txt").write_text("no image")
    names = [file.name for file in find_images(folder)]
    assert names == ["ant/z.png", "cat/b.png", "cat/deep/a.PNG", "cat/inside.png", "dog/a.bmp"]
    assert "1 links to images outside" in caplog.text


def test_order_and_keys_do_not_depend_on_the_place(folder, tmp_path):
    first = opened(folder)
    os.rename(folder, tmp_path / "moved")
    moved = opened(tmp_path / "moved")
    np.testing.assert_array_equal(first.keys(), moved.keys())
    before = moved.fingerprint()
    flat(77, size=9).save(tmp_path / "moved" / "cat" / "b.png")
    assert opened(tmp_path / "moved").fingerprint() != before


def test_one_file_is_a_set(folder):
    assert shades(opened(folder / "dog" / "a.bmp")) == [20]


@pytest.mark.parametrize("path", [None, "", "nowhere", "a\0b"])
def test_no_folder(path):
    with pytest.raises(UserError, match=r"no (folder of )?images at"):
        open_images(ImageConfig(path=path))


def test_empty_folder_and_wrong_names(tmp_path):
    with pytest.raises(UserError, match="no images under"):
        opened(tmp_path)
    with pytest.raises(UserError, match="did you mean 'folder'"):
        opened(tmp_path, kind="folders")
    with pytest.raises(UserError, match="use auto, folders or none"):
        opened(tmp_path, classes="yes")
    with pytest.raises(UserError, match="three numbers from 0 to 255"):
        opened(tmp_path, background=(0, 0, 256))


def test_splits_are_disjoint_and_everything():
    config = {"kind": "shapes", "drawn_count": 300, "drawn_size": 8, "heldout_fraction": 0.2}
    train, heldout = (open_images(ImageConfig(split=s, **config)) for s in ("train", "heldout"))
    assert len(train) + len(heldout) == 300
    assert not set(train.keys()) & set(heldout.keys())
    assert 30 < len(heldout) < 90
    few = open_images(ImageConfig(max_images=7, **config))
    assert len(few) == 7
    assert set(few.keys()) <= set(train.keys())
    np.testing.assert_array_equal(few.labels, [few._source.labels[i] for i in few._indices])
    with pytest.raises(UserError, match="no images in split 'heldout'"):
        open_images(ImageConfig("shapes", drawn_count=300, split="heldout"))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.bool_])
def test_arrays_of_any_type(tmp_path, dtype):
    top = {np.uint8: 255, np.uint16: 65535, np.float32: 1.0, np.bool_: True}[dtype]
    images = np.zeros((3, 2, 2), dtype)
    images[1] = top
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([2, 0, 1]))
    source = opened(tmp_path / "a.npz", kind="arrays")
    assert shades(source) == [0, 255, 0]
    assert source.classes == ("0", "1", "2")
    np.save(tmp_path / "a.npy", images)
    source = opened(tmp_path / "a.npy", kind="arrays")
    assert (shades(source), source.labels) == ([0, 255, 0], None)


def test_arrays_that_do_not_fit(tmp_path):
    for shape in ((3, 2), (3, 2, 2, 5), (3, 0, 2)):
        with pytest.raises(UserError, match=r"images are \[N, H, W\]"):
            ImageArrays(np.zeros(shape, np.uint8))
    images = np.zeros((3, 2, 2), np.uint8)
    for labels in (np.zeros(2, int), np.zeros(3), np.array([0, -1, 0])):
        with pytest.raises(UserError, match="labels"):
            ImageArrays(images, labels)
    np.savez(tmp_path / "a.npz", pictures=images)
    with pytest.raises(UserError, match="no array 'images'; it has pictures"):
        opened(tmp_path / "a.npz", kind="arrays")
    np.save(tmp_path / "o.npy", np.array([{"a": 1}]), allow_pickle=True)
    (tmp_path / "t.npz").write_bytes(b"PK\x03\x04 and no more")
    for name in ("o.npy", "t.npz"):
        with pytest.raises(UserError, match="no whole file of arrays"):
            opened(tmp_path / name, kind="arrays")
    with pytest.raises(UserError, match="no file at"):
        opened(tmp_path, kind="arrays")


def write_array_record(path, records):
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def labelled(value, label):
    image = base64.b64encode(encoded(value)).decode()
    return json.dumps({"image": image, "label": label}).encode()


def test_array_record_of_encoded_images(tmp_path):
    records = [encoded(5), encoded(6, "BMP"), b"damaged", encoded(7)]
    write_array_record(tmp_path / "a.array_record-00000-of-00002", records[:3])
    write_array_record(tmp_path / "a.array_record-00001-of-00002", records[3:])
    source = opened(tmp_path, kind="array_record")
    assert (len(source), source.labels) == (4, None)
    assert [source[i][0, 0, 0] for i in (0, 1, 3)] == [5, 6, 7]
    with pytest.raises(DamagedRecord, match=r"00000-of-00002', record 2: not an image"):
        source[2]


def test_array_record_with_labels(tmp_path):
    path = tmp_path / "a.array_record"
    write_array_record(path, [labelled(5, "dog"), labelled(6, "cat")])
    source = opened(path, kind="array_record")
    assert source.classes == ("cat", "dog")
    assert (shades(source), source.labels.tolist()) == ([5, 6], [1, 0])
    write_array_record(path, [labelled(5, 3), labelled(6, 0)])
    source = opened(path, kind="array_record")
    assert (source.labels.tolist(), len(source.classes)) == ([3, 0], 4)
    write_array_record(path, [labelled(5, 3), labelled(6, "cat")])
    with pytest.raises(UserError, match="record 1: label 'cat', where the first record has 3"):
        _ = opened(path, kind="array_record").labels


def varint(number):
    """A protocol buffer's integer."""
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def part(number, data):
    return bytes([number << 3 | 2]) + varint(len(data)) + data


def example(image, label):
    """A serialised tf.train.Example with the features `image` and `label`."""
    features = {b"image": part(1, part(1, image)), b"label": part(3, part(1, varint(label)))}
    entries = [part(1, part(1, name) + part(2, value)) for name, value in features.items()]
    return part(1, b"".join(entries))


def test_prepared_tfds(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    folder = tmp_path / "pictures" / "1.0.0"
    folder.mkdir(parents=True)
    records = [example(encoded(5), 1), example(encoded(6), 0), example(b"damaged", 1)]
    write_array_record(folder / "pictures-train.array_record-00000-of-00001", records)
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["a", "b"])}
    tfds.features.FeaturesDict(features).save_config(str(folder))
    split = {
        "name": "train",
        "numBytes": "500",
        "shardLengths": ["3"],
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"name": "pictures", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    source = opened(folder, kind="tfds")
    assert (source.classes, source.labels.tolist()) == (("a", "b"), [1, 0, 1])
    assert [source[i][0, 0, 0] for i in (0, 1)] == [5, 6]
    with pytest.raises(DamagedRecord, match="subset train, record 2: not an image"):
        source[2]
    assert opened(folder, kind="tfds", label_field="none").labels is None
    with pytest.raises(UserError, match="feature 'label' is no image"):
        opened(folder, kind="tfds", field="label")
    with pytest.raises(UserError, match="no subset 'test'"):
        opened(folder, kind="tfds", subset="test")


def test_damage_is_replaced_within_the_budget(folder, caplog):
    (folder / "cat" / "b.png").write_bytes(b"damaged")
    (folder / "dog" / "a.bmp").write_bytes(b"")
    healthy = HealthyImages(opened(folder), 2)
    read = [healthy.read(i) for i in range(4)]
    assert [number for _, number in read] == [0, 2, 2, 0]
    assert [int(image[0, 0, 0]) for image, _ in read] == [30, 10, 10, 30]
    assert sorted(healthy.damaged) == [1, 3]
    assert caplog.text.count("b.png") == 1
    healthy.read(1)
    assert caplog.text.count("b.png") == 1
    with pytest.raises(UserError, match=r"a\.bmp.*damaged image number 2 of 4.*allows 1"):
        list(map(HealthyImages(opened(folder), 0.25).read, range(4)))
    with pytest.raises(UserError, match="0 or more"):
        HealthyImages(opened(folder), -1)


def test_decoded_images_are_kept_while_there_is_room():
    read = []

    class Counted(ImageArrays):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    images = np.arange(4 * 12, dtype=np.uint8).reshape(4, 2, 2, 3)
    healthy = HealthyImages(Counted(images), cache_bytes=30)  # Two of 12 bytes each.
    for _ in range(3):
        for i in (2, 0, 1, 3):
            np.testing.assert_array_equal(healthy.read(i)[0], images[i])
    assert sorted(read) == [0, 1, 1, 1, 2, 3, 3, 3]


def installed(asset_name):
    """Whether an optional asset is here."""
    try:
        return asset(asset_name).is_file()
    except UserError:
        return False


SCENES = pytest.param(
    AnimalScenes,
    marks=pytest.mark.skipif(
        not installed("animal-mnist"), reason="the asset animal-mnist is not installed"
    ),
)


@pytest.mark.parametrize("kind", [Shapes, Glyphs, LetterScenes, ShapeScenes, SCENES])
def test_drawn_images(kind):
    least = 0.01 if kind is ShapeScenes else 0.02  # A bar a quarter as long as the side.
    source = kind(24, 60)
    assert len(source) == 60
    np.testing.assert_array_equal(np.bincount(source.labels[: 2 * len(source.classes)]), 2)
    for index in range(0, 60, 7):
        image, covered = source.draw(index)
        assert (image.shape, image.dtype) == ((24, 24, 3), np.uint8)
        assert least < covered.mean() < 0.7
        # The object's colour stands out from what surrounds it.
        inside, outside = image[covered].mean(0), image[~covered].mean(0)
        assert np.linalg.norm(inside - outside) > 25
        np.testing.assert_array_equal(image, kind(24, 60)[index])
    with pytest.raises(IndexError):
        source[60]
    with pytest.raises(UserError, match="draw 1 or more"):
        kind(4, 10)


@pytest.mark.parametrize("kind", [Shapes, Glyphs, LetterScenes, ShapeScenes, SCENES])
def test_raw_pixels_do_not_tell_the_classes_of_drawn_images(kind):
    """Nearest neighbours by pixels are close to chance, so that features have something to show."""
    source = kind(24, 1000)
    pixels = np.stack([source[i] for i in range(1000)]).reshape(1000, -1).astype(np.float32)
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)
    nearest = np.argsort(pixels[800:] @ pixels[:800].T, axis=1)[:, -10:]
    votes = np.stack([(source.labels[nearest] == c).sum(1) for c in range(len(source.classes))], 1)
    right = (votes.argmax(1) == source.labels[800:]).mean()
    assert right < (4.0 if kind is LetterScenes else 3.0) / len(source.classes)


def test_short_names(tmp_path):
    """What commands take for a set of images."""
    assert parse_images("shapes") == ImageConfig("shapes", split="all")
    assert parse_images("animals:heldout").heldout_fraction == 0.2
    assert parse_images("a/b.npz").kind == "arrays"
    assert parse_images("a/x.array_record*").kind == "array_record"
    assert parse_images("a/shapes").kind == "folder"
    (tmp_path / "dataset_info.json").write_text("{}")
    assert parse_images(f"{tmp_path}").kind == "tfds"
    prepared = parse_images(f"{tmp_path}@test")
    assert (prepared.path, prepared.subset) == (str(tmp_path), "test")
    train, heldout = (open_images(parse_images(f"shapes:{part}")) for part in ("train", "heldout"))
    assert not set(train.keys()) & set(heldout.keys())
