"""`benchmarks.gpu`: failures stay alone, the table holds everything, nothing heavy is imported."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import gpu, gpu_items, harness, workloads
from benchmarks.gpu_items import Item
from common.kernels import tuning


def result(seconds):
    return {"seconds": seconds, "rate": "1 GB/s", "share": 0.5, "note": ""}


def fail():
    raise RuntimeError("it | is\nbroken")


def refuse():
    raise ValueError("no such thing")


def crash():
    raise SystemExit(-11)  # as a signal would look to the parent


def late():
    raise SystemExit("late")


@pytest.fixture
def section(monkeypatch):
    """Replaces all sections by one of given items, run in this process instead of others."""

    def replace(**measures):
        items = [Item("task", name, measure) for name, measure in measures.items()]
        monkeypatch.setattr(gpu_items, "sections", lambda: {"some": (1.0, lambda tiny: items)})

    def call(command, deadline):
        *_, name, path = command
        try:
            return gpu.run_items(name, Path(path), tiny=False)
        except SystemExit as end:
            return None if end.code == "late" else end.code

    monkeypatch.setattr(gpu, "_call", call)
    return replace


def collected():
    return [record for record in gpu.collect("some", deadline=0.0) if "what" in record]


def test_a_failure_leaves_the_others(section):
    section(ours=functools.partial(result, 1.0), bad=fail, worse=crash, last=lambda: result(2.0))
    ours, bad, worse, last = collected()
    assert (ours["seconds"], last["seconds"]) == (1.0, 2.0)
    assert bad["note"] == "failed: RuntimeError: it | is broken"
    assert worse["note"] == "failed: exit code -11"


def test_a_refusal_needs_no_fresh_process(section, tmp_path):
    section(bad=refuse, ours=lambda: result(1.0))
    assert gpu.run_items("some", tmp_path / "records", tiny=False) == 0
    section(bad=fail, ours=lambda: result(1.0))
    assert gpu.run_items("some", tmp_path / "others", tiny=False) != 0


def test_the_deadline_leaves_what_was_measured(section):
    section(ours=lambda: result(1.0), slow=late, never=lambda: result(2.0))
    ours, slow = collected()
    assert ours["seconds"] == 1.0
    assert (slow["contender"], slow["note"]) == ("slow", "no time left")


def test_a_process_that_cannot_begin_is_not_started_again(monkeypatch):
    calls = []
    monkeypatch.setattr(gpu, "_call", lambda command, deadline: calls.append(command) or 1)
    [record] = gpu.collect("attention", deadline=0.0)
    assert len(calls) == 1
    assert (record["what"], record["note"]) == ("attention", "failed: exit code 1")


def test_table_has_ratios_and_remarks(section, tmp_path, capsys):
    section(ours=lambda: result(1.0), peer=lambda: result(2.5), bad=fail)
    assert gpu.main(["--output", str(tmp_path), "--name", "here"]) == 0
    printed = capsys.readouterr().out
    assert "| task | ours | 1000.000 | 1 GB/s | 50% | 1.00 |  |" in printed
    assert "| task | peer | 2500.000 | 1 GB/s | 50% | 2.50 |  |" in printed
    assert "| task | bad |  |  |  |  | failed: RuntimeError: it ¦ is broken |" in printed
    assert printed.rstrip().endswith("|"), "the table comes last"
    [rows] = json.loads((tmp_path / "here.json").read_text())["sections"].values()
    assert len(rows) == 3


def test_unknown_section_is_one_line(capsys):
    assert gpu.main(["--sections", "scan"]) == 2
    assert capsys.readouterr().err.startswith("benchmarks.gpu: no section 'scan'; there are linear")


@pytest.mark.smoke
def test_smoke_tiny_section_in_its_own_process(tmp_path, capsys):
    arguments = ["--tiny", "--sections", "nearest_centroid", "--output", str(tmp_path)]
    assert gpu.main(arguments) == 0
    text = (tmp_path / "gpu.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| nearest_centroid")]
    assert [row.split(" | ")[1] for row in rows] == ["ours", "plain XLA", "full matrix, argmin"]
    assert all("TFLOP/s" in row and "failed" not in row for row in rows)
    assert "off by" in rows[0]


def test_imports_nothing_that_a_gpu_machine_lacks():
    program = (
        "import sys, benchmarks.gpu, benchmarks.gpu_items;"
        "loaded = {name.split('.')[0] for name in sys.modules};"
        "print(loaded & {'grain', 'tensorflow_datasets', 'torch', 'orbax', 'array_record'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=gpu._ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "set()"


def test_device_seconds_runs_the_whole_program():
    x = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    seconds, results = harness.device_seconds(
        lambda x, pair: (x + pair["y"], pair["y"].sum()), (x, {"y": 2 * x}), calls=3, repeats=2
    )
    assert len(seconds) == 2
    np.testing.assert_array_equal(results[0], 3 * x)
    np.testing.assert_array_equal(results[1], 2 * x.sum())


@pytest.mark.parametrize("kernel", workloads.KERNELS)
def test_contenders_compute_the_same(kernel):
    for workload in workloads.of(kernel, tiny=True):
        program, operands = workload.prepare(workload.ours("reference"))
        want = jax.jit(program)(*operands)
        for name, function in {"xla": workload.ours("xla"), **workload.peers}.items():
            program, operands = workload.prepare(function)
            error = workloads.error(jax.jit(program)(*operands), want)
            assert error < 3e-2, f"{workload.name}: {name}"


@pytest.mark.parametrize("form", ["gpu", "tpu"])
@pytest.mark.parametrize("kernel", workloads.KERNELS)
def test_every_kernel_has_blocks_to_tune(kernel, form):
    for workload in workloads.of(kernel):
        function, operands = workload.ours(form), jax.eval_shape(workload.operands)
        if workload.direction == "backward":
            outputs = jax.eval_shape(function, *operands)
            function, operands = backward(function), (outputs, *operands)
        with tuning.trial({}) as trial:
            jax.jit(function).trace(*operands)
        kernels = {question.kernel for question in trial.asked}
        assert len(kernels) >= (2 if workload.direction == "backward" else 1), workload.name


def backward(function):
    return lambda cotangents, *operands: jax.vjp(function, *operands)[1](cotangents)


def test_gradients_ask_for_blocks_when_they_are_compiled():
    _, workload = workloads.of("attention", tiny=True)
    program, operands = workload.prepare(workload.ours("gpu"))
    with tuning.trial({}) as trial:
        jax.jit(program).trace(*operands)
    assert trial.asked
    assert not [question for question in trial.asked if question.kernel == "forward"]


def test_bytes_count_every_array_once():
    forward, backward, *_ = workloads.of("linear_scan", tiny=True)
    array = 4 * 2 * 10 * 128
    assert forward.bytes_moved() == 3 * array  # a, x; h
    # a, h and its gradient; those of a and x. The first state is small.
    assert 5 * array <= backward.bytes_moved() < 5.2 * array


def test_error_of_results_that_are_not_numbers():
    assert np.isnan(workloads.error([np.array([np.nan])], [np.array([1.0])]))
    assert workloads.error([np.array([1, 2])], [np.array([1, 3])]) == 0.5
