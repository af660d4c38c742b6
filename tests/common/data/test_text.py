"""From documents to batches in one go."""

import subprocess
import sys

import numpy as np
import pytest

from common.data.corpus import CorpusConfig
from common.data.pipeline import batches, evaluation_batches
from common.data.text import packed_rows, tokenizer_for
from common.data.tokenizers import ByteTokenizer
from common.data.unigram import count_targets, unigram_cross_entropy
from common.errors import UserError


@pytest.fixture
def config():
    return CorpusConfig(parts=("documentation",), heldout_fraction=0.1, max_documents=60)


@pytest.mark.smoke
def test_python_corpus_to_batches(config, tmp_path):
    pytest.importorskip("grain")
    path = tmp_path / "tokenizer.model"
    tokenizer = tokenizer_for(config, 600, path, max_characters=100_000)
    assert tokenizer_for(config, 600, path).fingerprint() == tokenizer.fingerprint()
    rows = packed_rows(config, tokenizer, length=64, cache=tmp_path / "tokens")
    iterator = batches(rows, global_batch=4, seed=0, process_index=0, process_count=1)
    batch = next(iterator)
    iterator.close()
    assert batch["tokens"].shape == (4, 64)
    # A target is the next position's token wherever the segment goes on.
    same = batch["segment_ids"][:, :-1] == batch["segment_ids"][:, 1:]
    same &= batch["segment_ids"][:, 1:] > 0
    assert same.mean() > 0.8
    assert (batch["targets"][:, :-1] == batch["tokens"][:, 1:])[same].all()
    assert len(tokenizer.decode(batch["tokens"][0])) > 64


def test_heldout_loss_of_unigram_is_that_of_all_rows(tmp_path):
    pytest.importorskip("sentencepiece")
    tokenizer, cache = ByteTokenizer(), tmp_path / "tokens"
    splits = [
        packed_rows(
            CorpusConfig(parts=("documentation",), max_documents=40, split=split),
            tokenizer,
            length=128,
            cache=cache,
        )
        for split in ("train", "heldout")
    ]
    train, heldout = (count_targets(rows, tokenizer.vocab_size) for rows in splits)
    loss = unigram_cross_entropy(train, heldout)
    assert 2.5 < loss < 3.8
    scored = sum(
        batch["weights"].sum()
        for batch in evaluation_batches(
            splits[1], global_batch=16, process_index=0, process_count=1
        )
    )
    assert scored == heldout.sum()


def test_tokenizer_of_another_size_is_refused(config, tmp_path):
    ByteTokenizer().save(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="260 tokens"):
        tokenizer_for(config, 32_000, tmp_path / "tokenizer.model")


def test_importing_asks_for_no_optional_library():
    """A machine without grain and the record readers can import and pack."""
    code = (
        "import sys\n"
        "import common.data, common.data.text, common.data.pipeline, common.data.synthetic\n"
        "absent = {'grain', 'sentencepiece', 'array_record', 'tensorflow_datasets', 'pyarrow'}\n"
        "assert not absent & set(sys.modules), absent & set(sys.modules)\n"
        "assert 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rows_are_the_same_every_time(config, tmp_path):
    first, second = (
        packed_rows(config, ByteTokenizer(), length=32, cache=tmp_path / name) for name in "ab"
    )
    indices = np.arange(0, len(first), 7)
    for name, array in first.batch(indices).items():
        np.testing.assert_array_equal(array, second.batch(indices)[name])
