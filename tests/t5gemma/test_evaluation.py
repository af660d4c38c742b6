"""`python -m t5gemma.evaluate`, and the scores behind it."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

import t5gemma
from common.data.tokenizers import ByteTokenizer
from common.errors import UserError
from common.generate import generate
from t5gemma import evaluate, train
from t5gemma.config import T5GemmaConfig, smoke_model
from t5gemma.evaluation import reference_loss, score_answers, score_text
from t5gemma.instruction import Instruction, Pair
from t5gemma.ul2 import UL2Tokens

TOKENIZER = ByteTokenizer()
TRANSFORM = Instruction(TOKENIZER)


def small_config() -> T5GemmaConfig:
    config = smoke_model().with_stacks(vocab_size=TOKENIZER.vocab_size + 64, num_layers=1)
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, mlp_width=32))


@pytest.fixture(scope="module")
def model():
    model = t5gemma.T5Gemma(small_config(), rngs=nnx.Rngs(0))
    model.tokenizer, model.stop_tokens = TOKENIZER, (TOKENIZER.eos_id,)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    t5gemma.save(model, path)
    return path


LOGITS = jax.jit(lambda model, encoder, decoder: model(encoder, decoder))


def nll_of(model, encoder, targets):
    """Of each target, a single row at a time, from the logits."""
    decoder = np.array([[model.config.bos_token, *targets[:-1]]])
    logits = np.asarray(LOGITS(model, np.array([encoder]), decoder), np.float64)[0]
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return -logits[np.arange(len(targets)), targets]


@pytest.mark.parametrize("special", [None, UL2Tokens((260, 261, 262), 323, 61)])
def test_text_is_scored_piece_by_piece(model, special):
    documents = [TOKENIZER.encode("a document"), TOKENIZER.encode("and another one, longer")]
    stream = documents[0] + documents[1]
    score = score_text(
        model, documents, prefix=6, continuation=4, tokens=12, batch=2, special=special
    )
    expected = []
    for start in (0, 10, 20):
        prefix, rest = stream[start : start + 6], stream[start + 6 : start + 10]
        if special is None:
            expected.append(nll_of(model, [2, *prefix], rest))
        else:
            encoder = [2, special.modes[1], *prefix, special.first_sentinel]
            expected.append(nll_of(model, encoder, [special.first_sentinel, *rest])[1:])
    nll = np.concatenate(expected)
    assert score.tokens == 12
    assert score.loss == pytest.approx(nll.mean(), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nll.mean() / math.log(2), rel=1e-5)
    with pytest.raises(UserError, match="33 tokens, too few for a piece of 40"):
        score_text(model, documents, prefix=20, continuation=20)


def test_references_are_scored_to_their_end(model):
    pairs = [Pair("why", "so", "1"), Pair("a longer question", "an answer", "2")]
    nll = []
    for encoder, targets in map(TRANSFORM.map, pairs):
        nll.append(nll_of(model, encoder.tolist(), targets.tolist()))
    expected = np.concatenate(nll).mean()
    assert reference_loss(model, pairs, TRANSFORM, batch=2) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_answers_stand_by_their_prompts(model, num_beams):
    """Whatever order they are generated in, an answer is that of its prompt alone."""
    prompts = ["a question of some length", "b", "another question", "c d e"]
    options = {"max_new_tokens": 6, "num_beams": num_beams}
    pairs = [Pair(prompt, "x", "") for prompt in prompts]
    answers = score_answers(model, pairs, TRANSFORM, batch=2, **options).answers
    for pair, answer in zip(pairs, answers, strict=True):
        alone = generate(model, [TRANSFORM.map(pair).encoder.tolist()], 6, num_beams=num_beams)
        assert alone[0].text == answer
    # What the model says itself matches; an empty answer is no reference.
    own = [dataclasses.replace(p, response=a or "none") for p, a in zip(pairs, answers)]
    share = 100.0 * np.mean([bool(answer) for answer in answers])
    assert share > 0
    assert score_answers(model, own, TRANSFORM, **options).metrics["exact_match"] == share


def write(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def fails(capsys, *argv) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([str(a) for a in argv])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1, said
    return said


@pytest.mark.smoke
def test_all_of_it_in_one_report(folder, tmp_path, capsys):
    pairs = write(tmp_path / "p.jsonl", [{"prompt": f"p{n}", "response": "yes"} for n in range(3)])
    texts = [{"text": f"{word} {n}", "label": word} for n in range(6) for word in ("on", "off")]
    labelled = write(tmp_path / "task.jsonl", texts)
    (tmp_path / "book.txt").write_text("All of the text that there is. " * 20)
    evaluate.main([
        f"--checkpoint={folder}", f"--output={tmp_path}/report",
        f"--corpus={tmp_path}/*.txt", "--prefix=20", "--continuation=12", "--tokens=60",
        f"--pairs={pairs}", "--max_new_tokens=4",
        f"--train={labelled}", f"--dev={labelled}", "--learning_rates=1e-3", "--batch_sizes=8",
        "--epochs=1", "--max_length=16",
    ])  # fmt: skip
    scores = json.loads((tmp_path / "report" / "scores.json").read_text())
    assert scores["text"]["tokens"] == 60
    assert scores["text"]["loss"] == pytest.approx(np.log(324), abs=1.5)
    assert set(scores["answers"]) == {
        "pairs", "num_beams", "loss", "perplexity", "exact_match", "normalised_match", "rouge1",
        "rouge2", "rougeL", "bleu",
    }  # fmt: skip
    assert scores["classification"]["labels"] == ["off", "on"]
    assert 0 <= scores["classification"]["accuracy"] <= 1
    answers = [
        json.loads(line) for line in (tmp_path / "report/answers.jsonl").read_text().splitlines()
    ]
    assert [answer["prompt"] for answer in answers] == ["p0", "p1", "p2"]
    page = (tmp_path / "report" / "README.md").read_text()
    assert all(title in page for title in ("Held-out text", "3 answers", "Classification"))
    assert "the most frequent label alone 50.0%" in capsys.readouterr().out


def test_a_run_is_measured_on_its_own_held_out_text(tmp_path):
    """In the way it was trained: UL2's sequential mode, with its sentinel."""
    run = tmp_path / "run"
    train.main([
        "--config=smoke", f"--workdir={run}", "--set=objective.kind=ul2", "--set=train.steps=2",
        "--set=data.corpus.max_documents=30", "--set=model.encoder.num_layers=1",
        "--set=model.decoder.num_layers=1", "--set=train.eval_batches=1",
    ])  # fmt: skip
    evaluate.main([f"--checkpoint={run}", "--tokens=600"])
    there = run / "report" / "evaluation" / "scores.json"
    by_mode = json.loads(there.read_text())["text"]
    assert (by_mode["prefix"], by_mode["continuation"]) == (61, 63)
    evaluate.main([f"--checkpoint={run}", "--tokens=600", "--ul2=no"])
    plain = json.loads(there.read_text())["text"]
    assert plain["loss"] != by_mode["loss"]
    assert plain["loss"] == pytest.approx(by_mode["loss"], abs=1.0)


def test_refusals(folder, tmp_path, capsys):
    here = f"--checkpoint={folder}"
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    good = write(tmp_path / "good.jsonl", [{"text": "t", "label": "x"}])
    for arguments, says in (
        (["--pairs=p"], "--checkpoint is missing"),
        (["--checkpoint=/nowhere"], "no checkpoint at /nowhere"),
        ([here, f"--pairs={bad}"], f"{bad}, line 1: no field 'prompt'"),
        ([here, f"--train={bad}"], "both --train and --dev"),
        ([here, f"--train={good}", f"--dev={good}", f"--output={tmp_path}/o"], "one label alone"),
        ([here, "--learning_rates=fast"], "--learning_rates takes numbers"),
        ([here, "--tokens=0"], "--tokens must be at least 1"),
        ([here, f"--corpus={bad}", "--prefix=3000", "--continuation=2"], "too few for a piece"),
    ):
        assert says in fails(capsys, *arguments)
