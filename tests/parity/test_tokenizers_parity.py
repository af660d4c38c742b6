"""Tokenizers against the transformers library: its folders read here, ours read there."""

import json
import sysconfig
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2

from common.data.tokenizers import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
)

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

PROSE = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text()
TEXTS = [
    PROSE[:3000],
    " self",
    "  two,\t3 tabs\n\n\n",
    "naïve 日本語 🤖 12345",
    "a",
]


@pytest.fixture(scope="module", params=["gemma", "llama"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """A SentencePiece model as we export it: Gemma's kind, or Llama's with its space in front."""
    trained = SentencePieceTokenizer.train([PROSE], 700)
    proto = sentencepiece_model_pb2.ModelProto.FromString(trained._model)
    known = {piece.piece for piece in proto.pieces}
    if family == "gemma":
        for text in sorted({"<start_of_turn>", "<end_of_turn>", "▁" * 4} - known):
            proto.pieces.add(piece=text, score=0.0, type=4)
    proto.normalizer_spec.add_dummy_prefix = family == "llama"
    folder = tmp_path_factory.mktemp(family)
    SentencePieceTokenizer(proto.SerializeToString()).save_huggingface(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def texts(family):
    """Without those that begin with a space, before which its Llama puts no other."""
    return [text for text in TEXTS if family == "gemma" or not text.startswith(" ")]


def test_our_export_gives_the_same_ids_there(folder, reference, texts):
    ours = load_tokenizer(folder)
    assert isinstance(ours, SentencePieceTokenizer)
    for text in texts:
        assert [ours.bos_id, *ours.encode(text)] == reference(text)["input_ids"]


def test_its_folder_gives_the_same_ids_here(folder, reference, texts, tmp_path):
    reference.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    ours = load_tokenizer(folder)
    assert isinstance(again, HuggingFaceTokenizer)
    assert (again.bos_id, again.eos_id, again.pad_id) == (2, 1, 0)
    for text in texts:
        assert again.encode(text) == ours.encode(text) == reference(text)["input_ids"][1:]
        assert again.decode(again.encode(text)) == text
