"""A real model: SmolLM2-135M-Instruct out of its .gguf file, tokenizer and all."""

import hashlib
import sysconfig
from pathlib import Path

import jax
import numpy as np
import pytest

from common import generate, models
from common.data.assets import ASSETS, asset
from common.data.tokenizers import load_tokenizer

pytestmark = pytest.mark.parity

SONNET = (
    "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n"
    "Rough winds do shake the darling buds of May,\nAnd summer's lease hath all too short a date;\n"
    "Sometime too hot the eye of heaven shines,\nAnd often is his gold complexion dimm'd;\n"
    "And every fair from fair sometime declines,\nBy chance or nature's changing course untrimm'd."
)
NO_TOKEN = "\x04\x06\x13\x14\x16\x1d"  # Bytes that its vocabulary lacks; the rest has all.
SHAKESPEARE = Path(__file__).parents[3] / "shared" / "data" / "tinyshakespeare.txt"


@pytest.fixture(scope="module")
def path():
    return asset("smollm2-135m")  # `make parity` installs it; the error says how.


@pytest.fixture(scope="module")
def model(path):
    return models.load_decoder(path)


@jax.jit
def nll(model, tokens):
    """`[B, L] -> [B, L - 1]` nats."""
    return model.nll(model.hidden(tokens)[:, :-1], tokens[:, 1:])


def test_the_file_is_the_one_that_was_meant(path):
    assert hashlib.sha256(path.read_bytes()).hexdigest() == ASSETS["smollm2-135m"].sha256


def test_it_knows_the_capital_of_italy(model):
    assert model.config.num_parameters() == 134_515_008
    prompts = ["The capital of Italy is", "2, 4, 6, 8,"]
    rome, numbers = generate.generate(model, prompts, max_new_tokens=4)
    assert rome.text.startswith(" Rome")
    assert numbers.text.startswith(" 10")


def test_it_finds_a_sonnet_as_likely_as_the_reference_does(model):
    tokens = np.array([model.tokenizer.encode(SONNET)])
    assert tokens.shape == (1, 91)
    # What the transformers library makes of the same file.
    assert abs(nll(model, tokens).mean() - 2.6741) < 1e-3


def test_it_answers_in_turns(model):
    start, end = (model.tokenizer.special_tokens[name] for name in ("<|im_start|>", "<|im_end|>"))
    assert (start, end, model.stop_tokens) == (1, 2, (0, 2))
    text = "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    [answer] = generate.generate(
        model, [model.tokenizer.encode(text, special=True)], max_new_tokens=32
    )
    assert "4" in answer.text
    assert answer.tokens[-1] == end
    assert "<|im_start|>" in model.tokenizer.chat_template


def test_a_megabyte_of_text_comes_back(path):
    tokenizer = load_tokenizer(path)
    library = Path(sysconfig.get_paths()["stdlib"])
    names = ["pydoc_data/topics.py", "turtle.py"]
    files = [library / name for name in names] + sorted(library.glob("*.py"))
    text = "".join(file.read_bytes().decode() for file in files if file.exists())
    text += "".join(map(chr, [*range(0xD800), *range(0xE000, 0x30000)]))  # Every script.
    text = text[-1_100_000:].translate(dict.fromkeys(map(ord, NO_TOKEN)))
    if SHAKESPEARE.is_file():
        text += SHAKESPEARE.read_bytes().decode()
    assert len(text.encode()) > 1_000_000
    ids = tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(f"a{NO_TOKEN}b")) == "ab"
    assert tokenizer.decode(ids).encode() == text.encode()
    assert not set(ids) & set(tokenizer.special_tokens.values())


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="the sonnet above checks the same anywhere")
def test_perplexity_of_tiny_shakespeare(model):
    text = SHAKESPEARE.read_text()
    tokens = np.array(model.tokenizer.encode(text[:20_000])[:4096]).reshape(16, 256)
    losses = np.concatenate([nll(model, row[None]) for row in tokens])
    assert abs(np.exp(losses.mean()) - 57.6) < 0.1
