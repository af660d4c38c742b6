"""Features learned from a curated sample beside those from as many random images of the same pool.

The pool is long-tailed: of some handwritten digits (or, without that package, letters) there are
many and of others few. A small DINO learns from each sample without labels, by the command `python
-m dino.train`; `python -m dino.evaluate` then says what its frozen features are good for, on as
many images of every class. Papers meet through their commands and files alone.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.data.assets import asset
from common.data.image_assets import digits
from common.data.image_sets import Glyphs
from common.errors import UserError
from curation.balance import divergence_from_uniform
from curation.experiments.clustering import cluster
from curation.experiments.config import FeaturesConfig
from curation.sampling import balanced_sample

RANDOM, CURATED = "random sample", "two levels, resampled"
NAMES = (RANDOM, CURATED)
TASKS = {"knn": "k=10", "logistic": "accuracy"}  # and the score that counts of each
_SIDE = 28  # pixels of an image
_LETTERS = 26
_COARSE = 4  # pixels of a side that become one of what is clustered

Command = Callable[[Sequence[str]], None]


def measure_features(
    config: FeaturesConfig, folder: Path, command: Command | None = None
) -> dict[str, Any]:
    """Accuracy on features of either sample, and its divergence from equal shares of classes.

    Args:
      config: the pool, the samples, the training.
      folder: of images and runs; a training that was interrupted goes on.
      command: runs `python -m` with these arguments; another process by default.

    Raises:
      UserError: a class has too few images, or a command fails.
    """
    command = command or run
    kind, images, labels = _images(config)
    scores: dict[str, dict[str, list[float]]] = {t: {n: [] for n in NAMES} for t in TASKS}
    divergence: dict[str, list[float]] = {name: [] for name in NAMES}
    pool = np.zeros(0, int)
    for seed in config.seeds:
        place = folder / f"seed{seed}"
        place.mkdir(parents=True, exist_ok=True)
        pool, known, test = split(labels, config, seed)
        for name, rows in (("known", known), ("test", test)):
            np.savez(place / f"{name}.npz", images=images[rows], labels=labels[rows])
        for name, picked in _samples(images[pool], config, seed).items():
            found = np.bincount(labels[pool][picked], minlength=config.classes)
            divergence[name].append(divergence_from_uniform(found))
            stem = name.partition(",")[0].replace(" ", "_")
            file = place / f"{stem}.npz"
            np.savez(file, images=images[pool][picked])
            command(training(config, file, place / stem, seed))
            command(evaluation(place / stem, place))
            told = json.loads((place / stem / "evaluation" / "scores.json").read_text())["scores"]
            for task, score in TASKS.items():
                scores[task][name].append(float(told[task]["model"][score]))
    return {
        "kind": kind,
        "pool": len(pool),
        "known": config.classes * config.known,
        "divergence": {name: float(np.mean(values)) for name, values in divergence.items()},
        "accuracy": {
            task: {name: float(np.mean(values)) for name, values in found.items()}
            for task, found in scores.items()
        },
        "each": scores,
    }


def training(config: FeaturesConfig, images: Path, workdir: Path, seed: int) -> list[str]:
    """The command that learns features of images."""
    steps = config.steps
    settings = {
        "seed": seed,
        "data.images.kind": "arrays",
        "data.images.path": images,
        # Of digits and letters neither colours nor mirror images are to be confused.
        "data.crops.flip": 0.0,
        "data.crops.jitter": 0.0,
        "data.crops.grayscale": 0.0,
        "data.crops.solarize": 0.0,
        "data.crops.global_size": _SIDE,
        "data.crops.global_scale": "0.5,1.0",
        "data.crops.local_size": _SIDE // 2,
        "data.crops.local_scale": "0.2,0.5",
        "data.crops.local_crops": 2,
        "model.backbone.width": 64,
        "model.backbone.num_layers": 3,
        "model.backbone.num_heads": 2,
        "model.backbone.patch_size": 7,
        "model.backbone.image_size": _SIDE,
        "model.backbone.layer_scale": 1.0,
        "objective.teacher_temperature": "0.03,0.03",
        "objective.momentum": "0.98,1.0",
        "objective.freeze_last_layer_steps": steps // 20,
        "train.steps": steps,
        "train.batch_size": config.batch,
        "train.log_every": max(1, steps // 20),
        "train.checkpoint_every": max(1, steps // 2),
        "train.optimizer.warmup_steps": steps // 10,
    }
    changes = [f"--set={name}={value}" for name, value in settings.items()]
    return ["dino.train", "--config=smoke", f"--workdir={workdir}", *changes]


def evaluation(workdir: Path, place: Path) -> list[str]:
    """The command that says what its features are good for."""
    return [
        "dino.evaluate",
        f"--checkpoint={workdir}",
        f"--task={','.join(TASKS)}",
        f"--train={place / 'known.npz'}",
        f"--test={place / 'test.npz'}",
        "--ks=10",
        "--strengths=0.1,1,10,100,1000",
        f"--output={workdir / 'evaluation'}",
    ]


def run(arguments: Sequence[str]) -> None:
    """Runs `python -m` with these arguments, its output in between ours.

    Raises:
      UserError: it fails, with what it says last.
    """
    print(f"python -m {arguments[0]} … {arguments[2]}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        env=os.environ.copy(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise UserError(f"python -m {arguments[0]} failed: {last[0]}")


def split(
    labels: np.ndarray, config: FeaturesConfig, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the images of the long-tailed pool, of those with known labels, and of the test.

    Raises:
      UserError: a class has too few images.
    """
    rng = np.random.default_rng(seed)
    pool, known, test = [], [], []
    apart = config.known + config.held_out
    for rank, label in enumerate(rng.permutation(config.classes)):
        size = max(round(config.largest * config.ratio**rank), config.smallest)
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) < size + apart:
            raise UserError(
                f"features: class {label} has {len(members)} images, and {size} to draw from and "
                f"{apart} to classify are wanted"
            )
        known.append(members[: config.known])
        test.append(members[config.known : apart])
        pool.append(members[apart : apart + size])
    return np.concatenate(pool), np.concatenate(known), np.concatenate(test)


def _samples(images: np.ndarray, config: FeaturesConfig, seed: int) -> dict[str, np.ndarray]:
    """Numbers of the images of either sample; clusters are of coarse pixels."""
    side = _SIDE // _COARSE
    grey = images[..., 0].reshape(len(images), side, _COARSE, side, _COARSE)
    pixels = grey.mean(axis=(2, 4)).reshape(len(images), -1) / 255
    hierarchy = cluster(pixels, config.clusters, seed=seed, resamplings=5)
    rng = np.random.default_rng([seed, 1])
    return {
        RANDOM: rng.choice(len(images), config.size, replace=False),
        CURATED: balanced_sample(hierarchy, config.size, seed=seed),
    }


def _images(config: FeaturesConfig) -> tuple[str, np.ndarray, np.ndarray]:
    """What the images show, uint8 [N, 28, 28, 3], and their classes [N]."""
    try:
        asset("mnist-5k")
    except UserError:
        letters = Glyphs(_SIDE, _LETTERS * (config.largest + config.known + config.held_out))
        assert letters.labels is not None
        chosen = np.flatnonzero(letters.labels < config.classes)
        masks = np.stack([letters.draw(number)[1] for number in chosen])
        images = np.repeat(masks[..., None].astype(np.uint8) * 255, 3, axis=-1)
        return "letters of many typefaces, drawn", images, letters.labels[chosen]
    source = digits()
    assert source.labels is not None
    chosen = np.flatnonzero(source.labels < config.classes)
    images = np.stack([source[number] for number in chosen])
    return "MNIST's handwritten digits", images, source.labels[chosen]
