"""What the paper predicts of the measurements, and what is smaller here than there."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common.launch import Expectation, Results
from curation.experiments import concepts, documents, features, pictures, plane
from curation.experiments.config import ReproduceConfig

CLAIM = (
    "k-means applied to its own centroids, level upon level and with resampling, spreads clusters "
    "evenly over where data is, not as densely as data is; a balanced sample of such clusters "
    "represents rare concepts as well as frequent ones, and models learn more from it than from as "
    "many random data (Automatic Data Curation, arXiv:2405.15613)."
)
# Bands of the divergences that are published or follow from other seeds of the same program.
BANDS = {
    "one level": (0.33, 0.36),
    "two levels": (0.125, 0.16),
    "three levels": (0.08, 0.11),
    plane.RESAMPLED: (0.035, 0.055),
}
NEAR = 0.25  # part of the theory's ratio by which a measured one may differ
NEAR_TWICE = 0.4  # the same for the ratio of the second level

Measured = Mapping[str, Any]


def results(config: ReproduceConfig, measured: Measured) -> Results:
    """The claim with its expectations, to be decided by `measured`."""
    expected = EXPECTATIONS + (OF_FEATURES if "features" in measured else ())
    return Results(CLAIM, setting(config, measured), expected, measured)


def setting(config: ReproduceConfig, measured: Measured) -> str:
    """What was run, and plainly what is smaller than in the paper."""
    pool = measured["pictures"]
    kind = {
        pictures.DIGITS: "scikit-learn's handwritten digits",
        pictures.LETTERS: "letters of many typefaces, drawn",
    }[pool["kind"]]
    return (
        f"On {measured['device']}. The plane has the paper's 9,000 points and numbers of clusters "
        f"(seeds {list(config.plane.seeds)}); the two boxes {config.density.large:,} and "
        f"{config.density.small:,} points. Concepts are {config.concepts.concepts} Gaussians of "
        f"{config.concepts.points:,} points in all. Images are {kind}, {pool['pool']} of them in "
        f"classes of {config.pictures.largest} down to {config.pictures.smallest}, of which "
        f"{config.pictures.size} are chosen for a linear classifier "
        f"({len(config.pictures.seeds)} seeds). {_features_setting(config, measured)}"
        f"Documents are {measured['documents']['pool']} "
        f"pieces of {config.documents.packages} packages of Python's library, known by their "
        f"words, of which {config.documents.size} are chosen. Much smaller than in the paper: "
        "there, 743 million web images were clustered to 10 million, 500,000, 50,000 and "
        "10,000 clusters of DINOv2's embeddings, 100 million were sampled, and DINOv2 (ViT-L, "
        "ViT-g), a language model of 7 B parameters and a model of canopy heights were trained on "
        "samples. Those figures are not repeated here."
    )


def _features_setting(config: ReproduceConfig, measured: Measured) -> str:
    if "features" not in measured:
        return ""
    settings, found = config.features, measured["features"]
    return (
        f"Features are those of a vision transformer of 0.2 M parameters, trained by DINOv2's "
        f"recipe for {settings.steps} steps on {settings.size} of {found['pool']} images of "
        f"{found['kind']}, in classes of {settings.largest} down to {settings.smallest}, clustered "
        f"by their pixels, and judged on {found['known']} other images "
        f"({len(settings.seeds)} seeds). "
    )


def falls(values: Sequence[float]) -> bool:
    """Whether each value is below the one before."""
    return all(b < a for a, b in itertools.pairwise(values))


def _near(values: Sequence[float], theory: Sequence[float], part: float) -> bool:
    return all(abs(v - t) <= part * t for v, t in zip(values, theory))


def _plane_order(m: Measured) -> bool:
    found = m["plane"]["divergence"]
    return falls([found[name] for name in (plane.DATA, *plane.LEVELS, plane.RESAMPLED)])


def _plane_bands(m: Measured) -> bool:
    found = m["plane"]["divergence"]
    return all(low <= found[name] <= high for name, (low, high) in BANDS.items())


def _plane_uniform(m: Measured) -> bool:
    found, spread = m["plane"]["divergence"], m["plane"]["uniform_deviation"]
    return found[plane.RESAMPLED] <= found[plane.UNIFORM] + 2 * spread


def _density_exponent(m: Measured) -> bool:
    found = m["density"]
    return _near(found["first"], found["theory"], NEAR) and falls(found["first"][::-1])


def _density_twice(m: Measured) -> bool:
    found = m["density"]
    near = _near(found["second"], found["second_theory"], NEAR_TWICE)
    return near and falls(found["second"][::-1])


def _density_random(m: Measured) -> bool:
    return min(m["density"]["random"]) >= 0.75 * m["density"]["contrast"]


def _concepts_order(m: Measured) -> bool:
    found = m["concepts"]["divergence"]
    flat = falls([found[name] for name in (concepts.RANDOM, concepts.FINE, concepts.COARSE)])
    hierarchies = (concepts.TWO, concepts.RESAMPLED, concepts.THREE)
    return flat and all(found[name] < found[concepts.COARSE] for name in hierarchies)


def _concepts_balance(m: Measured) -> bool:
    found = m["concepts"]["divergence"]
    hierarchies = (concepts.TWO, concepts.RESAMPLED, concepts.THREE)
    return all(found[name] <= found[concepts.RAW] / 10 for name in hierarchies)


def _pictures_balance(m: Measured) -> bool:
    found = m["pictures"]["divergence"]
    flat = falls([found[name] for name in (pictures.RANDOM, pictures.FLAT, pictures.TWO)])
    return flat and found[pictures.RESAMPLED] < found[pictures.FLAT]


def _pictures_accuracy(m: Measured) -> bool:
    found = m["pictures"]["accuracy"]
    best_flat = max(found[pictures.RANDOM], found[pictures.FLAT])
    return min(found[pictures.TWO], found[pictures.RESAMPLED]) > best_flat


def _features_balance(m: Measured) -> bool:
    found = m["features"]["divergence"]
    return found[features.CURATED] < found[features.RANDOM] / 2


def _features_accuracy(task: str) -> Callable[[Measured], bool]:
    def above(m: Measured) -> bool:
        found = m["features"]["accuracy"][task]
        return found[features.CURATED] > found[features.RANDOM]

    return above


def _documents_balance(m: Measured) -> bool:
    found = m["documents"]["divergence"]
    hierarchies = (documents.TWO, documents.RESAMPLED)
    return max(found[name] for name in hierarchies) < min(
        found[documents.RANDOM], found[documents.FLAT]
    )


EXPECTATIONS = (
    Expectation(
        "plane_order",
        "in the plane, the divergence from uniform falls from the data to one level, two, three, "
        "and three with resampling",
        _plane_order,
    ),
    Expectation(
        "plane_bands",
        "one level diverges by 0.33 to 0.36 nats, two by 0.125 to 0.16, three by 0.08 to 0.11, "
        "three with resampling by 0.035 to 0.055 (published: 0.340, 0.132, 0.081, 0.042)",
        _plane_bands,
    ),
    Expectation(
        "plane_uniform",
        "with resampling, centroids are as uniform as points drawn uniformly, within two standard "
        "deviations of those",
        _plane_uniform,
    ),
    Expectation(
        "density_exponent",
        "in every dimension d, centroids follow the density to the power d / (d + 2): the ratio of "
        "their numbers is within 25 % of that, and rises with d",
        _density_exponent,
    ),
    Expectation(
        "density_twice",
        "the second level follows that power of the first (within 40 %: it has but 60 clusters)",
        _density_twice,
    ),
    Expectation(
        "density_random",
        "from random seeds the ratio stays that of the data: seeding by k-means++ is essential",
        _density_random,
    ),
    Expectation(
        "concepts_order",
        "samples of concepts diverge less the better they are clustered: random, 200 clusters, 50 "
        "clusters, and below all of these the hierarchies",
        _concepts_order,
    ),
    Expectation(
        "concepts_balance",
        "samples of hierarchies diverge from equal shares by less than a tenth of the pool",
        _concepts_balance,
    ),
    Expectation(
        "pictures_balance",
        "without labels, samples of images represent classes more evenly: random, flat, two levels",
        _pictures_balance,
    ),
    Expectation(
        "pictures_accuracy",
        "a classifier trained on a sample of a hierarchy is more accurate than one trained on as "
        "many images chosen at random or from flat clusters",
        _pictures_accuracy,
    ),
    Expectation(
        "documents_balance",
        "without labels, samples of texts by hierarchies represent their packages more evenly than "
        "random ones and than flat clusters",
        _documents_balance,
    ),
)
OF_FEATURES = (
    Expectation(
        "features_balance",
        "the curated sample that DINO learns from diverges from equal shares of classes by less "
        "than half of a random one",
        _features_balance,
    ),
    Expectation(
        "features_knn",
        "features learned without labels from a curated sample are better than those from as many "
        "random images of the pool: by k-NN",
        _features_accuracy("knn"),
    ),
    Expectation(
        "features_logistic",
        "the same by logistic regression",
        _features_accuracy("logistic"),
    ),
)
