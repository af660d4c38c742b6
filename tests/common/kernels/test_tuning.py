"""Block sizes: the table, trials, and the search that fills the table."""

import json
import math
import time

import jax
import jax.numpy as jnp
import pytest

from benchmarks import tune, workloads
from common.kernels import nearest_centroid, tuning

DEFAULT = {"rows": 128, "warps": 4}
DEVICE = tuning.device_name(jax.devices()[0])


def entry(shape, rows, **changes):
    head = {"device": DEVICE, "kernel": "forward", "dtype": "float32", **changes}
    return {**head, "shape": shape, "blocks": {"rows": rows}, "microseconds": 1.0}


def ask(folder, **shape):
    return tuning.blocks(folder, "forward", jnp.float32, shape, DEFAULT)


@pytest.fixture
def folder(tmp_path):
    """A kernel's folder with a table."""
    entries = [
        entry({"N": 1000}, 1),
        entry({"N": 4000}, 2),
        entry({"N": 4000}, 3, device="another"),
        entry({"N": 4000}, 4, dtype="bfloat16"),
        entry({"N": 4000}, 5, kernel="backward"),
        entry({"N": 4000, "K": 1}, 6),
    ]
    (tmp_path / "tuning.json").write_text(json.dumps(entries))
    return tmp_path


@pytest.mark.parametrize(
    ("size", "rows"), [(1000, 1), (1900, 1), (2100, 2), (63_000, 2), (65_000, 128), (60, 128)]
)
def test_nearest_shape_of_the_same_kind_counts(folder, size, rows):
    assert ask(folder, N=size) == {"rows": rows, "warps": 4}


def test_without_a_table(tmp_path):
    assert ask(tmp_path, N=1000) == DEFAULT


def test_trial_answers_and_notes_what_else_is_asked(folder):
    question = tuning.Question(folder, "forward", "float32", (("N", 1000),))
    with tuning.trial({question: {"rows": 7, "warps": 1}}) as trial:
        assert ask(folder, N=1000) == {"rows": 7, "warps": 1}
        assert ask(folder, N=4000) == {"rows": 2, "warps": 4}
    assert list(trial.asked.values()) == [{"rows": 2, "warps": 4}]
    assert ask(folder, N=1000) == {"rows": 1, "warps": 4}


def test_trial_reaches_what_was_traced_before():
    x = jnp.ones((20, 3))
    search = jax.jit(lambda x: nearest_centroid(x, x, "gpu"))
    for _ in range(2):
        with tuning.trial({}) as trial:
            search(x)
        assert len(trial.asked) == 1


def workload(folder, *, wrong_at=None):
    """Something that asks for block sizes, and is wrong with one number of rows."""

    def ours(form):
        def program(x):
            rows = ask(folder, N=x.shape[0])["rows"]
            return x + 1.0 if form == "gpu" and rows == wrong_at else x

        return program

    return workloads.Workload("copy", "forward", "", lambda: (jnp.ones(50),), ours, {})


def clock_with_best(rows, warps):
    def clock(program, operands):
        jax.eval_shape(program, *operands)
        trial = tuning._trial.get()
        [blocks] = (trial.answers or trial.asked).values()
        return 1.0 + abs(math.log(blocks["rows"] / rows)) + abs(math.log(blocks["warps"] / warps))

    return clock


def tuned(folder, some, clock, minutes=1.0):
    tune.tune(some, "gpu", clock, deadline=time.monotonic() + 60 * minutes)
    return json.loads((folder / "tuning.json").read_text())


def test_search_finds_the_fastest_blocks_and_kernels_take_them(tmp_path, capsys):
    [found] = tuned(tmp_path, workload(tmp_path), clock_with_best(rows=32, warps=8))
    assert found["blocks"] == {"rows": 32, "warps": 8}
    assert (found["device"], found["microseconds"]) == (DEVICE, 1e6)
    assert ask(tmp_path, N=50) == {"rows": 32, "warps": 8}


def test_search_leaves_other_entries_alone_and_replaces_its_own(folder, capsys):
    before = json.loads((folder / "tuning.json").read_text())
    for _ in range(2):
        *others, found = tuned(folder, workload(folder), clock_with_best(rows=256, warps=2))
        assert others == before
        assert found["shape"] == {"N": 50}


def test_wrong_results_are_never_taken(tmp_path, capsys):
    some = workload(tmp_path, wrong_at=64)
    [found] = tuned(tmp_path, some, clock_with_best(rows=32, warps=4))
    assert found["blocks"]["rows"] == 128
    assert "differs from the oracle" in capsys.readouterr().out


def test_search_stops_in_time(tmp_path, capsys):
    clock = clock_with_best(rows=1, warps=1)
    [found] = tuned(tmp_path, workload(tmp_path), clock, minutes=0)
    assert found["blocks"] == DEFAULT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "only a CPU"), (["--kernels", "attention,scan"], "no kernel 'scan'")],
)
def test_mistakes_end_with_one_line(arguments, message, capsys):
    assert tune.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
