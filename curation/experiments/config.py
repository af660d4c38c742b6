"""Presets of `curation.reproduce`."""

import dataclasses

from common.errors import UserError


@dataclasses.dataclass(frozen=True)
class PlaneConfig:
    """The simulated distribution in two dimensions (figure 3).

    Attributes:
      seeds: one run each; the table shows their means.
      iterations: of Lloyd's algorithm.
      resamplings: per level, after the first clustering; of `sample_size` points of each cluster.
      uniform_draws: how often the lower bound, uniform points, is drawn.
    """

    seeds: tuple[int, ...] = (0,)
    iterations: int = 50
    resamplings: int = 10
    sample_size: int = 2
    uniform_draws: int = 20


@dataclasses.dataclass(frozen=True)
class DensityConfig:
    """How the density of centroids follows that of the data, by dimension (section 3.2).

    Attributes:
      dimensions: of two boxes, one `large` and one `small` number of uniform points in each.
      clusters: of the data, and of those clusters' centroids.
      iterations: of Lloyd's algorithm, for both.
    """

    dimensions: tuple[int, ...] = (1, 2, 4, 8)
    large: int = 50_000
    small: int = 1_000
    clusters: tuple[int, int] = (600, 60)
    iterations: tuple[int, int] = (20, 50)


@dataclasses.dataclass(frozen=True)
class ConceptsConfig:
    """Long-tailed concepts: Gaussians whose sizes follow Zipf's law.

    Attributes:
      seeds: one draw of everything each.
      concepts, width, points: how many, in how many dimensions, points of all.
      size: of the samples.
    """

    seeds: tuple[int, ...] = (0, 1)
    concepts: int = 50
    width: int = 16
    points: int = 10_000
    size: int = 1_000


@dataclasses.dataclass(frozen=True)
class PicturesConfig:
    """Long-tailed images: a classifier is trained on samples of equal size.

    Attributes:
      kind: "small-digits" (scikit-learn's), "letters" (drawn), or "auto": the first if it is here.
      seeds: one order of the classes each.
      largest, ratio, smallest: the class of rank r has `max(largest * ratio ** r, smallest)`.
      classes: how many of the set's.
      size: of the samples.
      held_out: images of each class to test on.
      clusters: of two levels; the flat baseline has those of the upper one.
    """

    kind: str = "auto"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    largest: int = 120
    ratio: float = 0.65
    smallest: int = 3
    classes: int = 10
    size: int = 60
    held_out: int = 50
    clusters: tuple[int, int] = (100, 30)


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    """A small DINO learns from samples of a long-tailed pool of images.

    Attributes:
      seeds: one pool, its samples and their trainings each; none leaves the experiment out.
      largest, ratio, smallest: the class of rank r has `max(largest * ratio ** r, smallest)`.
      classes: how many of the set's.
      size: of the samples.
      known, held_out: images of each class that classifiers on the features have, and are tested
        on.
      clusters: of two levels.
      steps, batch: of a training, and images of a step.
    """

    seeds: tuple[int, ...] = ()
    largest: int = 350
    ratio: float = 0.65
    smallest: int = 10
    classes: int = 10
    size: int = 300
    known: int = 50
    held_out: int = 100
    clusters: tuple[int, int] = (250, 60)
    steps: int = 600
    batch: int = 64


@dataclasses.dataclass(frozen=True)
class DocumentsConfig:
    """Texts of Python's own library, of some of whose packages there are many and of others few.

    Attributes:
      seeds: one order of the packages each.
      characters: documents are pieces of so many.
      packages: the largest ones, which count as concepts.
      largest, ratio, smallest: the package of rank r has at most `largest * ratio ** r` pieces, and
        at least `smallest`.
      width: dimensions of the texts' vectors.
      size: of the samples.
      clusters: of two levels; the flat baseline has those of the upper one.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    characters: int = 4_000
    packages: int = 10
    largest: int = 120
    ratio: float = 0.65
    smallest: int = 5
    width: int = 24
    size: int = 60
    clusters: tuple[int, int] = (140, 60)


@dataclasses.dataclass(frozen=True)
class ReproduceConfig:
    """All experiments.

    Attributes:
      seed: of what has no seeds of its own.
    """

    plane: PlaneConfig = PlaneConfig()
    density: DensityConfig = DensityConfig()
    concepts: ConceptsConfig = ConceptsConfig()
    pictures: PicturesConfig = PicturesConfig()
    features: FeaturesConfig = FeaturesConfig()
    documents: DocumentsConfig = DocumentsConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("plane", "concepts", "pictures", "documents"):
            if not getattr(self, name).seeds:
                raise UserError(f"{name}.seeds needs at least one")
        if list(self.density.dimensions) != sorted(set(self.density.dimensions)):
            raise UserError("density.dimensions must rise")


def smoke() -> ReproduceConfig:
    """The plane and the density at full size, without training DINO on samples.

    `python -m curation.reproduce --config=smoke --workdir=runs/curation-smoke`; 2 CPU cores, at
    most two minutes; all outcomes as expected.
    """
    return ReproduceConfig()


def cpu() -> ReproduceConfig:
    """Three seeds of the plane, five of the concepts, and six trainings of a small DINO.

    `python -m curation.reproduce --config=cpu --workdir=runs/curation-cpu`; 11 minutes on 2 CPU
    cores, 13 of 14 outcomes as expected.
    """
    return ReproduceConfig(
        plane=PlaneConfig(seeds=(0, 1, 2)),
        concepts=ConceptsConfig(seeds=(0, 1, 2, 3, 4)),
        features=FeaturesConfig(seeds=(0, 1, 2)),
    )


def gpu() -> ReproduceConfig:
    """As `cpu`, with more seeds, and longer trainings.

    `python -m curation.reproduce --config=gpu --workdir=runs/curation-gpu`; one GPU, minutes.
    """
    return dataclasses.replace(
        cpu(),
        plane=PlaneConfig(seeds=(0, 1, 2, 3, 4)),
        features=FeaturesConfig(seeds=(0, 1, 2, 3, 4), steps=3_000),
    )


PRESETS = {"smoke": smoke, "cpu": cpu, "gpu": gpu}
