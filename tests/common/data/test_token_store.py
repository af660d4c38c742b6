"""Tokenised corpora on disk: equal to the documents, reused, repaired, safe for many processes."""

import multiprocessing
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from common.data import token_store
from common.data.corpus import CorpusConfig, open_corpus
from common.data.token_store import TokenStore, tokenize
from common.data.tokenizers import ByteTokenizer
from common.errors import UserError


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(f"document {i} é\n" * (i % 4))
    return folder


def source_of(folder):
    return open_corpus(CorpusConfig("text", str(folder), split="all"))


def texts_of(folder):
    return [text for path in sorted(folder.iterdir()) if (text := path.read_text())]


class CountingTokenizer(ByteTokenizer):
    """Counts the texts it is given."""

    def __init__(self):
        self.texts = 0

    def encode_batch(self, texts, threads=None):
        self.texts += len(texts)
        return super().encode_batch(texts, threads)


def check_equal(store, folder):
    tokenizer = ByteTokenizer()
    texts = texts_of(folder)
    assert len(store) == len(texts)
    for i, text in enumerate(texts):
        assert store[i].tolist() == [2, *tokenizer.encode(text), 1]


def test_holds_the_documents_and_is_reused(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "_BATCH_CHARACTERS", 100)
    tokenizer, calls = CountingTokenizer(), []
    for _ in range(2):
        store = tokenize(
            source_of(corpus), tokenizer, tmp_path / "c", progress=lambda *now: calls.append(now)
        )
        check_equal(store, corpus)
    assert tokenizer.texts == len(texts_of(corpus))
    assert store.tokens.dtype == np.uint16
    assert len(calls) >= 4
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][1] == len(source_of(corpus))


def test_a_changed_corpus_or_tokenizer_is_tokenised_anew(corpus, tmp_path):
    tokenize(source_of(corpus), ByteTokenizer(), tmp_path / "c")
    (corpus / "00.txt").write_text("changed")
    check_equal(tokenize(source_of(corpus), ByteTokenizer(), tmp_path / "c"), corpus)

    class Upper(ByteTokenizer):
        vocab_size = 70_000

        def fingerprint(self):
            return "upper"

    store = tokenize(source_of(corpus), Upper(), tmp_path / "c")
    assert store.tokens.dtype == np.uint32
    assert store.vocab_size == 70_000


def stores_in(cache):
    return [path for path in Path(cache).iterdir() if path.is_dir()]


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "cut tokens": lambda folder: (folder / "tokens.bin").write_bytes(b"12"),
    "odd size": lambda folder: (folder / "tokens.bin").write_bytes(b"123"),
    "no tokens": lambda folder: (folder / "tokens.bin").unlink(),
    "flipped token": lambda folder: flip(folder / "tokens.bin", 100),
    "flipped offset": lambda folder: flip(folder / "offsets.bin", 16),
    "empty header": lambda folder: (folder / "store.json").write_text(""),
    "strange header": lambda folder: (folder / "store.json").write_text('{"format": 1, "x": 2}'),
    "list header": lambda folder: (folder / "store.json").write_text("[1]"),
    "gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_made_again(corpus, tmp_path, damage):
    cache = tmp_path / "c"
    tokenize(source_of(corpus), ByteTokenizer(), cache)
    (folder,) = stores_in(cache)
    DAMAGES[damage](folder)
    tokenizer = CountingTokenizer()
    check_equal(tokenize(source_of(corpus), tokenizer, cache), corpus)
    assert tokenizer.texts
    assert stores_in(cache) == [folder]


def test_leftovers_of_a_killed_process_are_removed(corpus, tmp_path):
    cache = tmp_path / "c"
    tokenize(source_of(corpus), ByteTokenizer(), cache)
    (folder,) = stores_in(cache)
    shutil.rmtree(folder)
    (cache / f".{folder.name}-dead").mkdir()
    tokenize(source_of(corpus), ByteTokenizer(), cache)
    assert stores_in(cache) == [folder]


class SlowTokenizer(CountingTokenizer):
    def encode_batch(self, texts, threads=None):
        time.sleep(0.3)
        return super().encode_batch(texts, threads)


def _tokenize_and_report(folder, cache, queue):
    tokenizer = SlowTokenizer()
    store = tokenize(source_of(folder), tokenizer, cache)
    queue.put((tokenizer.texts, int(store.tokens.astype(np.int64).sum())))


def test_of_several_processes_one_does_the_work(corpus, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (corpus, tmp_path / "c", queue)
    workers = [context.Process(target=_tokenize_and_report, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(texts for texts, _ in results) == [0, 0, len(texts_of(corpus))]
    assert len({total for _, total in results}) == 1


def test_damaged_records_are_left_out_within_the_budget(corpus, tmp_path):
    (corpus / "03.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"03\.txt.*not UTF-8"):
        tokenize(source_of(corpus), ByteTokenizer(), tmp_path / "c")
    assert not stores_in(tmp_path / "c")
    store = tokenize(source_of(corpus), ByteTokenizer(), tmp_path / "c", error_budget=1)
    assert store.skipped == 1
    (corpus / "03.txt").unlink()
    check_equal(store, corpus)


def test_cache_that_cannot_be_written(corpus, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot keep tokens in"):
        tokenize(source_of(corpus), ByteTokenizer(), tmp_path / "file")


def test_target_counts():
    store = TokenStore.of([[2, 5, 5, 1], [], [2], [2, 7, 1]], 10)
    assert store.target_counts().tolist() == [0, 2, 0, 0, 0, 2, 0, 1, 0, 0]
    assert len(store) == 4
    with pytest.raises(IndexError):
        store[4]
