"""Tables, figures and pictures of `dino.reproduce`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.launch import Figure, Line, Results, Table, write_report
from dino.experiments import collapse, distilled, patches, pretraining, resolution
from dino.experiments.bench import MAIN, PIXELS, RANDOM
from dino.model import Backbone
from dino.pictures import attention_colors, principal_colors, side_by_side

Measured = Mapping[str, Any]
PICTURE = "patches.png"


def write(folder: Path, results: Results) -> Path:
    """Writes `results.json`, figures, tables and the page; returns the page's path."""
    text = ""
    if (folder / PICTURE).exists():
        text = (
            f"![What patches know]({PICTURE})\n\nHeld-out images; the first three principal "
            "components of their patches as colours; where the class token looks in the last "
            "block. By the model after the finish, at its size."
        )
    return write_report(
        folder,
        "Self-distillation of images and patches: the claims, scaled down",
        text=text,
        tables=tables(results.measured),
        figures=figures(results.measured),
        results=results,
    )


def draw_patches(model: Backbone, images: np.ndarray, path: Path) -> None:
    """Draws images `[N, S, S, 3]`, their patches' colours, and attention, a column each."""
    pixels = model.normalize(np.asarray(images, np.float32))
    side = images.shape[1] // model.config.patch_size
    grid = (side, side)
    tokens = np.asarray(model.features(pixels).patches)
    maps = np.asarray(model.attention_maps(pixels))[:, :, 0, model.config.prefix :].mean(1)
    colors = principal_colors(list(tokens), [grid] * len(images), foreground=False)
    columns = [
        side_by_side(_large(image), [color, attention_colors(weights, grid)])
        for image, color, weights in zip(images, colors, maps)
    ]
    width, height = columns[0].size
    gap = width // 40
    canvas = Image.new(
        "RGB", (2 * width + gap, -(-len(columns) // 2) * (height + gap) - gap), "white"
    )
    for n, column in enumerate(columns):
        canvas.paste(column, ((n % 2) * (width + gap), (n // 2) * (height + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def _large(image: np.ndarray) -> np.ndarray:
    scale = max(1, 128 // image.shape[0])
    return image.repeat(scale, axis=0).repeat(scale, axis=1)


def tables(m: Measured) -> list[Table]:
    """A table for each experiment."""
    main, fall, koleo = m["pretraining"], m["collapse"], m["koleo"]
    dense, high, small = m["patches"], m["resolution"], m["distillation"]
    return [
        Table(
            "Features of held-out images",
            ("features", "k-NN", "linear", "precision@1", "mAP", "patches (mIoU)"),
            [
                (label, *(main["scores"][name][key] for key in _MAIN))
                for name, label in pretraining.LABELS.items()
            ],
            f"Chance is {main['chance']:.3f}.",
        ),
        Table(
            "Centring",
            ("centring", "loss", "entropy of prototypes in use", "of each target", "k-NN"),
            [
                (name, *(fall[key][name] for key in ("loss", "usage", "targets", "knn")))
                for name in fall["knn"]
            ],
            f"In nats; equally used prototypes have {fall['uniform']:.3f}. k-NN with random "
            f"weights is {fall['random']:.3f}.",
        ),
        Table(
            "KoLeo",
            ("weight", "distance to the nearest", "mean cosine", "effective rank", "precision@1",
             "mAP", "k-NN", "linear"),
            list(zip(koleo["weights"], *(koleo[key] for key in _KOLEO))),
        ),
        Table(
            "The loss on patches",
            ("training", "patches (mIoU)", "k-NN", "linear"),
            [
                (pretraining.LABELS.get(name, name), *(dense[key][name] for key in _PATCHES))
                for name in (patches.WITH, patches.WITHOUT, PIXELS, RANDOM)
            ],
        ),
        Table(
            f"{high['steps']} steps at {high['size']} pixels",
            ("the finish", "patches (mIoU)", "k-NN"),
            [
                (name, high["patches"][name], high["knn"][name])
                for name in (resolution.BEFORE, resolution.AFTER)
            ],
            f"Both measured at {high['size']} pixels; trained at {high['trained_size']} before.",
        ),
        Table(
            "Distillation",
            ("model", "parameters", "k-NN", "linear", "patches (mIoU)"),
            [
                (name, small["parameters"][name], *(small[key][name] for key in distilled.FIGURES))
                for name in (distilled.TEACHER, distilled.DISTILLED, distilled.SCRATCH)
            ],
            f"The two small models trained for {small['steps']} steps each.",
        ),
    ]  # fmt: skip


_MAIN = ("knn", "linear", "precision@1", "mAP", "patches")
_KOLEO = ("nearest", "mean_cosine", "effective_rank", "precision@1", "mAP", "knn", "linear")
_PATCHES = ("patches", "knn", "linear")


def figures(m: Measured) -> list[Figure]:
    """k-NN while training, the prototypes in use, and what KoLeo spreads."""
    main, fall, koleo = m["pretraining"], m["collapse"], m["koleo"]
    seen = main["curve"]["images"]
    ends = [seen[0], seen[-1]]
    return [
        Figure(
            "knn",
            "k-NN while training",
            "images seen",
            "accuracy",
            [
                Line(pretraining.LABELS[MAIN], seen, main["curve"]["knn"]),
                *(
                    Line(label, ends, [main["scores"][name]["knn"]] * 2, dashed=True)
                    for name, label in pretraining.LABELS.items()
                    if name != MAIN
                ),
            ],
        ),
        Figure(
            "centring",
            "Prototypes in use",
            "step",
            "entropy of the mean target, nats",
            [
                *(Line(name, fall["steps"], fall["curve"][name]) for name in _CENTRINGS),
                Line(
                    "equal use",
                    [fall["steps"][0], fall["steps"][-1]],
                    [fall["uniform"]] * 2,
                    dashed=True,
                ),
            ],
        ),
        Figure(
            "koleo",
            "What KoLeo spreads",
            "weight of KoLeo",
            "",
            [
                Line("median distance to the nearest", koleo["weights"], koleo["nearest"]),
                Line("precision@1", koleo["weights"], koleo["precision@1"]),
                Line("k-NN", koleo["weights"], koleo["knn"]),
            ],
        ),
    ]


_CENTRINGS = (collapse.SINKHORN, collapse.MOVING, collapse.NONE)
