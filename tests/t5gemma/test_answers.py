"""Answers of an encoder-decoder: greedy, drawn, searched; alone and together; by command line."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from golden_model import CONFIG, randomised

import t5gemma
from common import generate
from common.data.tokenizers import ByteTokenizer
from common.errors import UserError
from common.models import Decoder
from t5gemma import generate as launcher
from t5gemma.config import smoke_model

pytestmark = pytest.mark.usefixtures("highest_precision")

VOCAB, NEW = 40, 6
PROMPTS = [[5, 9, 13, 17, 21, 25, 29, 33, 37], [7], [7, 11, 4, 8, 12]]
OPTIONS = {
    "greedy": {},
    "drawn": {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "seed": 3},
    "searched": {"num_beams": 3},
}


@pytest.fixture(scope="module")
def model():
    return randomised(CONFIG.with_stacks(window=4, max_length=32))


@pytest.fixture(scope="module")
def decoder():
    """A decoder-only model, which searches with the same code."""
    return Decoder(CONFIG.encoder, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("how", OPTIONS)
def test_a_row_does_not_depend_on_its_neighbours(model, how):
    options = {"max_new_tokens": NEW, "stop": [], **OPTIONS[how]}
    together = generate.generate(model, PROMPTS, **options)
    [alone] = generate.generate(model, PROMPTS[:1], **options)
    assert alone.tokens == together[0].tokens
    np.testing.assert_allclose(alone.logprobs, together[0].logprobs, atol=2e-5)
    again = generate.generate(model, PROMPTS, **options)
    assert [g.tokens for g in again] == [g.tokens for g in together]
    if how != "drawn":
        [last] = generate.generate(model, PROMPTS[2:], **options)
        assert last.tokens == together[2].tokens


@jax.jit
def logprobs_of(model, prompts, texts):
    """Log-probabilities `[B, N]` of texts `[B, N]`, teacher-forced."""
    before = np.full((texts.shape[0], 1), CONFIG.bos_token)
    written = jax.numpy.concatenate([before, texts[:, :-1]], axis=1)
    real = np.ones(written.shape, bool)
    logits = model(prompts, written, encoder_valid=prompts >= 0, decoder_valid=real)
    return jax.numpy.take_along_axis(jax.nn.log_softmax(logits), texts[..., None], -1)[..., 0]


@pytest.mark.parametrize("how", OPTIONS)
def test_logprobs_are_the_model_s_own(model, how):
    [got] = generate.generate(model, PROMPTS[:1], max_new_tokens=NEW, stop=[], **OPTIONS[how])
    own = logprobs_of(model, np.array(PROMPTS[:1]), np.array([got.tokens]))
    np.testing.assert_allclose(got.logprobs, own[0], atol=2e-5)


def test_a_beam_for_every_token_finds_the_likeliest_text(model):
    prompts = np.array(PROMPTS[:1])
    pairs = np.stack(np.meshgrid(np.arange(VOCAB), np.arange(VOCAB), indexing="ij"), -1)
    pairs = pairs.reshape(-1, 2)
    scores = np.concatenate(
        [
            logprobs_of(model, np.repeat(prompts, VOCAB, 0), part).sum(-1)
            for part in pairs.reshape(VOCAB, VOCAB, 2)
        ]
    )
    [got] = generate.generate(model, PROMPTS[:1], max_new_tokens=2, stop=[], num_beams=VOCAB)
    assert got.tokens == pairs[scores.argmax()].tolist()
    np.testing.assert_allclose(sum(got.logprobs), scores.max(), atol=2e-5)


def test_beam_search_of_a_decoder(decoder):
    """The likeliest of all texts of two tokens."""
    prompt = PROMPTS[2]
    [got] = generate.generate(decoder, [prompt], max_new_tokens=2, stop=[], num_beams=VOCAB)
    rows = np.concatenate([np.repeat([prompt], VOCAB, 0), np.arange(VOCAB)[:, None]], axis=1)
    logprobs = jax.nn.log_softmax(jax.jit(lambda m, t: m(t))(decoder, rows))
    scores = np.asarray(logprobs[0, -2][:, None] + logprobs[:, -1])
    assert got.tokens == [int(n) for n in np.unravel_index(scores.argmax(), scores.shape)]


@pytest.mark.parametrize("how", ["greedy", "searched"])
def test_stop_tokens_end_an_answer(model, how):
    options = {"max_new_tokens": NEW, **OPTIONS[how]}
    free = generate.generate(model, PROMPTS, stop=[], **options)
    assert all(len(g.tokens) == NEW for g in free)
    stop = free[0].tokens[0]
    stopped = generate.generate(model, PROMPTS, stop=[stop], **options)
    for got in stopped:
        assert stop not in got.tokens[:-1]
        assert got.tokens[-1] == stop or len(got.tokens) == NEW
        assert len(got.logprobs) == len(got.tokens)
    assert stopped[0].tokens == [stop] or how == "searched"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1, not 0"),
        ({"num_beams": 2, "temperature": 1.0}, "leave temperature at 0"),
        ({"num_beams": 2, "early_stopping": "soon"}, "true, false or 'never', not 'soon'"),
        ({"max_new_tokens": 32}, "32 tokens are to come behind the first, more than the model's"),
        ({"prompts": [[5] * 33]}, "prompt 0 has 33 tokens"),
        ({"prompts": [[5], [40]]}, "prompt 1 has token 40"),
        ({"prompts": [[5], []]}, "prompt 1 is empty"),
        ({"prompts": ["text"]}, "needs a tokenizer"),
    ],
)
def test_wrong_arguments(model, options, message):
    options = {"prompts": PROMPTS, "max_new_tokens": 2, **options}
    with pytest.raises(UserError, match=message):
        generate.generate(model, **options)


@pytest.mark.smoke
def test_smoke_of_the_launcher(tmp_path, capsys):
    model = randomised(smoke_model())
    model.tokenizer = ByteTokenizer()
    t5gemma.save(model, tmp_path / "model")
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"prompt": "and another"}\n')
    arguments = [f"--checkpoint={tmp_path / 'model'}", "--max_new_tokens=4"]
    launcher.main([*arguments, f"--prompts={prompts}", f"--output={output}", "--num_beams=2"])
    assert "and another" in capsys.readouterr().out
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["one", "and another"]
    searched = generate.generate(
        t5gemma.load(tmp_path / "model"), ["one", "and another"], 4, num_beams=2
    )
    assert [row["tokens"] for row in rows] == [g.tokens for g in searched]
    for wrong, says in (
        ([], "nothing to continue"),
        ([f"--prompts={prompts}", f"--output={output}"], "exists; nothing is written over"),
        (["--prompt=x", "--num_beams=0"], "num_beams must be at least 1"),
        (["--prompt=x", "--chat"], "no <start_of_turn> token"),
    ):
        with pytest.raises(SystemExit) as stopped:
            launcher.main([*arguments, *wrong])
        said = capsys.readouterr().err
        assert stopped.value.code == 2
        assert says in said
        assert said.count("\n") == 1
