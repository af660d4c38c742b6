"""Tokenizers of .gguf files: the same ids as the tokenizers they were made from."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from gguf_writer import gguf_bytes
from sentencepiece import sentencepiece_model_pb2
from tokenizers import models, pre_tokenizers, trainers

from common.checkpoint.gguf import open_gguf_file
from common.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer
from common.data.tokenizers_gguf import SPLITTINGS, gguf_tokenizer
from common.errors import UserError

STDLIB = Path(sysconfig.get_paths()["stdlib"])
PROSE = (STDLIB / "argparse.py").read_text()
TEXTS = [
    "",
    " ",
    PROSE[:5000],
    "  two spaces,\ttab\n\n\nnaïve 日本語 🤖 e\u0301",
    "it's 1234567 OK'S",
    "<|im_start|>user<end_of_turn>",
    "▁ ▁▁ a▁",
    " " * 30,
]


@pytest.fixture
def read(tmp_path):
    def read_metadata(metadata):
        path = tmp_path / "model.gguf"
        path.write_bytes(gguf_bytes(metadata, {}))
        return gguf_tokenizer(open_gguf_file(path))

    return read_metadata


@pytest.fixture(scope="module")
def proto():
    """A SentencePiece model with what Gemma's has: named turns, and pieces found in any text."""
    trained = SentencePieceTokenizer.train([PROSE], 600)
    proto = sentencepiece_model_pb2.ModelProto.FromString(trained._model)
    known = {piece.piece for piece in proto.pieces}
    for text in {"<start_of_turn>", "<end_of_turn>", "<table>", "▁" * 3, "▁" * 9} - known:
        proto.pieces.add(piece=text, score=0.0, type=4)
    return proto


def piece_metadata(proto, **changed):
    """What llama.cpp's converter writes of a SentencePiece model."""
    control = ("<start_of_turn>", "<end_of_turn>")
    kinds = [3 if piece.piece in control else piece.type for piece in proto.pieces]
    spelt = [
        piece.piece.replace("▁", " ") if piece.type == 4 else piece.piece for piece in proto.pieces
    ]
    scores = [piece.score for piece in proto.pieces]
    metadata = {
        "model": "llama",
        "tokens": spelt,
        "scores": np.array(scores, "<f4"),
        "token_type": np.array(kinds, "<i4"),
        "bos_token_id": 2,
        "eos_token_id": 1,
        "unknown_token_id": 3,
        "padding_token_id": 0,
        "add_space_prefix": proto.normalizer_spec.add_dummy_prefix,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in (metadata | changed).items()}
    return metadata | {"tokenizer.chat_template": "{{ bos }}"}


@pytest.mark.parametrize("prefix", [False, True])
def test_pieces_give_the_ids_of_their_model(read, proto, prefix):
    proto = sentencepiece_model_pb2.ModelProto.FromString(proto.SerializeToString())
    proto.normalizer_spec.add_dummy_prefix = prefix
    original = SentencePieceTokenizer(proto.SerializeToString())
    found = read(piece_metadata(proto))
    assert found.vocab_size == original.vocab_size
    assert (found.pad_id, found.eos_id, found.bos_id) == (0, 1, 2)
    assert found.special_tokens == original.special_tokens
    assert found.stop_tokens == (1, original.special_tokens["<end_of_turn>"])
    assert found.chat_template == "{{ bos }}"
    for text in TEXTS:
        ids = found.encode(text)
        assert ids == original.encode(text)
        assert found.decode(ids) == text
        assert not set(ids) & set(found.special_tokens.values())
    assert found.encode_batch(TEXTS) == [found.encode(text) for text in TEXTS]


def test_a_prefix_once_however_often_a_text_is_cut(proto):
    proto = sentencepiece_model_pb2.ModelProto.FromString(proto.SerializeToString())
    proto.normalizer_spec.add_dummy_prefix = True
    found = SentencePieceTokenizer(proto.SerializeToString())
    turn = found.special_tokens["<end_of_turn>"]
    ids = found.encode("self<end_of_turn>self", special=True)
    assert ids.count(turn) == 1
    assert found.decode(ids) == "selfself"
    assert found.decode(ids, skip_special=False) == "self<end_of_turn>self"
    assert found.decode(found.encode(" self")) == " self"


def test_special_names_in_gemmas_own_file_are_text(proto):
    """Its user-defined pieces, that is, which the library finds wherever they stand."""
    found = SentencePieceTokenizer(proto.SerializeToString())
    assert found.decode(found.encode("<end_of_turn>")) == "<end_of_turn>"
    assert len(found.encode("<end_of_turn>")) > 1
    assert len(found.encode("<end_of_turn>", special=True)) == 1
    assert len(found.encode("<table>")) == 1


def test_no_beginning_where_the_file_says_so(read, proto, tmp_path):
    found = read(piece_metadata(proto, add_bos_token=False))
    assert (found.bos_id, found.eos_id) == (-1, 1)
    assert found.special_tokens["<bos>"] == 2
    found.save(tmp_path / "tokenizer.model")
    again = load_tokenizer(tmp_path / "tokenizer.model")
    assert isinstance(again, SentencePieceTokenizer)
    assert (again.bos_id, again.encode(PROSE)) == (-1, found.encode(PROSE))


@pytest.fixture(scope="module")
def library():
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    library.train_from_iterator(PROSE.splitlines(keepends=True), trainer)
    return library


def pair_metadata(library, **changed):
    model = json.loads(library.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": np.array([3] * 3 + [1] * (len(tokens) - 3), "<i4"),
        "merges": [" ".join(merge) for merge in model["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {
        f"tokenizer.ggml.{key}": value
        for key, value in (metadata | changed).items()
        if value is not None
    }


def test_pairs_give_the_ids_of_their_tokenizer(read, library, tmp_path):
    found = read(pair_metadata(library))
    assert isinstance(found, HuggingFaceTokenizer)
    assert (found.bos_id, found.eos_id, found.pad_id) == (-1, 2, -1)
    assert found.stop_tokens == (0, 2)
    for text in TEXTS:
        ids = found.encode(text)
        if "<|" not in text:
            assert ids == library.encode(text).ids
        assert found.decode(ids) == text
        assert not set(ids) & {0, 1, 2}
    assert found.encode("<|im_end|>", special=True) == [2]
    from_file = load_tokenizer(tmp_path / "model.gguf")
    assert from_file.fingerprint() == found.fingerprint()
    found.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint() == found.fingerprint()


def test_beginnings(read, library, tmp_path):
    assert read(pair_metadata(library, pre="llama-bpe")).bos_id == 1
    assert read(pair_metadata(library, pre="llama-bpe", add_bos_token=False)).bos_id == -1
    assert read(pair_metadata(library, pre="llama-bpe", bos_token_id=None)).bos_id == -1
    found = read(pair_metadata(library, add_bos_token=True))
    assert found.bos_id == 1
    found.save_huggingface(tmp_path / "exported")
    assert load_tokenizer(tmp_path / "exported").bos_id == 1


WORDS = {
    "gpt-2": ["it", "'s", " 12345", " OK", "'", "S", "  ", " a", "\n", "\n", "b"],
    "smollm": ["it", "'s", " ", "1", "2", "3", "4", "5", " OK", "'", "S", "  ", " a", "\n", "\n"],
    "llama-bpe": ["it", "'s", " ", "123", "45", " OK", "'S", "  ", " a", "\n\n", "b", "!\n"],
    "qwen2": ["it", "'s", " ", "1", "2", "3", "4", "5", " OK", "'S", "  ", " a", "\n\n", "b"],
    "tekken": ["it", "'s", " ", "1", "2", "3", "4", "5", " OK", "'S", "  ", " a", "\n\n", "b"],
}


@pytest.mark.parametrize("rule", WORDS)
def test_texts_are_cut_into_words(read, library, rule):
    words = read(pair_metadata(library, pre=rule))._library.pre_tokenizer
    found = words.pre_tokenize_str("it's 12345 OK'S   a\n\nb!\n")
    spelt = [word.replace("Ġ", " ").replace("Ċ", "\n") for word, _ in found]
    assert spelt[: len(WORDS[rule])] == WORDS[rule]


@pytest.mark.parametrize("rule", SPLITTINGS)
def test_every_rule_is_lossless(read, library, rule):
    found = read(pair_metadata(library, pre=rule))
    for text in TEXTS:
        assert found.decode(found.encode(text)) == text


BAD_PAIRS = {
    "another kind": ({"model": "rwkv"}, "of the kind 'rwkv'"),
    "unknown rule": ({"pre": "smolm"}, "by the rule 'smolm', which is not known here; did you"),
    "no rule": ({"pre": None}, "by the rule 'default'"),
    "no tokens": ({"tokens": []}, "a tokenizer of 0 tokens"),
    "tokens are numbers": ({"tokens": np.zeros(3, "<f4")}, "not a list of texts"),
    "tokens twice": ({"tokens": ["a", "a"]}, "lists a token of its tokenizer twice"),
    "kinds missing": ({"token_type": np.zeros(3, "<i4")}, "tokens but 3 kinds of tokens"),
    "kinds are texts": ({"token_type": ["a"]}, "not an array of numbers"),
    "merge of one": ({"merges": ["ab"]}, "the merge 'ab', which is not two tokens"),
    "merge of three": ({"merges": ["a b c"]}, "which is not two tokens"),
    "merge of nothing": ({"merges": ["a ☃"]}, "merges into or from '☃'"),
    "merge into nothing": ({"merges": ["! !"]}, "merges into or from '!!'"),
    "end beyond": ({"eos_token_id": 10**6}, "eos_token_id is 1000000, but there are 800 tokens"),
    "end negative": ({"eos_token_id": -1}, "not a count"),
    "flag of another kind": ({"add_bos_token": "yes"}, "not true or false"),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_hostile_pairs_are_one_clear_line(read, library, case):
    changed, message = BAD_PAIRS[case]
    with pytest.raises(UserError) as caught:
        read(pair_metadata(library, **changed))
    assert message in str(caught.value)
    assert "model.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_PIECES = {
    "no scores": ({"scores": np.zeros(2, "<f4")}, "tokens but 2 scores"),
    "scores are texts": ({"scores": ["a"]}, "not an array of numbers"),
    "beginning beyond": ({"bos_token_id": 10**6}, "bos_token_id is 1000000"),
    "kinds of no kind": ({"token_type": np.full(605, 77, "<i4")}, "of the unknown kind 77"),
    "all unknown": ({"token_type": np.full(605, 2, "<i4")}, "SentencePiece"),
    "an empty piece": ({"tokens": ["<s>", "", "</s>"]}, "tokens but"),
}


@pytest.mark.parametrize("case", BAD_PIECES)
def test_hostile_pieces_are_one_clear_line(read, proto, case):
    changed, message = BAD_PIECES[case]
    changed = {k: v[: len(proto.pieces)] if k == "token_type" else v for k, v in changed.items()}
    with pytest.raises(UserError) as caught:
        read(piece_metadata(proto, **changed))
    assert message in str(caught.value)
    assert "model.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_tokenizer_at_all(read):
    with pytest.raises(UserError, match=r"lacks the metadata tokenizer\.ggml\.model"):
        read({"general.architecture": "llama"})
