"""tokenizer.json and its neighbours: lossless, special only when asked, hostile files refused."""

import json
import sysconfig
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from common.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from common.errors import UserError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}{{ 1/0 }}{% endfor %}"
STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def library():
    """Byte-level pairs trained on Python's own prose, as SmolLM2's are cut."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        show_progress=False,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = (STDLIB / "argparse.py").read_text()
    library.train_from_iterator(text.splitlines(keepends=True), trainer)
    library.add_tokens([AddedToken("<table>", normalized=False)])
    return library


def write_folder(folder, library, config=None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(library.to_str())
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


CONFIG = {
    "bos_token": "<|im_start|>",
    "eos_token": {"content": "<|im_end|>", "special": True},
    "pad_token": "<|im_end|>",
    "chat_template": TEMPLATE,
}


@pytest.fixture(scope="module")
def tokenizer(library, tmp_path_factory):
    return load_tokenizer(write_folder(tmp_path_factory.mktemp("hf"), library, CONFIG))


def check_lossless(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert not set(tokenizer.special_tokens.values()) & set(ids)


@given(text=st.text(st.characters(codec="utf-8")))
def test_any_text_comes_back_of_bytes(tokenizer, text):
    check_lossless(tokenizer, text)


def test_a_megabyte_comes_back(tokenizer):
    names = ["pydoc_data/topics.py", "turtle.py", "unicodedata.py", "test/test_unicodedata.py"]
    paths = [STDLIB / name for name in names] + sorted(STDLIB.glob("*.py"))
    text = "".join(path.read_bytes().decode() for path in paths if path.exists())
    text += "".join(map(chr, [*range(0xD800), *range(0xE000, 0x30000)]))
    text = text[-1_000_000:]
    assert len(text.encode()) >= 1_000_000
    check_lossless(tokenizer, text)


def test_special_tokens_only_when_asked(tokenizer):
    text = "<|im_start|>user\nhi<|im_end|>"
    check_lossless(tokenizer, text)
    marked = tokenizer.encode(text, special=True)
    start, end = (tokenizer.special_tokens[name] for name in SPECIAL[1:])
    assert (marked[0], marked[-1]) == (start, end)
    assert marked[1:-1] == tokenizer.encode("user\nhi")
    assert tokenizer.decode(marked) == "user\nhi"
    assert tokenizer.decode(marked, skip_special=False) == text
    # What the vocabulary adds without calling it special is text.
    assert tokenizer.decode(tokenizer.encode("a<table>b")) == "a<table>b"
    assert len(tokenizer.encode("<table>")) == 1


def test_roles(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.special_tokens == {text: number for number, text in enumerate(SPECIAL)}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (-1, 2, 2)
    assert tokenizer.stop_tokens == (0, 2)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.vocab_size == 801
    assert tokenizer.decode([*tokenizer.encode("é"), 801, -1, 2]) == "é\ufffd\ufffd"


def test_beginning_of_a_post_processor_or_a_flag(library, tmp_path):
    named = load_tokenizer(write_folder(tmp_path / "a", library, CONFIG | {"add_bos_token": True}))
    assert named.bos_id == 1
    copy = tokenizers.Tokenizer.from_str(library.to_str())
    copy.post_processor = processors.TemplateProcessing(
        single=["<|endoftext|>", "$A", "<|im_end|>"],
        special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)],
    )
    assert load_tokenizer(write_folder(tmp_path / "b", copy)).bos_id == 0
    copy.post_processor = processors.TemplateProcessing(
        single=["$A", "<|im_end|>"], special_tokens=[("<|im_end|>", 2)]
    )
    assert load_tokenizer(write_folder(tmp_path / "c", copy, CONFIG)).bos_id == -1


def test_batch_is_one_by_one(tokenizer):
    texts = ["", "a", "naïve 日本語", "x" * 3000, "<|im_end|>"]
    for threads in (1, 2, None):
        assert tokenizer.encode_batch(texts, threads) == [tokenizer.encode(t) for t in texts]


def test_saved_and_exported(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.model")
    tokenizer.save_huggingface(tmp_path / "exported")
    for again in (load_tokenizer(tmp_path), load_tokenizer(tmp_path / "exported")):
        assert again.fingerprint() == tokenizer.fingerprint()
        assert again.chat_template == TEMPLATE
        assert again.stop_tokens == tokenizer.stop_tokens
    assert ByteTokenizer().fingerprint() != tokenizer.fingerprint()


def test_half_a_surrogate_is_refused(tokenizer):
    for call in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(UserError, match="character 1"):
            call("a\ud800")


def test_templates_beside_and_in_lists(library, tmp_path):
    folder = write_folder(tmp_path / "a", library, {})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert load_tokenizer(folder).chat_template == TEMPLATE
    several = [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    folder = write_folder(tmp_path / "b", library, {"chat_template": several})
    assert load_tokenizer(folder).chat_template == TEMPLATE


def model(**fields) -> dict:
    return {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []} | fields}


HOSTILE = {
    "not JSON": (b"{nope", "neither JSON nor SentencePiece"),
    "deep": (b'{"a":' * 100_000, "neither JSON nor SentencePiece"),
    "not UTF-8": (b'{"\xff": 1}', "neither JSON nor SentencePiece"),
    "another JSON": (b'{"a": 1}', "JSON of a kind that is not read here"),
    "no such model": (json.dumps({"model": {"type": "Magic"}}), "not one that the tokenizers"),
    "merge of nothing": (json.dumps(model(merges=["a b"])), "not one that the tokenizers"),
    "id too large": (json.dumps(model(vocab={"a": 4_000_000_000})), "which cannot be"),
    "id negative": (json.dumps(model(vocab={"a": -1})), "not one that the tokenizers"),
    "empty": (json.dumps(model(vocab={})), "which cannot be"),
    "a beginning that is not there": (
        json.dumps(
            model()
            | {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
                    "pair": [],
                    "special_tokens": {},
                }
            }
        ),
        "not one that the tokenizers",
    ),
    "saved, without parts": (
        json.dumps({"format": "tenfold-tokenizer", "version": 1}),
        "is damaged",
    ),
    "saved, roles of another kind": (
        json.dumps(
            {
                "format": "tenfold-tokenizer",
                "version": 1,
                "roles": {"bos": 1, "eos": None, "pad": None, "chat_template": None},
                "tokenizer": model(),
            }
        ),
        "is damaged",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tokenizer_json_is_one_clear_line(case, tmp_path):
    data, message = HOSTILE[case]
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hostile_config(library, tmp_path):
    folder = write_folder(tmp_path / "a", library, CONFIG | {"eos_token": "<nowhere>"})
    with pytest.raises(UserError, match="'<nowhere>' as its end"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(UserError, match="not a JSON object"):
        load_tokenizer(folder)
    odd = {"eos_token": 5, "bos_token": [1], "chat_template": 3, "add_bos_token": "yes"}
    tokenizer = load_tokenizer(write_folder(tmp_path / "b", library, odd))
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.chat_template) == (-1, -1, None)


def test_damaged_json_never_crashes(library, tmp_path):
    data = bytearray(library.to_str().encode())
    path = tmp_path / "tokenizer.json"
    for seed in range(60):
        damaged = bytearray(data)
        damaged[seed * 7919 % len(data)] ^= 1 + seed * 37 % 255
        path.write_bytes(damaged if seed % 3 else damaged[: len(damaged) * seed // 60])
        try:
            assert isinstance(load_tokenizer(path), HuggingFaceTokenizer)
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017


@pytest.fixture(scope="module")
def pieces():
    text = [(STDLIB / "argparse.py").read_text()]
    return SentencePieceTokenizer.train(text, 400)


def test_a_folder_of_both_gives_the_json(library, pieces, tmp_path):
    pieces.save_huggingface(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["bos_token"] == "<bos>"
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    write_folder(tmp_path, library, CONFIG)
    assert isinstance(load_tokenizer(tmp_path), HuggingFaceTokenizer)


def test_a_folder_without_beginnings(pieces, tmp_path):
    pieces.save_huggingface(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    found = load_tokenizer(tmp_path)
    assert (found.bos_id, pieces.bos_id) == (-1, 2)
    found.save(tmp_path / "saved.model")
    assert load_tokenizer(tmp_path / "saved.model").bos_id == -1
    assert found.encode("def f():") == pieces.encode("def f():")
