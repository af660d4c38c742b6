"""What the paper predicts of the measurements, and what is smaller here than there."""

from collections.abc import Mapping
from typing import Any

from common.launch import Expectation, Results
from dino.experiments import collapse, distilled, patches, resolution
from dino.experiments.bench import MAIN, PIXELS, RANDOM
from dino.experiments.config import ReproduceConfig

CLAIM = (
    "Self-distillation between crops and of masked patches, with Sinkhorn-Knopp centring and "
    "KoLeo, learns features that are useful without fine-tuning, of images and of patches; each "
    "part of the recipe does what it is there for (DINOv2, arXiv:2304.07193)."
)
SMALLER = (
    "Smaller than in the paper: there, ViT-g of 1.1 B parameters and 131,072 prototypes learned "
    "from 142 M curated photographs in 625,000 steps of 3,072, at 224 pixels with 8 local crops (2 "
    "here) and then 518; the ablations were of ViT-L on ImageNet-22k, and "
    "features were measured on ImageNet, ADE20K and Oxford. Here the teacher's temperature and "
    "momentum are lower and LayerScale begins at 1, for so short runs. Differences below some "
    "points are noise of one seed."
)
MARGIN = 0.05  # Of accuracy, by which pretraining must beat what is untrained.
SAME = 0.03  # Of accuracy, within which two models are as good.
NOISE = 0.01  # About one standard error of an accuracy on 2,000 images.
POINTS = 0.02  # Of mean intersection over union: "several points".
USED, UNUSED = 0.9, 0.1  # Of the entropy of equally used prototypes.

Measured = Mapping[str, Any]


def results(config: ReproduceConfig, measured: Measured) -> Results:
    """The claim with its expectations, to be decided by `measured`."""
    return Results(CLAIM, setting(config, measured), EXPECTATIONS, measured)


def setting(config: ReproduceConfig, measured: Measured) -> str:
    """What was run, and plainly what is smaller than in the paper."""
    found, crops = measured["pretraining"], config.run.data.crops
    vit = config.run.model.backbone
    pictures = {
        "letter-scenes": "white letters in many fonts at any place and size on black",
        "shape-scenes": "white shapes of eight kinds at any place, size and angle on black",
        "animal-scenes": "real silhouettes of ten animals at any place, size and direction",
        "shapes": "drawn shapes of eight kinds",
        "glyphs": "letters in many fonts over pieces of a photograph",
    }[found["kind"]]
    return (
        f"On {measured['device']}. Images are {pictures}, {found['images']:,} to train on and "
        f"{found['test_images']:,} held out, of {crops.global_size} pixels. Every arm trains a ViT "
        f"of {vit.num_layers} blocks of {vit.width} ({found['parameters']:,} parameters, patches "
        f"of {vit.patch_size}) from scratch on {found['seen']:,} images with 2 + "
        f"{crops.local_crops} crops each, {config.run.model.dino_head.prototypes} prototypes. k-NN "
        f"is by {config.scores.neighbours} neighbours. One seed ({config.seed}). {SMALLER}"
    )


def _hard(m: Measured) -> bool:
    return m["pretraining"]["scores"][PIXELS]["knn"] < 0.5


def _beats(key: str, other: str) -> Any:
    def holds(m: Measured) -> bool:
        scores = m["pretraining"]["scores"]
        return scores[MAIN][key] >= scores[other][key] + MARGIN

    return holds


def _centred(m: Measured) -> bool:
    found = m["collapse"]
    least = USED * found["uniform"]
    return min(found["usage"][collapse.SINKHORN], found["usage"][collapse.MOVING]) >= least


def _centred_learn(m: Measured) -> bool:
    found, pixels = m["collapse"]["knn"], m["pretraining"]["scores"][PIXELS]["knn"]
    return min(found[collapse.SINKHORN], found[collapse.MOVING]) > pixels


def _uncentred(m: Measured) -> bool:
    found = m["collapse"]
    return found["usage"][collapse.NONE] <= UNUSED * found["uniform"]


def _uncentred_fails(m: Measured) -> bool:
    found = m["collapse"]
    return found["knn"][collapse.NONE] <= found["random"] + NOISE


def _koleo_rises(name: str) -> Any:
    def holds(m: Measured) -> bool:
        none, paper, _ = m["koleo"][name]
        return paper > none

    return holds


def _koleo_retrieves(m: Measured) -> bool:
    none, paper, _ = m["koleo"]["precision@1"]
    return paper >= none


def _koleo_classifies(m: Measured) -> bool:
    none, paper, _ = m["koleo"]["linear"]
    return abs(paper - none) <= SAME


def _patches_rise(m: Measured) -> bool:
    found = m["patches"]["patches"]
    return found[patches.WITH] >= found[patches.WITHOUT] + POINTS


def _patches_keep_images(m: Measured) -> bool:
    found = m["patches"]["knn"]
    return abs(found[patches.WITH] - found[patches.WITHOUT]) <= SAME


def _finish_helps_patches(m: Measured) -> bool:
    found = m["resolution"]["patches"]
    return found[resolution.AFTER] > found[resolution.BEFORE]


def _finish_keeps_images(m: Measured) -> bool:
    found = m["resolution"]["knn"]
    return found[resolution.AFTER] >= found[resolution.BEFORE] - NOISE


def _distilled(m: Measured) -> bool:
    found = m["distillation"]["knn"]
    return found[distilled.DISTILLED] >= found[distilled.SCRATCH]


EXPECTATIONS = (
    Expectation(
        "pixels_do_not_solve_it",
        "raw pixels classify less than half of the held-out images by k-NN",
        _hard,
    ),
    Expectation(
        "beats_pixels",
        "pretrained features classify at least 5 points more of them by k-NN than raw pixels",
        _beats("knn", PIXELS),
    ),
    Expectation(
        "beats_random_weights",
        "and at least 5 points more than the same model with random weights",
        _beats("knn", RANDOM),
    ),
    Expectation(
        "linear_beats_pixels",
        "a linear classifier on them is at least 5 points better than one on raw pixels",
        _beats("linear", PIXELS),
    ),
    Expectation(
        "linear_beats_random_weights",
        "and than one on the model with random weights",
        _beats("linear", RANDOM),
    ),
    Expectation(
        "centring_uses_prototypes",
        "with Sinkhorn-Knopp and with a moving centre the entropy of the prototypes in use is at "
        "least 90 % of that of equal use",
        _centred,
    ),
    Expectation(
        "centring_learns",
        "with either, k-NN beats raw pixels",
        _centred_learn,
    ),
    Expectation(
        "no_centring_collapses",
        "without centring that entropy falls below 10 %",
        _uncentred,
    ),
    Expectation(
        "no_centring_learns_nothing",
        "and k-NN is no better than with random weights (within a point)",
        _uncentred_fails,
    ),
    Expectation(
        "koleo_spreads",
        "with KoLeo the median distance between nearest features is larger than without",
        _koleo_rises("nearest"),
    ),
    Expectation(
        "koleo_raises_rank",
        "and so is the effective rank of the features",
        _koleo_rises("effective_rank"),
    ),
    Expectation(
        "koleo_retrieves",
        "and the nearest image is at least as often of the same class",
        _koleo_retrieves,
    ),
    Expectation(
        "koleo_classifies_alike",
        "linear classification differs by at most 3 points",
        _koleo_classifies,
    ),
    Expectation(
        "patches_improve",
        "the loss on patches raises the mean intersection over union of a linear classifier of "
        "single patches by 2 points or more",
        _patches_rise,
    ),
    Expectation(
        "patches_keep_images",
        "and k-NN of images differs by at most 3 points",
        _patches_keep_images,
    ),
    Expectation(
        "finish_improves_patches",
        "after a short training at twice the resolution, single patches are classified better "
        "there than before it",
        _finish_helps_patches,
    ),
    Expectation(
        "finish_keeps_images",
        "and k-NN of images there does not fall (by more than a point)",
        _finish_keeps_images,
    ),
    Expectation(
        "distilled_beats_scratch",
        "a small student of the frozen teacher is at least as good by k-NN as the same model "
        "trained from scratch for as many steps",
        _distilled,
    ),
)
