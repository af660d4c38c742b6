"""Documents by number: order, splits, damage budgets and hostile paths."""

import json
import os

import numpy as np
import pytest

from common.data.corpus import CorpusConfig, open_corpus
from common.data.sources import (
    DamagedRecord,
    DocumentSource,
    HealthyDocuments,
    key_of,
    sample_documents,
    select,
)
from common.errors import UserError


class Numbered(DocumentSource):
    """`size` documents, of which those in `broken` cannot be read."""

    def __init__(self, size, broken=()):
        self.size, self.broken = size, broken

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.broken:
            raise self.damaged(index, "torn")
        return f"document {index}"

    def describe(self, index):
        return f"numbers, record {index}"

    def keys(self):
        return np.array([key_of(str(i)) for i in range(self.size)], np.uint64)

    def fingerprint(self):
        return f"{self.size}{self.broken}"


def text_corpus(path, **settings):
    return open_corpus(CorpusConfig(kind="text", path=str(path), split="all", **settings))


def documents(source):
    return [source[i] for i in range(len(source))]


def test_split_is_disjoint_and_complete():
    source = Numbered(1000)
    train = documents(select(source, "train", 0.1))
    heldout = documents(select(source, "heldout", 0.1))
    assert sorted(train + heldout) == sorted(documents(source))
    assert 60 < len(heldout) < 140


def test_split_does_not_move_when_documents_are_added():
    before = set(documents(select(Numbered(500), "heldout", 0.2)))
    after = set(documents(select(Numbered(600), "heldout", 0.2)))
    assert before == {text for text in after if int(text.split()[1]) < 500}


def test_max_documents_is_spread_over_the_corpus():
    chosen = [int(t.split()[1]) for t in documents(select(Numbered(1000), "train", 0.1, 50))]
    assert len(chosen) == 50
    assert chosen == sorted(chosen)
    assert chosen[25] > 200


@pytest.mark.parametrize(
    ("budget", "passes"), [(0.0, False), (0.02, False), (0.03, True), (3, True)]
)
def test_damage_budget(budget, passes):
    reader = HealthyDocuments(Numbered(100, broken=(7, 50, 99)), budget)
    if passes:
        assert len(list(reader)) == 97
        assert reader.skipped == 3
    else:
        with pytest.raises(UserError, match=r"numbers, record \d+: torn"):
            list(reader)


def test_sample_is_bounded_spread_and_repeatable():
    sample = list(sample_documents(Numbered(1000), 1200))
    assert sum(map(len, sample)) == 1200
    assert sample == list(sample_documents(Numbered(1000), 1200))
    assert max(int(text.split()[1]) for text in sample[:-1]) > 500


def test_text_folder_is_sorted_recursive_and_skips_hidden(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "b" / "1 ü.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "empty.txt").write_text("")
    source = text_corpus(tmp_path)
    assert documents(source) == ["first", "second"]
    assert "1 ü.txt" in source.describe(1)
    assert documents(text_corpus(tmp_path / "**" / "*.txt")) == ["first", "second"]
    assert documents(text_corpus(tmp_path / "b" / "1 ü.txt")) == ["second"]


def test_moving_a_corpus_keeps_its_split(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for i in range(40):
            (tmp_path / name / f"{i}.txt").write_text(str(i))
    first, second = (
        open_corpus(CorpusConfig("text", str(tmp_path / name), heldout_fraction=0.3))
        for name in ("one", "two")
    )
    assert documents(first) == documents(second)
    assert 0 < len(first) < 40


def test_units(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\ntwo\n\n \t\nthree é\r\n\r\nfour".encode())
    assert documents(text_corpus(path, unit="line")) == ["one", "two", " \t", "three é", "four"]
    paragraphs = ["one\r\ntwo", "three é", "four"]
    assert documents(text_corpus(path, unit="paragraph")) == paragraphs
    assert documents(text_corpus(path)) == ["one\r\ntwo\n\n \t\nthree é\r\n\r\nfour"]
    assert text_corpus(path, unit="line").describe(3) == f"{str(path)!r}, line 3"


def test_file_that_is_not_text_is_damage_naming_it(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    source = text_corpus(tmp_path)
    with pytest.raises(DamagedRecord, match=r"b\.txt.*not UTF-8"):
        source[1]
    assert list(HealthyDocuments(source, 1)) == ["fine"]


def test_fingerprint_follows_content_and_settings(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo")
    first = text_corpus(path).fingerprint()
    assert text_corpus(path).fingerprint() == first
    assert text_corpus(path, unit="line").fingerprint() != first
    path.write_text("one\ntwo\nthree")
    assert text_corpus(path).fingerprint() != first


def test_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        json.dumps({"body": "first\n é"}),
        "{broken",
        json.dumps(["list"]),
        json.dumps({"other": "x"}),
        json.dumps({"body": 3}),
        '{"body": "\\ud800"}',
        "[" * 100_000,
        json.dumps({"body": "last"}),
    ]
    path.write_text("\n".join(lines) + "\n")
    source = open_corpus(CorpusConfig("jsonl", str(tmp_path), field="body", split="all"))
    reader = HealthyDocuments(source, 6)
    assert list(reader) == ["first\n é", "last"]
    assert reader.skipped == 6
    with pytest.raises(DamagedRecord, match=r"a\.jsonl', line 3: no field 'body'; it has other"):
        source[3]


@pytest.mark.parametrize(
    "path", ["", "nowhere", "nowhere/*.txt", "a\0b", "/dev/null", "~nobody/x", "[", "folder"]
)
@pytest.mark.parametrize("kind", ["text", "jsonl", "array_record", "parquet", "tfds"])
def test_nothing_to_read_is_one_clear_line(tmp_path, monkeypatch, kind, path):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        open_corpus(CorpusConfig(kind, path))
    assert "\n" not in str(caught.value)


def test_dangling_link_and_loop(tmp_path):
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gone\.txt"):
        text_corpus(tmp_path)
    (tmp_path / "gone.txt").unlink()
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    assert documents(text_corpus(tmp_path)) == ["a"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(UserError, match="permission denied"):
        text_corpus(tmp_path)


def test_name_with_broken_encoding_can_be_reported(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.txt"
    with open(name, "wb") as stream:
        stream.write(b"\xff")
    source = text_corpus(tmp_path)
    with pytest.raises(DamagedRecord) as caught:
        source[0]
    str(caught.value).encode()
    assert source.fingerprint()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "txt"}, "did you mean 'text'"),
        ({"split": "test"}, "train, heldout, all"),
        ({"unit": "word"}, "file, line, paragraph"),
        ({"heldout_fraction": 1.5}, "between 0 and 1"),
        ({"max_documents": 0}, "1 or more"),
        ({"split": "heldout", "heldout_fraction": 0.0}, "no documents in split 'heldout'"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=message):
        open_corpus(CorpusConfig(**{"kind": "text", "path": str(tmp_path)} | settings))
