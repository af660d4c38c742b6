"""DINOv2 beside transformers and torch: its tiny form, and what it refuses."""

import json

import pytest

from benchmarks import dino, harness
from benchmarks.peers import dino_workload as workload
from benchmarks.peers.dino_tenfold import Tenfold
from benchmarks.peers.dino_workload import Setting


@pytest.mark.parity
def test_writes_what_it_measured(tmp_path, capsys):
    """Both sides agree on features and on the first loss, or it would stop."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    flags = ["--models=tiny", "--sizes=56:2", "--dtypes=float32", "--prototypes=16"]
    assert dino.main([*flags, "--repeats=1", f"--output={tmp_path}"]) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "dino.json").read_text())
    features, registers, train, dropped = record["results"]
    assert [r["setting"]["drop_path"] for r in record["results"]] == [0, 0, 0, 0.4]
    assert max(r["difference"] for r in (features, registers, train)) < 1e-4
    assert dropped["difference"] is None
    assert dropped["flops"] < train["flops"]
    for result in record["results"]:
        ours, theirs = result["measurements"].values()
        assert theirs["ratio"] == pytest.approx(theirs["median"] / ours["median"])
    table = (tmp_path / "dino.md").read_text()
    assert "| features, registers | ViT-TINY | float32 | 2 × 56² |" in table
    assert "| train, drop path 0.4 | ViT-TINY | float32 | 2 × 56² |" in table


def test_our_side_runs_without_torch():
    setting = Setting("train", "tiny", "float32", 2, 56, drop_path=0.4)
    ours = Tenfold(prototypes=16)
    run = ours.prepare_train(setting, ours.fresh_params(setting), workload.training_batch(setting))
    assert run() > 0
    assert ours.flops(setting) > 0


def test_a_ratio_below_the_goal_is_marked():
    setting = Setting("train", "tiny", "float32", 2, 56)
    slow, fast = (harness.Measurement(t, t, t, t, 1, t / 2) for t in (2.0, 2.2))
    row = dino._row(dino.Result(setting, 4e9, 1e-7, {dino.OURS: slow, dino.STEP: fast}))
    assert row[4:] == ["2000.0", "1.00", "2", "0.91", "1.10 ✗", "1e-07"]


@pytest.mark.parametrize("flag", ["--tasks=featuers", "--models=xl"])
def test_unknown_names_are_one_line(flag, capsys):
    assert dino.main([flag]) == 2
    name = flag.split("=")[1]
    assert capsys.readouterr().err.startswith(f"benchmarks.dino: no '{name}'; there are ")
