"""`recurrentgemma.reproduce` end to end in miniature, and the parts that decide what it says."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx

from common.data.token_store import TokenStore
from common.errors import UserError
from common.generate.measure import Reader, Writer, cache_bytes, median_seconds
from common.models import Decoder
from recurrentgemma import Griffin
from recurrentgemma.experiments import claims
from recurrentgemma.experiments.config import PRESETS, smoke
from recurrentgemma.experiments.contenders import ATTENTION, GRIFFIN, HAWK, contenders
from recurrentgemma.experiments.language import long_rows, row_losses
from recurrentgemma.experiments.memory import formula_bytes
from recurrentgemma.reproduce import main

TINY = smoke().language.model
OVERRIDES = [
    "speed.model.width=16",
    "speed.model.mlp_width=16",
    "speed.model.lru_width=16",
    "speed.model.vocab_size=32",
    "speed.contexts=128,256",
    "speed.prompts=64,128",
    "speed.repeats=1",
    "speed.decode_steps=4",
    "language.model.width=16",
    "language.model.mlp_width=16",
    "language.model.lru_width=16",
    "language.data.corpus.max_documents=60",
    "language.data.sequence_length=32",
    "language.data.tokenizer_characters=100000",
    "language.train.steps=4",
    "language.train.batch_size=8",
    "language.multiples=1,4",
    "language.rows=2",
    "induction.model.width=16",
    "induction.model.mlp_width=16",
    "induction.model.lru_width=16",
    "induction.model.num_layers=3",
    "induction.train_length=8",
    "induction.train.steps=4",
    "induction.train.batch_size=8",
    "induction.rows=8",
]


@pytest.mark.smoke
def test_reproduce(tmp_path, capsys, monkeypatch):
    # Eight virtual devices on the same cores would only compile longer.
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)
    folder = tmp_path / "run"
    arguments = [
        "--config=smoke",
        f"--workdir={folder}",
        *(f"--set={override}" for override in OVERRIDES),
    ]
    main(arguments)
    first = capsys.readouterr().out
    text = (folder / "report" / "results.json").read_text()
    document = json.loads(text)
    assert set(document) == {"claim", "setting", "expected", "measured", "holds"}
    assert list(document["holds"]) == [e.name for e in claims.EXPECTATIONS]
    assert len(document["expected"]) == len(document["holds"])
    again = {e.name: e.holds(document["measured"]) for e in claims.EXPECTATIONS}
    assert document["holds"] == again
    assert document["holds"]["state_fixed"]
    assert document["holds"]["cache_grows"]
    assert "Smaller than in the papers" in document["setting"]
    for name, held in document["holds"].items():
        assert re.search(rf"^{'holds' if held else 'FAILS'}  {name}: ", first, re.MULTILINE)
    page = (folder / "report" / "README.md").read_text()
    figures = re.findall(r"\((\w+\.png)\)", page)
    assert len(figures) == 7
    assert all((folder / "report" / figure).stat().st_size > 10_000 for figure in figures)

    # The last experiment is lost; its trainings are not. All else is taken as it is.
    (folder / "measurements" / "induction.json").unlink()
    main(arguments)
    second = capsys.readouterr().out
    assert second.count("measured before") == 3
    assert second.count("finished before") == 3
    assert (folder / "report" / "results.json").read_text() == text


def measurements() -> dict:
    """Measurements in which all that the papers claim comes out."""
    growing, flat = [1.0, 3.0], [1.0, 1.1]
    series = {GRIFFIN: flat, HAWK: flat, ATTENTION: growing}
    return {
        "memory": {
            "contexts": [10, 20],
            "bytes": {GRIFFIN: [50, 50], HAWK: [5, 5], ATTENTION: [100, 200]},
            "formula_bytes": {GRIFFIN: [50, 50], HAWK: [5, 5], ATTENTION: [100, 200]},
        },
        "speed": {
            "prompts": [10, 20],
            "decode_seconds": series,
            "prefill_seconds": {GRIFFIN: [1.0, 2.0], HAWK: [1.0, 2.0], ATTENTION: [1.0, 4.0]},
        },
        "language": {
            "loss": {GRIFFIN: [2.0, 1.9], HAWK: [2.05, 2.0], ATTENTION: [2.1, 3.0]},
        },
        "induction": {
            "train_length": 8,
            "lengths": [8, 16, 32],
            "accuracy": {
                GRIFFIN: [1.0, 0.9, 0.4],
                HAWK: [1.0, 1.0, 0.99],
                ATTENTION: [1.0, 0.6, 0.2],
            },
        },
    }


SPOILT = {
    "state_fixed": ("memory", "bytes", GRIFFIN, [50, 60]),
    "cache_grows": ("memory", "bytes", ATTENTION, [100, 100]),
    "decode_flat": ("speed", "decode_seconds", HAWK, [1.0, 1.4]),
    "decode_attention_slows": ("speed", "decode_seconds", ATTENTION, [2.5, 3.0]),
    "decode_faster": ("speed", "decode_seconds", ATTENTION, [0.5, 1.0]),
    "prefill_linear": ("speed", "prefill_seconds", HAWK, [1.0, 3.5]),
    "prefill_keeps_up": ("speed", "prefill_seconds", ATTENTION, [1.0, 1.0]),
    "loss_griffin": ("language", "loss", GRIFFIN, [2.2, 2.1]),
    "loss_hawk": ("language", "loss", HAWK, [2.2, 2.0]),
    "loss_beyond_recurrent": ("language", "loss", HAWK, [2.0, 2.1]),
    "loss_beyond_attention": ("language", "loss", ATTENTION, [2.1, 2.2]),
    "induction_learned": ("induction", "accuracy", GRIFFIN, [0.98, 0.9, 0.4]),
    "induction_hawk": ("induction", "accuracy", HAWK, [1.0, 1.0, 0.9]),
    "induction_beyond": ("induction", "accuracy", GRIFFIN, [1.0, 0.5, 0.4]),
    "induction_attention_fails": ("induction", "accuracy", ATTENTION, [1.0, 0.6, 0.8]),
}


def test_every_expectation_can_hold_and_can_fail():
    good = measurements()
    assert all(e.holds(good) for e in claims.EXPECTATIONS)
    assert set(SPOILT) == {e.name for e in claims.EXPECTATIONS}
    for expectation in claims.EXPECTATIONS:
        bad = measurements()
        part, key, name, values = SPOILT[expectation.name]
        bad[part][key][name] = values
        assert not expectation.holds(bad), expectation.name


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_contenders_are_of_equal_size(preset):
    config = PRESETS[preset]()
    for shape in (config.speed.model, config.language.model, config.induction.model):
        models = contenders(shape)
        assert [type(m.config).__name__ for m in models] == [
            "GriffinConfig",
            "GriffinConfig",
            "DecoderConfig",
        ]
        griffin, *others = (model.num_parameters() for model in models)
        assert all(abs(count - griffin) <= 0.02 * griffin for count in others)


def test_contenders_have_the_parameters_they_claim():
    for contender in contenders(TINY):
        model = contender.abstract()
        assert isinstance(model, Decoder if contender.name == ATTENTION else Griffin)
        count = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
        assert count == contender.num_parameters()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("context", [7, 32, 100])
def test_cache_bytes_follow_the_formula(dtype, context):
    shape = dataclasses.replace(TINY, dtype=dtype, num_layers=5, num_kv_heads=2)
    for contender in contenders(shape):
        assert cache_bytes(contender.abstract(), context) == formula_bytes(contender, context)


def test_writer_decodes_greedily_from_the_marked_position():
    contender = contenders(dataclasses.replace(TINY, num_layers=3))[2]
    model = contender.filled(0)
    run = Writer(model, batch_size=2, steps=3).at(16)
    tokens, cache = np.zeros((2, 1), np.int32), model.init_cache(2, 16)
    cache = dataclasses.replace(cache, cached=cache.cached + 13)
    for _ in range(3):
        logits, cache = model.extend(tokens, cache)
        tokens = np.argmax(logits, axis=-1).astype(np.int32)
    np.testing.assert_array_equal(run(), tokens)
    assert run().shape == (2, 1)  # The donated cache goes round.
    with pytest.raises(ValueError, match="do not fit"):
        Writer(model, steps=3).at(2)


def test_median_seconds_takes_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = median_seconds(runs, repeats=4, warmup=1)
    assert set(seconds) == set("abc")
    assert all(value >= 0 for value in seconds.values())
    turns = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(turns) == 5
    assert all(sorted(turn) == list("abc") for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1


def test_long_rows_stay_within_documents():
    store = TokenStore(
        tokens=np.arange(40, dtype=np.uint16),
        offsets=np.array([0, 21, 24, 40]),
        vocab_size=40,
        pad_id=0,
    )
    table = long_rows(store, 5, 100)
    # 21 tokens hold 4 stretches of 5 + 1 with a token in common, 3 tokens none, 16 hold 3.
    assert table[:, 0].tolist() == [0, 24, 5, 29, 10, 34, 15]
    assert (np.diff(table) == 1).all()
    assert len(long_rows(store, 5, 2)) == 2
    with pytest.raises(UserError, match="no held-out document"):
        long_rows(store, 30, 1)


def test_row_losses_score_every_target_once_at_any_length():
    model = contenders(TINY)[0].filled(0)
    table = np.random.default_rng(0).integers(0, TINY.vocab_size, (3, 17)).astype(np.int32)
    logits = np.asarray(jax.nn.log_softmax(model(table[:, 4:8])))
    expected = -np.take_along_axis(logits, table[:, 5:9, None], axis=-1)[..., 0]
    short = row_losses(model, table, 4)
    assert short.shape == (12, 4)
    np.testing.assert_allclose(short.reshape(3, 16)[:, 4:8], expected, rtol=1e-5)
    assert row_losses(model, table, 16).shape == (3, 16)


def test_reader_returns_logits_of_the_last_token():
    model = contenders(TINY)[1].filled(0)
    logits, _ = Reader(model, batch_size=2).at(6)()
    tokens = np.broadcast_to(np.arange(6), (2, 6))
    np.testing.assert_allclose(logits, model(tokens)[:, -1], atol=2e-5)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("speed.contexts=64,256", "speed.contexts must start at 128"),
        ("speed.prompts=64", "two or more"),
        ("language.multiples=1,3,4", "divide the last"),
        ("induction.multiples=1,2", "must have 1, 2 and 4"),
    ],
)
def test_wrong_settings_are_one_line(override, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--config=smoke", f"--workdir={tmp_path / 'run'}", f"--set={override}"])
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
