"""The command lines, as a user types them: results, resuming, and what wrong input says."""

import json
import re

import numpy as np
import pytest

import recurrentgemma
from recurrentgemma import evaluate, generate, train

# A run of seconds: the smoke preset, smaller still.
SMALL = [
    "--config=smoke",
    "--set=model.width=16",
    "--set=model.mlp_width=32",
    "--set=model.lru_width=16",
    "--set=model.vocab_size=400",
    "--set=model.num_layers=3",
    "--set=data.corpus.max_documents=30",
    "--set=data.sequence_length=32",
    "--set=train.steps=6",
    "--set=train.checkpoint_every=3",
    "--set=train.eval_every=3",
    "--set=train.eval_batches=2",
    "--set=train.mesh.data=1",
    "--set=train.mesh.fsdp=8",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.main([*SMALL, f"--workdir={folder}"])
    return folder


def fails(capsys, main, *argv) -> str:
    """Runs a launcher that must refuse; returns the one line it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in argv])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1, said
    assert "Traceback" not in said
    return said


@pytest.mark.smoke
def test_train_writes_a_run(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert (run / "report" / "README.md").is_file()
    assert (run / "report" / "loss.png").stat().st_size > 1000
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert summary["step"] == 6
    assert 0 < summary["heldout_loss"] < np.log(400) + 0.5


def test_again_is_done_and_longer_goes_on(run, tmp_path, capsys):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    before = (folder / "metrics.jsonl").read_text()
    train.main([*SMALL, f"--workdir={folder}"])
    assert (folder / "metrics.jsonl").read_text() == before
    train.main([*SMALL, f"--workdir={folder}", "--set=train.steps=8"])
    assert (folder / "metrics.jsonl").read_text().startswith(before)
    assert "resumed from step 6" in capsys.readouterr().out


@pytest.mark.smoke
def test_generate(run, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def f(\nReturn the sum of\n")
    output = tmp_path / "out.jsonl"
    arguments = [f"--checkpoint={run}", "--max_new_tokens=4"]
    generate.main([*arguments, "--prompt=import", f"--prompts={prompts}", f"--output={output}"])
    assert "import" in capsys.readouterr().out
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["import", "def f(", "Return the sum of"]
    assert all(1 <= len(row["tokens"]) <= 4 for row in rows)
    said = fails(capsys, generate.main, *arguments, "--prompt=x", f"--output={output}")
    assert "exists" in said


@pytest.mark.smoke
def test_evaluate(run, capsys):
    evaluate.main([f"--checkpoint={run}", "--lengths=16,64", "--tokens=512"])
    scores = json.loads((run / "report" / "evaluation" / "scores.json").read_text())
    assert [score["length"] for score in scores] == [16, 64]
    trained = json.loads((run / "report" / "summary.json").read_text())["heldout_loss"]
    for score in scores:
        assert score["loss"] == pytest.approx(trained, abs=0.7)
        assert score["bits_per_byte"] > 0


def test_workspace_folder_round_trip(run, tmp_path):
    model = recurrentgemma.load(run)
    recurrentgemma.save(model, tmp_path / "kept")
    again = recurrentgemma.load(tmp_path / "kept")
    tokens = np.arange(12)[None]
    np.testing.assert_array_equal(model(tokens), again(tokens))
    assert again.tokenizer.encode("def f(x):") == model.tokenizer.encode("def f(x):")
    assert again.stop_tokens == model.stop_tokens == (1,)


class TestTrainRefuses:
    """Wrong input: one line, exit code 2, and nothing that was there has changed."""

    @pytest.mark.parametrize(
        ("argument", "says"),
        [
            ("--config=smok", "did you mean 'smoke'"),
            ("--set=model.widht=3", "did you mean 'model.width'"),
            ("--set=train.steps=many", "train.steps"),
            ("--set=train.steps=1.5", "train.steps"),
            ("--set=train.batch_size=7", "batch_size 7 must be a multiple"),
            ("--set=train.mesh.fsdp=3", "does not fit 8 device"),
            ("--set=data.corpus.kind=pyton", "did you mean 'python'"),
            ("--set=data.tokenizer=/nowhere/tokenizer.model", "/nowhere/tokenizer.model"),
            ("--set=model.num_heads=3", "multiples of model.num_heads"),
            ("--unknown=1", "unknown"),
        ],
    )
    def test_a_new_run(self, tmp_path, capsys, argument, says):
        folder = tmp_path / "new"
        assert says in fails(capsys, train.main, *SMALL, f"--workdir={folder}", argument)
        assert not folder.exists()

    def test_an_unreadable_corpus(self, tmp_path, capsys):
        text = tmp_path / "text.txt"
        text.write_bytes(b"\xff\xfe broken \xff")
        arguments = ["--set=data.corpus.kind=text", f"--set=data.corpus.path={tmp_path}/*.txt"]
        fails(capsys, train.main, *SMALL, f"--workdir={tmp_path}/new", *arguments)
        fails(capsys, train.main, *SMALL, f"--workdir={tmp_path}/new", arguments[0],
              "--set=data.corpus.path=/nowhere/*.txt")  # fmt: skip
        # The folder is free again for the corrected command.
        assert not (tmp_path / "new").exists()

    def test_a_tokenizer_of_another_size(self, run, tmp_path, capsys):
        said = fails(
            capsys,
            train.main,
            *SMALL,
            f"--workdir={tmp_path}/new",
            "--set=model.vocab_size=300",
            f"--set=data.tokenizer={run}/tokenizer.model",
        )
        assert re.search(r"400.*300", said)

    def test_another_configuration_in_the_folder(self, run, capsys):
        before = {p: p.read_bytes() for p in run.rglob("*.json*")}
        said = fails(capsys, train.main, *SMALL, f"--workdir={run}", "--set=model.num_layers=2")
        assert "model.num_layers 3 → 2" in said
        assert before == {p: p.read_bytes() for p in run.rglob("*.json*")}


class TestLoadRefuses:
    def test_nothing_there(self, capsys, tmp_path):
        arguments = [f"--checkpoint={tmp_path}/none", "--prompt=x"]
        assert "no checkpoint" in fails(capsys, generate.main, *arguments)
        assert "missing" in fails(capsys, generate.main, "--prompt=x")
        (tmp_path / "empty").mkdir()
        fails(capsys, generate.main, f"--checkpoint={tmp_path}/empty", "--prompt=x")

    @pytest.mark.parametrize("damage", ["truncated", "lying header", "another model", "bad config"])
    def test_damaged_folder(self, run, tmp_path, capsys, damage):
        folder = tmp_path / "hf"
        recurrentgemma.save(recurrentgemma.load(run), folder, format="huggingface")
        weights = folder / "model.safetensors"
        data = weights.read_bytes()
        if damage == "truncated":
            weights.write_bytes(data[: len(data) // 2])
        elif damage == "lying header":
            weights.write_bytes(data.replace(b'"shape":[16,', b'"shape":[61,', 1))
        elif damage == "another model":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
        else:
            (folder / "config.json").write_text('{"hidden_size": [1], ')
        fails(capsys, generate.main, f"--checkpoint={folder}", "--prompt=x")

    def test_prompt_longer_than_allowed(self, run, capsys):
        arguments = [f"--checkpoint={run}", "--prompt=" + "x y z " * 50, "--max_prompt_tokens=20"]
        assert "more than the 20 allowed" in fails(capsys, generate.main, *arguments)

    def test_tokens_of_another_vocabulary(self, run):
        from common.errors import UserError
        from common.generate import generate as continue_text

        model = recurrentgemma.load(run)
        with pytest.raises(UserError, match=r"vocabulary is 0\.\.399"):
            continue_text(model, [[1, 400]])
