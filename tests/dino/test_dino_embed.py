"""`python -m dino.embed`, as a user types it: every kind of feature, kills, damaged images."""

import dataclasses
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import dino
from common.data import image_sources
from common.data.embedding_folder import read_index
from common.data.images import image_size, open_image
from common.errors import UserError
from common.models.vit import ViTConfig
from dino.embed import main
from dino.pictures import attention_colors, principal_colors, side_by_side
from dino.preparation import Preparation, default_size

VIT = ViTConfig(width=16, num_layers=2, num_heads=2, patch_size=4, image_size=16, layer_scale=0.5)
SIZES = {"a.png": (20, 30), "b.jpg": (17, 17), "deep/c.png": (9, 40), "deep/d.png": (64, 33)}
GOOD = ["a.png", "b.jpg", "deep/c.png", "deep/d.png", "e-grey.png", "f-glass.png", "g-turned.jpg"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / "deep").mkdir()
    rng = np.random.default_rng(0)
    for name, (height, width) in SIZES.items():
        pixels = rng.integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    Image.fromarray(rng.integers(0, 255, (24, 24), np.uint8)).save(folder / "e-grey.png")
    glass = rng.integers(0, 255, (20, 28, 4), np.uint8)
    Image.fromarray(glass).save(folder / "f-glass.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(rng.integers(0, 255, (16, 32, 3), np.uint8))
    turned.save(folder / "g-turned.jpg", exif=exif)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = dino.Backbone(dino.BackboneConfig(VIT), rngs=nnx.Rngs(0))
    path = tmp_path_factory.mktemp("model") / "own"
    dino.save(model, path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    return dino.load(checkpoint)


def command(checkpoint, images, output, *more: str) -> list[str]:
    return [f"--checkpoint={checkpoint}", f"--images={images}", f"--output={output}",
            "--batch=8", "--threads=2", *more]  # fmt: skip


def expected(model, image: np.ndarray, preparation: Preparation):
    return model.features(model.normalize(jnp.asarray(preparation(image)))[None])


@pytest.mark.smoke
def test_smoke(model, checkpoint, images, tmp_path, capsys):
    output = tmp_path / "out"
    main(command(checkpoint, images, output, "--pictures=2", "--attention_maps=1"))
    features = np.load(output / "features.npy", mmap_mode="r")
    index = read_index(output)
    assert [line["path"] for line in index] == GOOD
    assert [line["row"] for line in index] == list(range(7))
    assert index[2]["size"] == [9, 40]
    assert index[6]["size"] == [32, 16]  # As it is shown.
    assert features.shape == (7, 16)
    preparation = Preparation(4, size=16)
    for line in index:
        one = expected(model, open_image(images / line["path"]), preparation)
        np.testing.assert_allclose(features[line["row"]], one.cls[0], atol=2e-5)
    out = capsys.readouterr().out
    assert "features.npy: float32 [7, 16]" in out
    pictures = sorted(os.listdir(output / "pictures"))
    assert pictures == ["000000-a-attention.png", "000000-a-pca.png", "000001-b-pca.png"]
    # Again: nothing is left to do.
    main(command(checkpoint, images, output))
    assert "is complete" in capsys.readouterr().out


def test_patches_of_images_as_they_are(model, checkpoint, images, tmp_path):
    main(command(checkpoint, images, tmp_path, "--what=patches", "--fit=pad", "--layers=2"))
    features, index = np.load(tmp_path / "features.npy"), read_index(tmp_path)
    assert [line["grid"] for line in index[:4]] == [[5, 8], [5, 5], [3, 10], [16, 9]]
    assert len(features) == sum(line["rows"] for line in index)
    preparation = Preparation(4, "pad", None)
    for line in index[:3]:
        prepared = preparation(open_image(images / line["path"]))
        two = model.features(model.normalize(jnp.asarray(prepared))[None], layers=2).patches
        rows = features[line["row"] : line["row"] + line["rows"]]
        np.testing.assert_allclose(rows, jnp.concatenate(two, -1)[0], atol=2e-5)


def test_pooled_and_cropped_patches(checkpoint, images, tmp_path):
    """The mean of the patches is what `patches` says; a fixed size gives an array of grids."""
    main(command(checkpoint, images, tmp_path / "all", "--what=patches", "--size=12"))
    main(command(checkpoint, images, tmp_path / "mean", "--what=pooled", "--size=12",
                 "--stored_dtype=float16"))  # fmt: skip
    patches = np.load(tmp_path / "all" / "features.npy")
    mean = np.load(tmp_path / "mean" / "features.npy")
    assert patches.shape == (7, 9, 16)
    assert mean.dtype == np.float16
    np.testing.assert_allclose(mean, patches.mean(1), atol=2e-3)


def interrupted_after(count: int, monkeypatch, act) -> list[int]:
    """Lets `act` happen when image number `count` is read; returns what was read."""
    read: list[int] = []
    original = image_sources.ImageFolder.__getitem__

    def reading(self, index):
        read.append(index)
        if len(read) == count:
            act()
        return original(self, index)

    monkeypatch.setattr(image_sources.ImageFolder, "__getitem__", reading)
    return read


def many(folder, count: int = 40):
    """Images, a third of which are of another size."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    for n in range(count):
        pixels = rng.integers(0, 255, (16, 20 if n % 3 else 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{n:03}.png")
    return folder


def test_killed_and_resumed(checkpoint, tmp_path, monkeypatch, capsys):
    """What was done before a kill is not done again, and the result is the uninterrupted one's."""
    images = many(tmp_path / "images")
    options = ("--fit=resize", "--what=patches", "--stored_dtype=float16")
    main(command(checkpoint, images, tmp_path / "whole", *options))

    def kill():
        raise MemoryError("killed")

    read = interrupted_after(35, monkeypatch, kill)
    with pytest.raises(MemoryError):
        main(command(checkpoint, images, tmp_path / "out", *options))
    assert not (tmp_path / "out" / "features.npy").exists()
    monkeypatch.undo()
    capsys.readouterr()
    again = interrupted_after(0, monkeypatch, kill)
    main(command(checkpoint, images, tmp_path / "out", *options))
    assert 0 < len(again) < 40
    assert f"40 images, {40 - len(again)} of them done before" in capsys.readouterr().out
    assert len(set(again)) == len(again)
    assert set(read) | set(again) == set(range(40))
    for name in ("features.npy", "index.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_signal_saves_and_says_how_to_go_on(checkpoint, tmp_path, monkeypatch, capsys):
    images = many(tmp_path / "images", 80)
    interrupted_after(9, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    main(command(checkpoint, images, tmp_path / "out"))
    said = capsys.readouterr().out
    assert "go on with: python -m dino.embed" in said
    monkeypatch.undo()
    main(command(checkpoint, images, tmp_path / "out"))
    assert np.load(tmp_path / "out" / "features.npy").shape == (80, 16)
    assert np.isfinite(np.load(tmp_path / "out" / "features.npy")).all()


def with_damage(folder):
    images = many(folder, 6)
    whole = (images / "002.png").read_bytes()
    (images / "002.png").write_bytes(whole[: len(whole) // 2])
    (images / "004.png").write_text("not an image")
    return images


def test_damaged_images_are_named_and_left_out(checkpoint, tmp_path, capsys):
    images = with_damage(tmp_path / "images")
    for fit in ("crop", "resize"):
        main(command(checkpoint, images, tmp_path / fit, f"--fit={fit}"))
        out = capsys.readouterr().out
        assert "2 images could not be read" in out
        assert "002.png" in out
        assert "004.png" in out
        index = read_index(tmp_path / fit)
        assert [line["row"] for line in index] == [0, 1, None, 2, None, 3]
        assert [line["error"] is None for line in index] == [True, True, False, True, False, True]
        assert np.load(tmp_path / fit / "features.npy").shape == (4, 16)


def failure(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_too_much_damage(checkpoint, tmp_path, capsys):
    images = with_damage(tmp_path / "images")
    error = failure(command(checkpoint, images, tmp_path / "out", "--error_budget=1"), capsys)
    assert "unreadable image number 2 of 6 images; error_budget allows 1" in error
    # With a larger budget it goes on.
    main(command(checkpoint, images, tmp_path / "out", "--error_budget=0.5"))
    assert np.load(tmp_path / "out" / "features.npy").shape == (4, 16)
    for file in images.iterdir():
        file.write_bytes(b"")
    assert "none of 6 images" in failure(command(checkpoint, images, tmp_path / "new"), capsys)


def test_mistakes(checkpoint, images, tmp_path, capsys):
    def says(*more: str, output="out") -> str:
        return failure(command(checkpoint, images, tmp_path / output, *more), capsys)

    error = says("--size=18")
    assert "take 16 or 20" in error
    assert "resize or pad" in error
    assert "2 blocks" in says("--layers=3")
    assert "--batch must be at least 1" in says("--batch=0")
    assert "did you mean '--images'" in says("--image=x")
    main(command(checkpoint, images, tmp_path / "out"))
    assert 'what "cls" → "pooled"' in says("--what=pooled")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no images under" in failure(command(checkpoint, empty, tmp_path / "o"), capsys)
    assert "no checkpoint at" in failure(command("nowhere", images, tmp_path / "o"), capsys)


def test_arrays(checkpoint, model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 16, 16), np.uint8)
    np.savez(tmp_path / "grey.npz", images=pixels)
    main(command(checkpoint, tmp_path / "grey.npz", tmp_path / "out", "--fit=pad"))
    rgb = jnp.asarray(np.repeat(pixels[..., None], 3, -1))
    close = model.features(model.normalize(rgb)).cls
    np.testing.assert_allclose(np.load(tmp_path / "out" / "features.npy"), close, atol=2e-5)


def test_preparations():
    image = np.random.default_rng(0).integers(0, 255, (30, 45, 3), np.uint8)
    assert Preparation(14, "pad", None)(image).shape == (42, 56, 3)
    assert Preparation(14, "resize", None)(image).shape == (28, 42, 3)
    assert Preparation(14, "resize", 60)(image).shape == (56, 84, 3)
    assert Preparation(14, "pad", 60, longest=70)(image).shape == (56, 70, 3)
    assert Preparation(14)(image).shape == (224, 224, 3)
    padded = Preparation(14, "pad", None)(image)
    np.testing.assert_array_equal(padded[6:36, 5:50], image)
    assert (padded[:6] == Preparation(14).color).all()
    for height, width in ((1, 1), (3, 900), (14, 28), (1000, 7)):
        for fit in ("resize", "pad"):
            preparation = Preparation(14, fit, None)
            shape = preparation(np.zeros((height, width, 3), np.uint8)).shape
            assert shape[:2] == preparation.sizes_of(height, width)
            assert shape[0] % 14 == shape[1] % 14 == 0
    whole = np.random.default_rng(1).integers(0, 255, (28, 42, 3), np.uint8)
    np.testing.assert_array_equal(Preparation(14, "resize", None)(whole), whole)
    assert default_size(ViTConfig(384, 12, 6)) == 224
    assert default_size(dataclasses.replace(VIT, image_size=20)) == 20
    for bad in ({"fit": "stretch"}, {"size": 0}, {"size": None}, {"longest": 3}):
        with pytest.raises(UserError):
            Preparation(14, **bad)


def test_heads_of_files_tell_what_they_decode_to(images):
    for name in GOOD:
        assert image_size(images / name) == open_image(images / name).shape[:2]


def test_principal_colors():
    """A subject with two parts before a background, twice: the same colours in both images."""
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(3, 12)) + np.array([[8.0], [-8.0], [-8.0]]) * rng.normal(size=12)
    maps = []
    for grid in ((6, 8), (7, 5)):
        parts = np.zeros(grid, int)
        parts[2:4, 1:4] = 1
        parts[4:5, 1:4] = 2
        maps.append(parts)
    patches = [
        (kinds[parts] + 0.01 * rng.normal(size=(*parts.shape, 12))).reshape(-1, 12)
        for parts in maps
    ]
    colors = principal_colors(patches, [parts.shape for parts in maps])
    for parts, picture in zip(maps, colors):
        assert picture.shape == (*parts.shape, 3)
        assert (picture[parts == 0] == 0).all()
        assert (picture[parts > 0].max(-1) > 0).any()
    first, second = (colors[n][maps[n] == 1].mean(0) for n in (0, 1))
    other = colors[0][maps[0] == 2].mean(0)
    assert np.abs(first - other).max() > 100
    assert abs(first[0] - second[0]) < 40
    every = principal_colors(patches, [parts.shape for parts in maps], foreground=False)
    assert every[0][maps[0] == 0].std(0)[0] < 10  # The third component is noise here.
    assert np.abs(every[0][maps[0] == 0].mean(0) - every[0][maps[0] == 1].mean(0)).max() > 60


def test_attention_colors():
    picture = attention_colors(np.array([0.0, 0.1, 0.2, 0.4]), (2, 2))
    assert picture[0, 0].tolist() == [0, 0, 0]
    assert picture[1, 1].tolist() == [255, 255, 255]
    assert picture[0, 1].tolist() == [191, 0, 0]
    row = side_by_side(np.zeros((20, 64, 3), np.uint8), [picture, picture])
    assert row.size == (64 * 3 + 2, 20)
    assert row.getpixel((64 + 1 + 60, 19)) == (255, 255, 255)
    many = side_by_side(np.zeros((20, 64, 3), np.uint8), [picture] * 6, smooth=True)
    assert many.size == (64 * 3 + 2, 20 * 3 + 2)
