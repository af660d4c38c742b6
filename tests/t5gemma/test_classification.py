"""A head on the encoder, fine-tuned on JSONL tasks."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.data.tokenizers import ByteTokenizer
from common.errors import UserError
from common.models.decoder import Decoder, DecoderConfig
from common.sharding import MeshConfig
from t5gemma.classification import Classification, Classifier, LabelledRows, read_labelled
from t5gemma.config import T5GemmaConfig
from t5gemma.fine_tuning import FineTuning, fine_tune
from t5gemma.model import T5Gemma

TOKENIZER = ByteTokenizer()
STACK = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size,
    width=16,
    mlp_width=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    num_layers=2,
)
CONFIG = T5GemmaConfig(STACK, dataclasses.replace(STACK, num_layers=1))
MESH = MeshConfig(data=2, fsdp=4)


@pytest.fixture(scope="module")
def model():
    return T5Gemma(CONFIG, rngs=nnx.Rngs(0))


def write(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def colours(count, seed):
    """Which colour is named? Only one word tells."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        label = str(rng.choice(["red", "blue"]))
        yield {"text": f"the {rng.choice(['cup', 'car', 'hat'])} is {label}", "label": label}


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_padding_and_neighbours_change_nothing(model, pooling):
    classifier = Classifier(model, 3, pooling, rngs=nnx.Rngs(1))
    texts = [TOKENIZER.encode(text) for text in ("a text", "another, longer", "c")]
    lengths = np.array([len(text) for text in texts])
    together = np.stack([np.pad(text, (0, 24 - len(text))) for text in texts])
    logits = jax.jit(lambda t, n: classifier(t, n))(together, lengths)
    states = [np.asarray(model.encode(jnp.array([text]))[0], np.float64) for text in texts]
    pooled = [s[-1] if pooling == "last" else s.mean(0) for s in states]
    expected = np.stack(pooled) @ np.asarray(classifier.head.kernel[...])
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_a_decoder_is_classified_by_its_last_token():
    body = Decoder(STACK, rngs=nnx.Rngs(0))
    classifier = Classifier(body, 2, "last", rngs=nnx.Rngs(1))
    tokens = np.array([[4, 5, 6, 0, 0]])
    expected = body.hidden(tokens[:, :3])[:, -1] @ classifier.head.kernel[...]
    np.testing.assert_allclose(classifier(tokens, np.array([3])), expected, atol=1e-5)


def test_dropout_is_for_training(model):
    task = Classification(lambda rngs: T5Gemma(CONFIG, rngs=rngs), 2, dropout=0.5)
    built = task.build(nnx.Rngs(0))
    batch = {
        "tokens": jnp.full((4, 8), 9),
        "lengths": jnp.full(4, 8),
        "labels": jnp.array([0, 1, 0, 1]),
        "weights": jnp.array([1.0, 1.0, 1.0, 0.0]),
    }
    losses = [float(task.loss(built, batch, jax.random.key(n)).total) for n in range(2)]
    assert losses[0] != losses[1]
    scored = [task.evaluate(built, batch, jax.random.key(n)) for n in range(2)]
    assert float(scored[0].total) == float(scored[1].total)
    assert float(scored[0].weight) == 3
    assert float(scored[0].metrics["accuracy"]) in (1.0, 2.0), "the fourth row has no weight"


def test_the_decoder_is_left_out(model):
    task = Classification(lambda rngs: T5Gemma(CONFIG, rngs=rngs), 2)
    paths = {path[:2] for path, _ in nnx.to_flat_state(nnx.state(task.build(nnx.Rngs(0))))}
    assert {path[0] for path in paths} == {"body", "head"}
    assert {path[1] for path in paths if path[0] == "body"} == {"encoder"}


@pytest.mark.smoke
def test_fine_tuning_learns_and_leaves_the_model_as_it_is(model, tmp_path):
    train = write(tmp_path / "train.jsonl", colours(64, 0))
    dev = write(tmp_path / "dev.jsonl", colours(20, 1))
    before = jax.device_get(nnx.to_pure_dict(nnx.state(model)))
    settings = FineTuning(
        learning_rates=(1e-5, 1e-2),
        batch_sizes=(16,),
        dropouts=(0.0,),
        epochs=8,
        pooling="mean",
        max_length=32,
        mesh=MESH,
    )
    scores = fine_tune(model, train, dev, settings, tmp_path / "runs", tokenizer=TOKENIZER)
    assert scores.labels == ("blue", "red")
    assert (scores.train_texts, scores.dev_texts) == (64, 20)
    best, worst = scores.trials
    assert (best.learning_rate, best.steps) == (1e-2, 32)
    assert scores.accuracy == best.accuracy == 1.0 > max(worst.accuracy, scores.majority)
    after = jax.device_get(nnx.to_pure_dict(nnx.state(model)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    # The same again finds the runs finished; another setting does not take them for its own.
    again = fine_tune(model, train, dev, settings, tmp_path / "runs", tokenizer=TOKENIZER)
    assert again == scores
    other = dataclasses.replace(settings, epochs=9.0)
    with pytest.raises(UserError, match=r"settings\.epochs 8(\.0)? → 9"):
        fine_tune(model, train, dev, other, tmp_path / "runs", tokenizer=TOKENIZER)


def test_pairs_of_texts(tmp_path):
    path = write(
        tmp_path / "pairs.jsonl",
        [
            {"text_a": "a passage", "text_b": "why?", "label": 1},
            {"text_a": "a passage that is longer", "text_b": "so?", "label": True},
        ],
    )
    texts = read_labelled(path)
    assert [text.label for text in texts] == ["1", "true"]
    rows = LabelledRows(texts, ("1", "true"), TOKENIZER, 20)
    row = rows[0]
    assert TOKENIZER.decode(row["tokens"]) == "a passage\nwhy?"
    assert row["tokens"][0] == TOKENIZER.bos_id
    assert (row["lengths"], row["labels"], row["weights"]) == (15, 0, 1.0)
    # What is too long loses the end of its first text.
    assert (rows.length, rows.cut) == (20, 1)
    assert TOKENIZER.decode(rows[1]["tokens"]) == "a passage that \nso?"


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"label": "x"}, "no field 'text'"),
        ({"text": "t"}, "no field 'label'"),
        ({"text_a": "t", "label": "x"}, "no field 'text_b'"),
        ({"text": 3, "label": "x"}, "field 'text' must be a text, not a number"),
        ({"text": "t", "label": 0.5}, "field 'label' must be a text, not a number"),
        ({"text": "t", "label": ""}, "field 'label' is empty"),
        ({"text": "t", "label": "z"}, "label 'z' is none of the training labels ['x', 'y']"),
    ],
)
def test_wrong_lines_are_told(tmp_path, record, says):
    path = write(tmp_path / "task.jsonl", [{"text": "t", "label": "x"}, record])
    with pytest.raises(UserError) as error:
        read_labelled(path, ["x", "y"])
    assert f"{path}, line 2: " in str(error.value)
    assert says in str(error.value)


def test_tasks_that_cannot_be_trained(model, tmp_path):
    one = write(tmp_path / "one.jsonl", [{"text": "t", "label": "x"}])
    with pytest.raises(UserError, match="one label alone, 'x'"):
        fine_tune(model, one, one, FineTuning(), tmp_path / "runs", tokenizer=TOKENIZER)
    with pytest.raises(UserError, match="tokenizer"):
        fine_tune(model, one, one, FineTuning(), tmp_path / "runs")
    with pytest.raises(UserError, match="last or mean"):
        Classifier(model, 2, "first", rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="dropout"):
        Classification(lambda rngs: model, 2, dropout=1.0)
    with pytest.raises(UserError, match="at least"):
        FineTuning(learning_rates=())
    with pytest.raises(UserError, match="must be positive"):
        FineTuning(epochs=0)
