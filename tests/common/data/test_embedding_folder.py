"""Folders of embeddings: any order, several runs, kills and damage in between."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.data.embedding_folder import EmbeddingFolder, Item, read_index
from common.errors import UserError

ROOT = Path(__file__).parents[3]
NAMES = ["a.png", "b/ü.png", "c.png", "d.png"]
ROWS = np.array([1, 3, 2, 1])
VALUES = [np.full((rows, 2), number + 0.5, np.float32) for number, rows in enumerate(ROWS)]
SETTINGS = {"what": "patches", "size": None}


def opened(path, settings=None, rows=ROWS) -> EmbeddingFolder:
    grids = np.stack([rows, np.ones_like(rows)], 1)
    return EmbeddingFolder(path, settings or SETTINGS, NAMES, rows, (2,), np.float32, grids)


def put(folder: EmbeddingFolder, *numbers: int) -> None:
    folder.write(numbers, [VALUES[n] for n in numbers], [Item((n, 9)) for n in numbers])


def test_any_order(tmp_path):
    with opened(tmp_path / "out") as folder:
        put(folder, 2, 0)
        assert folder.missing.tolist() == [1, 3]
        with pytest.raises(ValueError, match="2 items are not done"):
            folder.finish()
        put(folder, 3, 1)
        folder.finish()
    features = np.load(tmp_path / "out" / "features.npy", mmap_mode="r")
    np.testing.assert_array_equal(features, np.concatenate(VALUES))
    index = read_index(tmp_path / "out")
    assert [line["row"] for line in index] == [0, 1, 4, 6]
    assert index[1] == {
        "path": "b/ü.png", "row": 1, "rows": 3, "size": [1, 9], "grid": [3, 1], "error": None
    }  # fmt: skip
    assert sorted(os.listdir(tmp_path / "out")) == [
        ".lock", "features.npy", "index.jsonl", "settings.json"
    ]  # fmt: skip


def test_resumes(tmp_path):
    with opened(tmp_path) as folder:
        put(folder, 1)
        put(folder, 3)
    assert not (tmp_path / "features.npy").exists()
    with (tmp_path / "partial" / "done.jsonl").open("a") as log:
        log.write('{"items": [0], "su')  # A kill in the middle of a line.
    with opened(tmp_path) as folder:
        assert folder.missing.tolist() == [0, 2]
        put(folder, 0)
    with opened(tmp_path) as folder:  # The line behind the torn one counts.
        assert folder.missing.tolist() == [2]
        put(folder, 2)
        folder.finish()
    np.testing.assert_array_equal(np.load(tmp_path / "features.npy"), np.concatenate(VALUES))
    with opened(tmp_path) as folder:
        assert folder.complete
        assert not len(folder.missing)


def test_rows_that_are_not_as_written_are_done_again(tmp_path):
    with opened(tmp_path) as folder:
        put(folder, 0, 1, 2)
    array = np.load(tmp_path / "partial" / "features.npy", mmap_mode="r+")
    array[2] += 1
    array.flush()
    with opened(tmp_path) as folder:
        assert folder.missing.tolist() == [1, 3]
    (tmp_path / "partial" / "features.npy").write_bytes(b"")
    with opened(tmp_path) as folder:
        assert folder.missing.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("line", ["[]", "{}", "3", '{"items": 4}', '{"items": ["x"], "sums": [1], '
    '"sizes": [null], "errors": [null]}', '{"items": [99], "sums": [1], "sizes": [null], "errors": '
    '[null]}', "\x00"])  # fmt: skip
def test_a_log_of_something_else_is_not_believed(line, tmp_path):
    with opened(tmp_path) as folder:
        put(folder, 0)
    with (tmp_path / "partial" / "done.jsonl").open("a") as log:
        log.write(line + "\n")
    with opened(tmp_path) as folder:
        assert folder.missing.tolist() == [1, 2, 3]


def test_what_failed_has_no_rows(tmp_path):
    with opened(tmp_path) as folder:
        put(folder, 0, 3)
        folder.write([1], [None], [Item(None, "b is broken")])
        assert folder.failed == {1: "b is broken"}
    with opened(tmp_path) as folder:  # It is tried again,
        assert folder.missing.tolist() == [1, 2]
        folder.write([1], [None], [Item(None, "b is broken")])
        put(folder, 2)
        folder.finish()
    kept = np.concatenate([VALUES[n] for n in (0, 2, 3)])
    np.testing.assert_array_equal(np.load(tmp_path / "features.npy"), kept)
    index = read_index(tmp_path)
    assert [line["row"] for line in index] == [0, None, 1, 3]
    assert index[1]["error"] == "b is broken"
    with opened(tmp_path) as folder:  # but not once all is done.
        assert folder.complete
        assert folder.failed == {1: "b is broken"}


def test_refusals(tmp_path):
    with opened(tmp_path / "one") as folder:
        put(folder, 0)
        with pytest.raises(UserError, match='what "patches" → "cls"'):
            opened(tmp_path / "one", {"what": "cls", "size": None})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"not empty and holds no embeddings .*thesis\.tex"):
        opened(tmp_path / "full")
    assert os.listdir(tmp_path / "full") == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"):
        opened(tmp_path / "full" / "thesis.tex")
    (tmp_path / "one" / "settings.json").write_text("no")
    with pytest.raises(UserError, match="cannot be read"):
        opened(tmp_path / "one")
    with pytest.raises(UserError, match="no complete embeddings"):
        read_index(tmp_path / "one")


def test_one_process_at_a_time(tmp_path):
    with opened(tmp_path) as folder:
        put(folder, 0)
        other = (
            "import sys, numpy as np\n"
            "from common.data.embedding_folder import EmbeddingFolder\n"
            "EmbeddingFolder(sys.argv[1], {}, ['a'], np.ones(1), (2,), np.float32)"
        )
        found = subprocess.run(
            [sys.executable, "-c", other, tmp_path], capture_output=True, text=True, cwd=ROOT
        )
        assert "another process is writing" in found.stderr


def test_settings_are_kept_as_json(tmp_path):
    with opened(tmp_path, {"pair": (1, 2)}):
        pass
    with opened(tmp_path, {"pair": (1, 2)}):
        pass
    assert json.loads((tmp_path / "settings.json").read_text()) == {"pair": [1, 2]}
