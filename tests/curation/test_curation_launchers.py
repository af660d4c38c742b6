"""The commands from files to files, and what they say of wrong ones."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx
from PIL import Image

import dino
import recurrentgemma
from common.data.embedding_folder import EmbeddingFolder
from common.data.tokenizers import ByteTokenizer
from common.sharding import make_mesh
from curation import Hierarchy, Level, deduplicate, retrieve, save
from curation.deduplicate import main as deduplicate_main
from curation.embed import main as embed_main
from curation.embedding import TextRows, embed_texts
from curation.inputs import open_texts
from curation.retrieve import main as retrieve_main
from curation.sample import main as sample_main
from recurrentgemma.config import smoke


@pytest.fixture(scope="module")
def embeddings():
    rng = np.random.default_rng(0)
    centres = 5 * rng.normal(size=(4, 6))
    labels = np.repeat(np.arange(4), [150, 30, 15, 5])
    rows = (centres[labels] + 0.3 * rng.normal(size=(200, 6))).astype(np.float32)
    rows[7] = rows[3] * 2
    return rows, labels, centres.astype(np.float32)


@pytest.fixture
def folder(tmp_path, embeddings):
    rows, labels, centres = embeddings
    np.save(tmp_path / "e.npy", rows)
    np.save(tmp_path / "labels.npy", labels)
    fine = labels * 2 + np.arange(200) % 2
    low = Level.from_assignment(np.repeat(centres, 2, axis=0), fine, np.arange(200.0))
    top = Level.from_assignment(centres, np.arange(8) // 2, np.zeros(8))
    save(Hierarchy([low, top]), tmp_path / "clusters")
    return tmp_path


def fails(capsys, main, *arguments):
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    assert error.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: ")
    return told


def test_functions_stay_functions_beside_launchers_of_their_names():
    """Importing the launchers above replaced neither."""
    assert deduplicate(np.eye(2), 0.5).tolist() == [0, 1]
    assert retrieve(np.eye(2), np.eye(2), 1).tolist() == [[0], [1]]


def test_sample_smoke(folder, embeddings, capsys):
    """A balanced subset with its report, pictures and page; the same again for the same seed."""
    command = [f"--clusters={folder}/clusters", "--size=20", f"--embeddings={folder}/e.npy"]
    sample_main([*command, f"--labels={folder}/labels.npy", f"--output={folder}/out"])
    assert "20 of 200 points" in capsys.readouterr().out
    picked = np.load(folder / "out" / "selected.npy")
    assert picked.dtype == np.int64
    assert np.bincount(embeddings[1][picked]).tolist() == [5, 5, 5, 5]
    settings = json.loads((folder / "out" / "selection.json").read_text())
    assert settings["selected"] == 20
    assert settings["divergence_from_uniform"][1] == pytest.approx(0)
    report = folder / "out" / "report"
    for name in ("README.md", "sizes.png", "clusters.png", "concepts.png", "map.png"):
        assert (report / name).stat().st_size > 500
    assert "| concepts" in (report / "README.md").read_text()
    assert (report / "clusters.html").read_text().count("<figure>") == 20
    sample_main([*command, f"--output={folder}/again"])
    np.testing.assert_array_equal(picked, np.load(folder / "again" / "selected.npy"))
    sample_main([*command, f"--output={folder}/other", "--seed=1"])
    assert not np.array_equal(picked, np.load(folder / "other" / "selected.npy"))


def test_sample_beside_the_clusters_and_of_a_subset(folder, capsys):
    """Without --clusters they are looked for in --output; rows are those of the subset."""
    np.save(folder / "subset.npy", np.arange(200)[::-1] + 1000)
    sample_main([f"--output={folder}/clusters", "--size=900", f"--subset={folder}/subset.npy"])
    assert "all 200 points there are" in capsys.readouterr().out
    picked = np.load(folder / "clusters" / "selected.npy")
    np.testing.assert_array_equal(picked, np.arange(1000, 1200))
    sample_main(
        [f"--clusters={folder}/clusters", f"--output={folder}/flat", "--size=8", "--flat_level=1"]
    )
    assert len(np.load(folder / "flat" / "selected.npy")) == 8


def test_sample_refuses(folder, capsys):
    def told(*arguments):
        return fails(capsys, sample_main, f"--output={folder}/x", *arguments)

    assert "holds no clusters" in told("--size=3")
    clusters = f"--clusters={folder}/clusters"
    assert "--size is missing" in told(clusters)
    assert "give a size of 0 or more" in told(clusters, "--size=-1")
    np.save(folder / "short.npy", np.ones((3, 2), np.float32))
    assert "name the rows" in told(clusters, "--size=3", f"--embeddings={folder}/short.npy")
    np.save(folder / "twice.npy", np.zeros(200, int))
    assert "names a row twice" in told(clusters, "--size=3", f"--subset={folder}/twice.npy")
    assert "row numbers are integers" in told(clusters, "--size=3", f"--subset={folder}/e.npy")
    assert "embeddings are floating" in told(
        clusters, "--size=3", f"--embeddings={folder}/labels.npy"
    )
    assert not (folder / "x").exists()
    (folder / "x").mkdir()
    (folder / "x" / "selected.npy").write_bytes(b"mine")
    assert "nothing is written over" in told(clusters, "--size=3")


def test_deduplicate_smoke(folder, embeddings, capsys):
    """Duplicates go, and with a reference what hangs together with it; also out of Parquet."""
    rows = embeddings[0]
    table = pa.table({"vector": pa.array(rows.tolist(), pa.list_(pa.float32()))})
    pq.write_table(table, folder / "e.parquet")
    deduplicate_main(
        [
            f"--embeddings={folder}/e.parquet",
            "--column=vector",
            "--threshold=0.99999",
            f"--output={folder}/unique",
        ]
    )
    assert "199 of 200 rows" in capsys.readouterr().out
    kept = np.load(folder / "unique" / "kept.npy")
    assert kept.tolist() == [row for row in range(200) if row != 7]
    assert np.load(folder / "unique" / "components.npy")[7] == 3
    assert "| rows" in (folder / "unique" / "report" / "README.md").read_text()

    np.save(folder / "benchmark.npy", embeddings[2][:1])
    deduplicate_main(
        [
            f"--embeddings={folder}/e.npy",
            "--threshold=0.99999",
            f"--references={folder}/benchmark.npy",
            "--reference_threshold=0.9",
            f"--clusters={folder}/clusters",
            "--level=2",
            f"--output={folder}/clean",
        ]
    )
    assert np.load(folder / "clean" / "kept.npy").tolist() == list(range(150, 200))


def test_retrieve_smoke(folder, embeddings, capsys):
    """By neighbours and by clusters."""
    np.save(folder / "queries.npy", embeddings[0][[160, 161, 162, 163, 190]])
    command = [f"--queries={folder}/queries.npy", f"--embeddings={folder}/e.npy"]
    retrieve_main([*command, "--k=3", f"--output={folder}/near"])
    neighbours = np.load(folder / "near" / "neighbours.npy")
    assert neighbours[:, 0].tolist() == [160, 161, 162, 163, 190]
    assert np.load(folder / "near" / "similarities.npy").shape == (5, 3)
    retrieved = np.load(folder / "near" / "retrieved.npy")
    np.testing.assert_array_equal(retrieved, np.unique(neighbours))
    clusters = f"--clusters={folder}/clusters"
    retrieve_main([*command, clusters, "--level=2", f"--output={folder}/clustered"])
    assert np.load(folder / "clustered" / "retrieved.npy").tolist() == list(range(150, 180))
    assert "30 of 200 rows" in capsys.readouterr().out
    np.save(folder / "other.npy", np.ones((2, 5), np.float32))
    told = fails(
        capsys,
        retrieve_main,
        f"--queries={folder}/other.npy",
        f"--embeddings={folder}/e.npy",
        f"--output={folder}/wrong",
    )
    assert "5 dimensions and the pool 6" in told


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone") / "model"
    model = dino.Backbone(dino.BackboneConfig(dino.MODELS["smoke"]()), rngs=nnx.Rngs(0))
    dino.save(model, path, format="workspace")
    return path


def test_embed_images_smoke(tmp_path, backbone, capsys):
    """Rows are the class tokens of prepared images; damaged ones are left out and named."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for n in range(5):
        image = Image.fromarray(rng.integers(0, 255, (40, 30 + 10 * n, 3), np.uint8))
        image.save(tmp_path / "images" / f"{n}.png")
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    command = [
        "--package=dino", f"--checkpoint={backbone}", f"--images={tmp_path}/images",
        "--size=28", "--batch=2", f"--output={tmp_path}/features",
    ]  # fmt: skip
    embed_main(command)
    told = capsys.readouterr().out
    assert "4 rows; 1 left out" in told
    assert "2.png': not an image" in told
    rows = np.load(tmp_path / "features" / "features.npy")
    with Image.open(tmp_path / "images" / "3.png") as image:
        scaled = image.resize((48, 32), Image.Resampling.BICUBIC).crop((10, 2, 38, 30))
    model = dino.load(backbone)
    expected = model.features(model.normalize(np.asarray(scaled)[None])).cls
    np.testing.assert_allclose(rows[2:3], np.asarray(expected), atol=2e-4)
    embed_main(command)
    assert "4 rows" in capsys.readouterr().out

    one = Level.from_assignment(np.zeros((1, 2)), np.zeros(4, int), np.zeros(4))
    save(Hierarchy([one]), tmp_path / "clusters")
    sample_main(
        [
            f"--clusters={tmp_path}/clusters",
            "--size=3",
            f"--embeddings={tmp_path}/features",
            f"--images={tmp_path}/images",
            f"--output={tmp_path}/out",
        ]
    )
    page = (tmp_path / "out" / "report" / "clusters.html").read_text()
    assert page.count("data:image/jpeg") == 3
    assert "2.png" not in page


def test_embed_refuses(tmp_path, backbone, capsys):
    def told(*arguments):
        return fails(
            capsys, embed_main, f"--checkpoint={backbone}", f"--output={tmp_path}/x", *arguments
        )

    assert "one of the two" in told("--package=dino")
    assert "no such package" in told("--package=dinosaur", "--images=x")
    assert "no models to load" in told("--package=curation", "--images=x")
    assert "give --images" in told("--package=dino", "--texts=x")
    assert "no images" in told("--package=dino", f"--images={tmp_path}/none")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "0.png").write_bytes(b"no image")
    damaged = told("--package=dino", "--size=28", f"--images={tmp_path}/damaged")
    assert "none of 1 items can be read" in damaged
    assert "0.png" in damaged


def test_texts_are_means_of_hidden_states(tmp_path):
    """In batches of like lengths, cut at a length; a text without tokens gets no row."""
    lines = ["a somewhat longer line of text", "short", "x" * 90, "    ", "middle one", "y"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    source, tokenizer = open_texts(str(tmp_path / "texts.jsonl")), ByteTokenizer()
    model = recurrentgemma.Griffin(smoke().model, rngs=nnx.Rngs(0))
    rows = TextRows(model, make_mesh(), 2, 24)
    names, ones = [""] * len(lines), np.ones(len(lines), int)
    with EmbeddingFolder(tmp_path / "f", {}, names, ones, (rows.width,), np.float32) as folder:
        assert sum(embed_texts(source, folder, rows, tokenizer)) == len(lines)
        folder.finish()
    found = np.load(tmp_path / "f" / "features.npy")
    head = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    tokens = np.zeros((len(lines), 24), int)
    for row, text in enumerate(lines):
        ids = (head + tokenizer.encode(text))[:24]
        tokens[row, : len(ids)], tokens[row, len(ids) :] = ids, -1
    hidden = np.asarray(nnx.jit(type(model).hidden)(model, np.maximum(tokens, 0)))
    valid = (tokens >= 0)[..., None]
    expected = (hidden * valid).sum(axis=1) / valid.sum(axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-4)
