"""`metrics.jsonl` by itself: exact numbers, torn lines, and the other small parts of a run."""

import json
import math
import types

import numpy as np
import pytest

from common.train.flops import peak_flops, utilisation
from common.train.goodput import Goodput
from common.train.metrics import MetricsWriter, read_metrics
from common.train.progress import Progress


def write(workdir, step, *lines):
    writer = MetricsWriter(workdir, step)
    for number, values in lines:
        writer.write(number, values)
    writer.close()


def test_floats_read_back_exactly_and_the_loss_comes_first(tmp_path):
    value = float(np.float32(1) / np.float32(3))
    write(tmp_path, 0, (1, {"accuracy": 0.5, "loss": value}), (2, {"loss": math.inf}))
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert text[0].startswith('{"step": 1, "loss": 0.333')
    first, second = read_metrics(tmp_path)
    assert np.float32(first["loss"]) == np.float32(1) / np.float32(3)
    assert second["loss"] is None


@pytest.mark.parametrize("tail", [b"", b'{"step": 3, "lo', b"\x00\x00\xff\n", b"[]\n", b"{}\n"])
def test_later_and_torn_lines_are_cut_off(tmp_path, tail):
    write(tmp_path, 0, *[(i, {"loss": float(i)}) for i in (1, 2, 3)])
    with open(tmp_path / "metrics.jsonl", "ab") as stream:
        stream.write(tail)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    write(tmp_path, 2, (3, {"loss": 30.0}))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["loss"] for line in text.splitlines()] == [1.0, 2.0, 30.0]


def test_a_whole_line_without_its_end_is_written_again(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}')
    write(tmp_path, 1, (2, {"loss": 2.0}))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_other_processes_write_nothing(tmp_path):
    writer = MetricsWriter(tmp_path, 0, active=False)
    writer.write(1, {"loss": 1.0})
    writer.sync()
    writer.close()
    assert not list(tmp_path.iterdir())


def device(kind, platform="gpu"):
    return types.SimpleNamespace(device_kind=kind, platform=platform)


def test_utilisation_is_known_for_accelerators_alone():
    assert peak_flops(device("cpu", "cpu")) is None
    assert peak_flops(device("NVIDIA H100 80GB HBM3")) == 989e12
    assert peak_flops(device("NVIDIA H100 PCIe")) == 756e12
    assert peak_flops(device("TPU v5 lite", "tpu")) == 197e12
    assert peak_flops(device("TPU v5", "tpu")) == 459e12
    assert peak_flops(device("NVIDIA GeForce")) is None
    two = [device("NVIDIA H100 80GB HBM3")] * 2
    assert utilisation(989e12, 1.0, two) == pytest.approx(0.5)
    assert utilisation(None, 1.0, two) is None


def test_goodput_adds_up_phases():
    goodput = Goodput()
    with goodput.phase("step"):
        pass
    with pytest.raises(KeyError), goodput.phase("sleep"):
        pass
    assert goodput.seconds["step"] > 0
    assert 0 < goodput.fraction <= 1
    assert "step 0.0" in goodput.describe()


def test_lines_where_there_is_no_terminal(capsys):
    progress = Progress(0, 100)
    values = {"loss": 1.25, "perf/steps_per_second": 2.0, "perf/tokens_per_second": 4096.0}
    progress.update(10, values)
    progress.update(11, values)  # Too soon after the first.
    progress.update(100, {**values, "perf/mfu": 0.415, "eval/heldout/loss": 2.5}, force=True)
    progress.close()
    first, last = capsys.readouterr().out.splitlines()
    assert first == "step 10/100  loss 1.2500  2 steps/s  4.1k tokens/s"
    assert "heldout/loss 2.5000" in last
    assert "MFU 41.5%" in last
    assert last.endswith("0:00 left")


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    progress = Progress(5, 10)
    progress.update(7, {"loss": 1.25})
    progress.say("a line")
    progress.close()
    captured = capsys.readouterr()
    assert "7/10" in captured.err
    assert "loss 1.25" in captured.err
    assert "a line" in captured.out
