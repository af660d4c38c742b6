"""`python -m t5gemma.train`, as a user types it: every objective, resuming, wrong input."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

import t5gemma
from common.data.tokenizers import ByteTokenizer, load_tokenizer
from common.errors import UserError
from common.launch import config as configs
from common.models import Decoder, DecoderConfig, save_decoder
from common.models.flops import decoder_flops
from common.train import TrainConfig
from t5gemma import train
from t5gemma.config import smoke_model
from t5gemma.data import ObjectiveConfig, UL2Config, ul2_tokens
from t5gemma.flops import forward_flops
from t5gemma.presets import PRESETS, Config, make_task, smoke
from t5gemma.ul2 import T5GEMMA2_MIXTURE, UL2_MIXTURE, Denoiser, UL2Tokens

# A run of seconds: the smoke preset, smaller still.
SMALL = [
    "--config=smoke",
    *(f"--set=model.{side}.{field}" for side in ("encoder", "decoder") for field in (
        "width=16", "mlp_width=32", "num_heads=2", "num_kv_heads=1", "head_dim=8",
        "vocab_size=448", "pattern=global", "num_layers=1")),
    "--set=data.corpus.max_documents=30",
    "--set=data.encoder_length=32",
    "--set=data.decoder_length=32",
    "--set=train.steps=6",
    "--set=train.checkpoint_every=3",
    "--set=train.eval_every=3",
    "--set=train.eval_batches=2",
    "--set=train.optimizer.schedule=constant",
    "--set=train.mesh.data=1",
    "--set=train.mesh.fsdp=8",
    "--set=loss_chunk=16",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.main([*SMALL, f"--workdir={folder}"])
    return folder


@pytest.fixture(scope="module")
def teacher(run, tmp_path_factory):
    """A decoder-only model's folder, of the run's tokenizer."""
    config = DecoderConfig(448, 16, 32, 2, 1, 8, 1)
    model = Decoder(config, rngs=nnx.Rngs(0))
    model.tokenizer = load_tokenizer(run / "tokenizer.model")
    folder = tmp_path_factory.mktemp("teacher") / "donor"
    save_decoder(model, folder, "workspace")
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = [json.dumps({"prompt": f"say {n}", "response": f"{n}!"}) for n in range(60)]
    path.write_text("\n".join(lines) + "\n")
    return path


def fails(capsys, *argv) -> str:
    """Runs a training that must refuse; returns the one line it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main([str(a) for a in argv])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1, said
    assert "Traceback" not in said
    return said


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


@pytest.mark.smoke
def test_train_writes_a_run(run):
    found = losses(run)
    assert [step for step, _ in found] == list(range(1, 7))
    assert found[-1][1] < found[0][1]
    assert (run / "report" / "loss.png").stat().st_size > 1000
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert 0 < summary["heldout_loss"] < np.log(448) + 0.5
    model = t5gemma.load(run)
    assert model.tokenizer.vocab_size == 448 - 64
    assert model.stop_tokens == (1,)


def test_a_stopped_run_goes_on_as_if_it_had_not(run, tmp_path, capsys):
    folder = tmp_path / "run"
    train.main([*SMALL, f"--workdir={folder}", "--set=train.steps=3"])
    train.main([*SMALL, f"--workdir={folder}"])
    assert "resumed from step 3" in capsys.readouterr().out
    assert losses(folder) == losses(run)


@pytest.mark.parametrize(
    "options",
    [
        ["--set=objective.kind=ul2", "--set=data.passes=2", "--set=objective.ul2.recipe=t5gemma2"],
        ["--set=objective.prefix.shortest=0.2", "--set=objective.prefix.longest=0.8"],
    ],
    ids=["ul2", "random splits"],
)
def test_objectives_of_text(tmp_path, options):
    train.main([*SMALL, f"--workdir={tmp_path}/run", *options])
    found = losses(tmp_path / "run")
    assert found[-1][1] < found[0][1]


def test_distillation(run, teacher, tmp_path):
    options = [
        "--set=objective.kind=distillation",
        f"--set=objective.teacher.checkpoint={teacher}",
        "--set=objective.teacher.top_k=16",
        f"--set=checkpoint={run}",
    ]
    train.main([*SMALL, f"--workdir={tmp_path}/run", *options, "--set=train.steps=3"])
    # Resumed without the checkpoint that it started from, of which nothing is needed any more.
    train.main([*SMALL, f"--workdir={tmp_path}/run", *options])
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] == rows[-1]["distillation"] < rows[0]["distillation"]
    assert t5gemma.load(tmp_path / "run").config.decoder.width == 16


@pytest.mark.smoke
def test_instruction_tuning_starts_from_a_checkpoint(run, pairs, tmp_path):
    options = [
        "--config=smoke",  # Whose shape is another: the checkpoint's takes its place.
        f"--workdir={tmp_path}/tuned",
        f"--set=checkpoint={run}",
        "--set=objective.kind=instruction",
        f"--set=objective.pairs.path={pairs}",
        "--set=objective.pairs.heldout_fraction=0.2",
        "--set=train.steps=3",
        "--set=train.eval_every=0",
        "--set=train.optimizer.learning_rate=1e-30",
    ]
    train.main(options)
    before, after = t5gemma.load(run), t5gemma.load(tmp_path / "tuned")
    assert after.config == before.config
    assert (tmp_path / "tuned/tokenizer.model").read_bytes() == (
        run / "tokenizer.model"
    ).read_bytes()
    # With no learning rate to speak of these are still the checkpoint's parameters.
    for one, other in zip(jax.tree.leaves(nnx.state(before)), jax.tree.leaves(nnx.state(after))):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert (tmp_path / "tuned" / "report" / "README.md").read_text().count("pairs.jsonl") == 1


class TestRefuses:
    """Wrong input: one line, exit code 2, and a folder that is free for the corrected command."""

    @pytest.mark.parametrize(
        ("argument", "says"),
        [
            ("--config=smok", "did you mean 'smoke'"),
            ("--set=objective.kind=ul3", "ul2"),
            ("--set=objective.kind=distillation", "objective.teacher.checkpoint"),
            ("--set=objective.kind=instruction", "objective.pairs.path"),
            ("--set=objective.prefix.longest=0.1", "0.5 to 0.1"),
            ("--set=checkpoint=/nowhere", "no checkpoint at /nowhere"),
            ("--set=loss_chunk=7", "loss_chunk (7) must divide data.decoder_length (32)"),
            ("--set=data.encoder_length=1024", "more than model.encoder.max_length (512)"),
            ("--set=data.encoder_length=1", "at least 2"),
            (
                "--set=data.piece_length=200",
                "data.piece_length is 200, but a piece of more than 62",
            ),
            ("--set=data.piece_length=2", "too short"),
            ("--set=data.passes=0", "passes is 0"),
            ("--set=data.tokenizer=/nowhere/tokenizer.model", "/nowhere/tokenizer.model"),
            ("--set=train.batch_size=7", "batch_size 7 must be a multiple"),
        ],
    )
    def test_a_new_run(self, tmp_path, capsys, argument, says):
        assert says in fails(capsys, *SMALL, f"--workdir={tmp_path}/new", argument)
        assert not (tmp_path / "new").exists()

    def test_ul2_ids_that_text_has(self, run, tmp_path, capsys):
        arguments = [
            *SMALL,
            f"--workdir={tmp_path}/new",
            "--set=objective.kind=ul2",
            f"--set=data.tokenizer={run}/tokenizer.model",
        ]
        said = fails(
            capsys, *arguments, "--set=objective.ul2.special.first_sentinel=300",
            "--set=objective.ul2.special.modes=445,446,447",
        )  # fmt: skip
        assert "is a token that texts of the corpus have" in said
        said = fails(capsys, *arguments, "--set=objective.ul2.special.first_sentinel=900")
        assert "has id 900, but the model's vocabulary is 0..447" in said
        said = fails(capsys, *SMALL, f"--workdir={tmp_path}/other", "--set=objective.kind=ul2",
                     "--set=data.spare_tokens=2")  # fmt: skip
        assert "none are left for UL2" in said

    def test_a_teacher_of_another_tokenizer(self, teacher, tmp_path, capsys):
        said = fails(
            capsys, *SMALL, f"--workdir={tmp_path}/new", "--set=objective.kind=distillation",
            f"--set=objective.teacher.checkpoint={teacher}", "--set=data.spare_tokens=40",
        )  # fmt: skip
        assert "teacher's tokenizer is not the run's" in said
        said = fails(
            capsys, *SMALL, f"--workdir={tmp_path}/new", "--set=objective.kind=distillation",
            f"--set=objective.teacher.checkpoint={teacher}", "--set=model.decoder.vocab_size=447",
        )  # fmt: skip
        assert "the teacher has 448 tokens but the model 447" in said

    def test_pairs_with_a_wrong_line(self, run, tmp_path, capsys):
        path = tmp_path / "pairs.jsonl"
        path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": 1}\n')
        said = fails(
            capsys, *SMALL, f"--workdir={tmp_path}/new", "--set=objective.kind=instruction",
            f"--set=objective.pairs.path={path}", f"--set=checkpoint={run}",
        )  # fmt: skip
        assert f"{path}, line 2" in said
        assert not (tmp_path / "new").exists()


class Names(ByteTokenizer):
    """Bytes, with special tokens of these names after them."""

    def __init__(self, *names):
        self.special_tokens = {name: 260 + n for n, name in enumerate(names)}
        self.vocab_size = 260 + len(names)


def test_where_ul2_finds_its_ids():
    unused = [f"<unused{n}>" for n in range(99)]
    gemma = Names("<mask>", *unused, "<start_of_turn>", "<end_of_turn>")
    # As in Gemma 2's tokenizer, where the first unused id is 7.
    assert ul2_tokens(UL2Config(), gemma, gemma.vocab_size) == UL2Tokens((261, 262, 263), 359, 96)
    special = [f"<special {n}>" for n in range(9)]
    own = Names("<|im_start|>", *special, "<|im_end|>")
    assert ul2_tokens(UL2Config(), own, own.vocab_size) == UL2Tokens((261, 262, 263), 269, 6)
    # Ids that the tokenizer leaves free come before special tokens that have a use.
    assert ul2_tokens(UL2Config(), own, 400) == UL2Tokens((271, 272, 273), 399, 96)
    with pytest.raises(UserError, match="none are left for UL2"):
        ul2_tokens(UL2Config(), ByteTokenizer(), 264)
    chosen = UL2Tokens((4, 5, 6), 20, 3)
    assert ul2_tokens(UL2Config(special=chosen), own, 300) == chosen


def test_a_configuration_is_read_back_from_its_json():
    """Denoisers and ids too."""
    own = UL2Config(mixture=(Denoiser("R", 0.2, 4.0), Denoiser("S", 0.5, None, 2.0)),
                    special=UL2Tokens(None, 20, 4))  # fmt: skip
    config = dataclasses.replace(smoke(), objective=ObjectiveConfig(kind="ul2", ul2=own))
    assert configs.from_json(Config, configs.to_json(config)) == config
    assert own.denoisers == own.mixture
    assert UL2Config().denoisers == UL2_MIXTURE
    assert UL2Config("t5gemma2").denoisers == T5GEMMA2_MIXTURE


def test_flops_match_the_compiler():
    """Counted by hand against XLA's count of unrolled layers, windows shorter than the rows."""
    config = smoke_model().with_stacks(num_layers=1, width=128, mlp_width=384, head_dim=32)
    model = t5gemma.T5Gemma(config, rngs=nnx.Rngs(0))
    tokens = [np.ones((2, length), np.int32) for length in (48, 32)]

    def counted(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]

    # The compiler counts products of masked pairs too, so that it is compared without a window.
    wide = config.with_stacks(pattern=("global",))
    model = t5gemma.T5Gemma(wide, rngs=nnx.Rngs(0))
    found = counted(lambda m, e, d: m(e, d), model, *tokens)
    assert forward_flops(wide, 2, 48, 32) == pytest.approx(found, rel=0.08)
    decoder = Decoder(wide.decoder, rngs=nnx.Rngs(0))
    found = counted(lambda m, t: m(t), decoder, tokens[0])
    assert decoder_flops(wide.decoder, 2, 48) == pytest.approx(found, rel=0.08)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_gives_a_task(name):
    config = PRESETS[name]()
    assert isinstance(config.train, TrainConfig)
    shapes = {
        f"{side}_tokens": jax.ShapeDtypeStruct((8, getattr(config.data, f"{side}_length")), "int32")
        for side in ("encoder", "decoder")
    }
    shapes["targets"] = shapes["decoder_tokens"]
    forward = forward_flops(config.model, 8, config.data.encoder_length, config.data.decoder_length)
    assert make_task(config).flops_per_step(shapes) == 3 * forward


def test_smoke_is_small():
    assert smoke().model.num_parameters() < 100_000
