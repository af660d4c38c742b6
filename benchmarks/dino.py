"""DINOv2's features and training against the transformers library and a step in torch.

    python -m benchmarks.dino [--tasks features,train] [--models s,b] [--dtypes float32,bfloat16]

Needs torch and transformers in this environment. Both sides have the same weights and take turns.
Features must agree in every setting, and so must the first step's loss and its parts, without drop
path. Results go to `benchmarks/results/`.

"features" is `Backbone.features` beside `Dinov2Model`, and with registers beside
`Dinov2WithRegistersModel`. "train" is the trainer's step beside one written in torch for this
benchmark (`peers/dino_torch_step.py`): student and teacher, two global and eight local crops, all
three losses, Sinkhorn-Knopp, clipping, AdamW, the teacher's move.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks import harness
from benchmarks.peers import dino_workload as workload
from benchmarks.peers.contender import Run
from benchmarks.peers.dino_tenfold import Tenfold, save_backbone
from benchmarks.peers.dino_workload import Setting
from common.errors import UserError

OURS, FEATURES, STEP = "Tenfold", "transformers", "torch"
GOALS = {"features": 1.0, "train": 1.2}
# Differences from theirs: of fp32 features against their largest, of bf16 features 1 - cosine of
# each token, of the losses' parts against the loss.
_TOLERANCE = {"float32": 3e-5, "bfloat16": 1e-3}
_LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True)
class Result:
    """One row: what was measured, how far apart the results are, seconds by contender."""

    setting: Setting
    flops: float
    difference: float | None
    measurements: dict[str, harness.Measurement]


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default="features,train")
    parser.add_argument("--models", default="s,b", help=f"of {', '.join(workload.MODELS)}")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--sizes", default="", help="SIZE:BATCH of images, instead of the usual")
    parser.add_argument("--prototypes", type=int, default=8192, help="of each head")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--clock",
        default="wall",
        choices=("wall", "cpu"),
        help="cpu: this process's CPU seconds on one core, for a machine that others use too",
    )
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    parser.add_argument("--name", default="dino", help="stem of the result files")
    flags = parser.parse_args(arguments)
    harness.run_as_launchers_do()
    try:
        path = _run(flags)
    except UserError as error:
        print(f"benchmarks.dino: {error}", file=sys.stderr)
        return 2
    print(path.read_text())
    print(f"written to {path}")
    return 0


def settings(flags: argparse.Namespace) -> list[Setting]:
    """What the flags ask for.

    Raises:
        UserError: a task or model that is not there.
    """
    models, tasks = flags.models.split(","), flags.tasks.split(",")
    for name, known in [(m, workload.MODELS) for m in models] + [(t, GOALS) for t in tasks]:
        if name not in known:
            raise UserError(f"no '{name}'; there are {', '.join(known)}")
    given = [tuple(map(int, pair.split(":"))) for pair in flags.sizes.split(",") if pair]
    found = []
    for dtype, task, model in itertools.product(flags.dtypes.split(","), tasks, models):
        smallest = model == models[0]
        if task == "features":
            usual = [(224, 1), (224, 8), (518, 1)] if smallest else [(224, 1), (224, 8)]
            found += [Setting(task, model, dtype, n, size) for size, n in given or usual]
            if smallest:
                size, n = (given or usual)[0]
                found.append(Setting("features, registers", model, dtype, n, size))
        elif smallest:
            usual = [(224, 4), (112, 8)]
            pairs = given or usual
            found += [Setting(task, model, dtype, n, size) for size, n in pairs]
            found.append(Setting(task, model, dtype, pairs[0][1], pairs[0][0], drop_path=0.4))
    return found


def _run(flags: argparse.Namespace) -> Path:
    wanted = settings(flags)
    if importlib.util.find_spec("transformers") is None:
        raise UserError("the benchmark needs torch and transformers: run it by `make bench`")
    if flags.clock == "cpu":
        _keep_to_one_core()
    ours = Tenfold(flags.prototypes)
    results = []
    for setting in wanted:
        measure = _train if setting.task == "train" else _features
        results.append(measure(setting, ours, flags))
        print(" ".join(_row(results[-1])), file=sys.stderr, flush=True)
        ours.close()
    return _write(flags, results, ours)


def _features(setting: Setting, ours: Tenfold, flags: argparse.Namespace) -> Result:
    # Loads torch, so it waits until here.
    from benchmarks.peers.dino_transformers import Transformers

    theirs, images = Transformers(), workload.images(setting)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "model")
        save_backbone(setting, folder)
        found, expected = (x.features(setting, folder, images) for x in (ours, theirs))
        difference = _difference(setting, found, expected)
        if not difference < _TOLERANCE[setting.dtype]:
            raise UserError(f"features of {setting} differ by {difference:.2g}")
        runs = {
            OURS: ours.prepare_features(setting, folder, images),
            FEATURES: theirs.prepare_features(setting, folder, images),
        }
    return _timed(setting, runs, ours, flags, difference)


def _keep_to_one_core() -> None:
    """Before JAX and torch count the cores for their threads."""
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("--clock=cpu needs Linux")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def _difference(setting: Setting, found: np.ndarray, expected: np.ndarray) -> float:
    if setting.dtype == "float32":
        return float(np.abs(found - expected).max() / np.abs(expected).max())
    product = np.sum(found * expected, axis=-1)
    lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
    return float(np.max(1 - product / lengths))


def _train(setting: Setting, ours: Tenfold, flags: argparse.Namespace) -> Result:
    from benchmarks.peers import dino_torch_step

    batch, params = workload.training_batch(setting), ours.fresh_params(setting)
    difference = None
    if not setting.drop_path:
        found = ours.loss(setting, params, batch)
        step = dino_torch_step.TorchStep(setting, flags.prototypes, params, batch)
        expected = {name: float(value.detach()) for name, value in step.step().items()}
        difference = max(abs(found[name] - expected[name]) for name in expected)
        difference /= abs(expected["loss"])
        if not difference < _LOSS_TOLERANCE[setting.dtype]:
            raise UserError(f"losses of {setting} differ: {found} and {expected}")
    runs = {
        OURS: ours.prepare_train(setting, params, batch),
        STEP: dino_torch_step.prepare(setting, flags.prototypes, params, batch),
    }
    return _timed(setting, runs, ours, flags, difference)


def _timed(
    setting: Setting,
    runs: dict[str, Run],
    ours: Tenfold,
    flags: argparse.Namespace,
    difference: float | None,
) -> Result:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(flags.repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            elapsed = run()
            if flags.clock == "cpu":
                elapsed = time.process_time() - start
            if turn:  # The first turn warms up.
                seconds[name].append(elapsed)
    measured = harness.summarise(seconds, OURS)
    return Result(setting, ours.flops(setting), difference, measured)


def _row(result: Result) -> list[str]:
    setting, ours = result.setting, result.measurements[OURS]
    peer = next(m for name, m in result.measurements.items() if name != OURS)
    goal = GOALS[setting.task.split(",")[0]]
    least = harness.least_seconds(result.flops, 0)
    share = f" ({least / ours.median:.0%} MFU)" if least else ""
    return [
        setting.name,
        f"ViT-{setting.model.upper()}",
        setting.dtype,
        f"{setting.batch} × {setting.size}²",
        f"{1e3 * ours.median:.1f}",
        f"{setting.batch / ours.median:.2f}{share}",
        f"{result.flops / ours.median / 1e9:.0f}",
        f"{setting.batch / peer.median:.2f}",
        f"{peer.ratio:.2f}{'' if peer.ratio >= goal else ' ✗'}",
        "–" if result.difference is None else f"{result.difference:.0e}",
    ]


_HEADS = (
    "task",
    "model",
    "compute",
    "images",
    "ours ms",
    "ours images/s",
    "ours GFLOP/s",
    "peer images/s",
    "ours × peer",
    "difference",
)


def _write(flags: argparse.Namespace, results: list[Result], ours: Tenfold) -> Path:
    import torch

    from benchmarks.peers.dino_transformers import Transformers

    where = "cuda" if torch.cuda.is_available() else "cpu"
    notes = [
        f"Tenfold: {ours.describe()}; {ours.compile_seconds:.0f} s compiling in all, not counted",
        f"peers, on {where}: features by transformers {Transformers().describe()}; training by a "
        "step in torch that was written for this (fused AdamW, packed crops, bf16 by autocast)",
        "train: 2 global crops of the size given, 8 local ones of 98/224 of it, "
        f"{flags.prototypes} prototypes in either head; the batch is noise",
        "GFLOP/s: products counted by hand, over our time",
        "difference: of features, largest over largest in float32, 1 - cosine of a token in "
        "bfloat16; of training, of the first loss and its parts over the loss",
        *(["one core; times are CPU seconds"] if flags.clock == "cpu" else []),
        "times are medians of interleaved repeats; a ratio is the median of the ratios of "
        "neighbouring repeats, above 1 where ours is faster",
        f"goals: {GOALS['features']} × for features, {GOALS['train']} × for training; ✗ marks a "
        "ratio below",
    ]
    return harness.write_page(
        flags.output,
        flags.name,
        "DINOv2: features, training",
        notes,
        [
            "",
            f"| {' | '.join(_HEADS)} |",
            "|---|---|---|---|" + "---:|" * (len(_HEADS) - 4),
            *(f"| {' | '.join(_row(result))} |" for result in results),
        ],
        {
            "backend": jax.default_backend(),
            "results": [dataclasses.asdict(result) for result in results],
        },
    )


if __name__ == "__main__":
    sys.exit(main())
