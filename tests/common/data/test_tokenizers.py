"""Tokenizers: nothing lost, hostile files refused."""

import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.data.corpus import CorpusConfig, open_corpus
from common.data.sources import sample_documents
from common.data.tokenizers import (
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    check_vocabulary,
    load_tokenizer,
)
from common.errors import UserError

pytest.importorskip("sentencepiece")


@pytest.fixture(scope="module")
def sample():
    return list(sample_documents(open_corpus(CorpusConfig(parts=("source",))), 300_000))


@pytest.fixture(scope="module")
def trained(sample):
    return SentencePieceTokenizer.train(sample, 1000)


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request, trained):
    return trained if request.param == "sentencepiece" else ByteTokenizer()


AWKWARD = [
    "",
    " ",
    "  leading\tand trailing  ",
    "\n\n\n\tx\r\n\r\r\n",
    "▁ ▁▁ a▁",
    "<0x0A><s></s><pad><bos><eos><unk>",
    "\0\x01\x7f",
    "naïve 日本語 🤖👩‍👩‍👧 e\u0301 \ufeff\u200b\u2028",
    "ＦＵＬＬ ｗｉｄｔｈ ﬁ ①",
    "x" * 10_000,
    " " * 999,
]


def check_lossless(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert not {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids)


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_comes_back(tokenizer, text):
    check_lossless(tokenizer, text)


@given(text=st.text(st.characters(codec="utf-8")))
@example(text="▁")
def test_any_text_comes_back(tokenizer, text):
    check_lossless(tokenizer, text)


def test_real_sources_come_back(tokenizer):
    root = Path(sysconfig.get_paths()["stdlib"])
    names = ["turtle.py", "this.py", "argparse.py", "pydoc_data/topics.py", "unicodedata.py"]
    texts = [(root / name).read_bytes().decode() for name in names if (root / name).exists()]
    assert len(texts) >= 3
    texts += [text.replace("\n", "\r\n").replace("    ", "\t") for text in texts[:2]]
    for text, ids in zip(texts, tokenizer.encode_batch(texts)):
        assert tokenizer.decode(ids) == text


def test_batch_equals_one_by_one(tokenizer):
    texts = [*AWKWARD, "def f(x):\n    return x\n"]
    for threads in (1, 2):
        assert tokenizer.encode_batch(texts, threads) == [tokenizer.encode(t) for t in texts]


def test_special_tokens(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    ids = [2, *tokenizer.encode("a b"), 1, 0, 0]
    assert tokenizer.decode(ids) == "a b"
    assert tokenizer.decode(np.array(ids, np.int32)) == "a b"
    assert tokenizer.decode(ids, skip_special=False) == "<bos>a b<eos><pad><pad>"
    beyond = [tokenizer.vocab_size, -1]
    assert tokenizer.decode(tokenizer.encode("a") + beyond) == "a\ufffd\ufffd"


def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(UserError, match="character 1"):
        tokenizer.encode("a\ud800")


def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "new" / "tokenizer.model"
    tokenizer.save(path)
    for again in (load_tokenizer(path), load_tokenizer(path.parent)):
        assert again.fingerprint() == tokenizer.fingerprint()
        assert again.encode("def f():\n") == tokenizer.encode("def f():\n")
    assert os.listdir(path.parent) == ["tokenizer.model"]


def test_training_repeats_bit_for_bit_and_compresses(trained, sample):
    again = SentencePieceTokenizer.train(iter(sample), 1000)
    assert again.fingerprint() == trained.fingerprint()
    assert trained.vocab_size == 1000
    text = sample[0]
    assert len(trained.encode(text)) < 0.6 * len(text.encode())


@pytest.mark.parametrize(
    ("documents", "size", "message"),
    [([], 1000, "no text"), (["abc"], 1000, "1000 pieces"), (["abc def"], 100, "100 pieces")],
)
def test_training_that_cannot_be(documents, size, message):
    with pytest.raises(UserError, match=message) as caught:
        SentencePieceTokenizer.train(documents, size)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_tokenizer(trained, tmp_path):
    trained.save(tmp_path / "good.model")
    model = (tmp_path / "good.model").read_bytes()
    # Where the last piece ends: cut there, the rest still parses as a model.
    boundary = model.index(b"\x12", len(model) - 2000)
    path = tmp_path / "bad.model"
    contents = [b"", b"hello", b"{}", b"{", model[:1000], model[:-1], model[: len(model) // 2]]
    contents += [model[:cut] for cut in range(boundary - 40, boundary + 40)]
    contents += [model + b"x", bytes(500), b"\xff" * 500]
    for data in contents:
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"bad\.model"):
            load_tokenizer(path)
    for missing in (tmp_path / "nowhere", tmp_path, "a\0b"):
        with pytest.raises(UserError, match="cannot read the tokenizer"):
            load_tokenizer(missing)


def test_vocabulary_check():
    check_vocabulary(ByteTokenizer(), 260)
    check_vocabulary(ByteTokenizer(), 512)
    with pytest.raises(UserError, match="260 tokens but the model only 259"):
        check_vocabulary(ByteTokenizer(), 259)
    with pytest.raises(UserError, match="far from the model's 256000"):
        check_vocabulary(ByteTokenizer(), 256_000)
