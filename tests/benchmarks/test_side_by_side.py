"""Models beside transformers: one tiny setting of each benchmark, and contenders that differ."""

import json

import numpy as np
import pytest

from benchmarks import recurrentgemma, side_by_side, t5gemma
from common.errors import UserError

TRANSFORMERS = "transformers"


@pytest.mark.parity
@pytest.mark.parametrize(
    ("benchmark", "tasks"), [(recurrentgemma, ["decode"]), (t5gemma, ["generate", "train"])]
)
def test_writes_what_it_measured(benchmark, tasks, tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    flags = ["--size=tiny", "--contexts=16", "--batches=2", "--new-tokens=4", "--repeats=1"]
    flags += ["--dtypes=float32", f"--tasks={','.join(tasks)}", f"--output={tmp_path}"]
    assert benchmark.main(flags) == 0, capsys.readouterr().err
    name = benchmark.BENCHMARK.name
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert [result["setting"]["task"] for result in record["results"]] == tasks
    for result in record["results"]:
        ours, theirs = (result["measurements"][who] for who in (side_by_side.OURS, TRANSFORMERS))
        assert theirs["ratio"] == pytest.approx(theirs["median"] / ours["median"])
        assert result["tokens"] == 2 * (16 if result["setting"]["task"] == "train" else 4)
    table = (tmp_path / f"{name}.md").read_text()
    assert all(f"| {task} | float32 | [2, 16] |" in table for task in tasks)


class Constant:
    """A contender whose logits are all the same number."""

    vocab_size, compile_seconds = 8, 0.0

    def __init__(self, value):
        self.value, self.closed = value, False

    def describe(self):
        return str(self.value)

    def last_logits(self, tokens):
        return np.full((len(tokens), self.vocab_size), self.value, np.float32)

    def prepare(self, setting, tokens):
        return lambda: float(1 + abs(self.value) * 2e4)

    def close(self):
        self.closed = True


def measured(theirs, folder):
    flags = side_by_side.parser(
        "", sizes=["one"], size="one", tasks="read,write", contexts="4,64", name="model"
    ).parse_args([f"--output={folder}", "--most-tokens=64", "--new-tokens=2", "--dtypes=float32"])
    benchmark = side_by_side.Benchmark(
        "model", "A model", writes=["write"], goals={"theirs": {"read": 1.0, "write": 2.5}}
    )
    contenders = {side_by_side.OURS: Constant(0.0), "theirs": Constant(theirs)}
    path = side_by_side.measure(
        benchmark, flags, contenders, agree_on=4, model="constant", notes=["a note"]
    )
    assert all(contender.closed for contender in contenders.values())
    return path


def test_table_marks_what_misses_its_goal(tmp_path):
    text = measured(5e-5, tmp_path).read_text()
    assert "logits within 5e-05" in text
    assert "2.5 × theirs for write; 1.0 × theirs for read" in text
    # One second beside two; 4 tokens are read, 2 written, in each row.
    assert "| read | float32 | [1, 4] | 1000.0 | 4 | 2 | 2.00 |" in text
    assert "| write | float32 | [8, 4] | 1000.0 | 16 | 8 | 2.00 ✗ |" in text
    assert "[1, 64]" in text
    assert "[8, 64]" not in text


def test_contenders_that_differ_are_no_comparison(tmp_path):
    with pytest.raises(UserError, match="theirs computes something else: logits differ by"):
        measured(0.01, tmp_path)
