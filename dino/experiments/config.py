"""Presets of `dino.reproduce`."""

import dataclasses

from common.data.image_corpus import DRAWN
from common.errors import UserError
from common.models.vit import ViTConfig
from common.train import OptimizerConfig
from dino.presets import Config, high_resolution, small


@dataclasses.dataclass(frozen=True)
class ScoresConfig:
    """How much every trained model is measured on.

    Attributes:
      train_images: labelled images, of those that were trained on: neighbours of k-NN, the gallery
        of retrieval, and what linear classifiers are fitted to.
      test_images: held-out images that are classified, and queries of retrieval.
      dense_images: labelled and held-out images of the probes of single patches.
      neighbours: k of k-NN.
      shown: held-out images in the pictures of patches and attention.
    """

    train_images: int = 8_000
    test_images: int = 2_000
    dense_images: tuple[int, int] = (1_000, 500)
    neighbours: int = 20
    shown: int = 8


@dataclasses.dataclass(frozen=True)
class ResolutionConfig:
    """The high-resolution finish.

    Attributes:
      size: pixels of its global crops.
      steps: its length.
      batch_size: images of its steps.
    """

    size: int
    steps: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """The student of the distillation, and of the same training without a teacher.

    Attributes:
      width, num_layers, num_heads: its shape; all else is that of the large model.
    """

    width: int
    num_layers: int
    num_heads: int


@dataclasses.dataclass(frozen=True)
class ReproduceConfig:
    """All experiments.

    Attributes:
      run: the training that every other one changes in one point: Sinkhorn-Knopp, KoLeo, and the
        loss on patches. Its images are drawn, so that the class of every pixel is known.
      koleo: other weights of KoLeo: none, and much.
      resolution: the high-resolution finish.
      student: of the distillation.
      scores: what models are measured on.
      seed: of everything.
    """

    run: Config
    resolution: ResolutionConfig
    student: StudentConfig
    scores: ScoresConfig = ScoresConfig()
    koleo: tuple[float, float] = (0.0, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        images, objective = self.run.data.images, self.run.objective
        if images.kind not in DRAWN or not 0 < images.heldout_fraction < 1:
            raise UserError(
                f"run.data.images: kind must be one of {', '.join(DRAWN)}, with a heldout_fraction"
            )
        if images.split != "train":
            raise UserError(
                "run.data.images.split must be train: the held-out images are for tests"
            )
        if objective.centring != "sinkhorn" or objective.ibot_weight <= 0:
            raise UserError("run.objective must be Sinkhorn-Knopp's with the loss on patches")
        if not 0 == self.koleo[0] < objective.koleo_weight < self.koleo[1]:
            raise UserError(
                "koleo must be 0 and a weight above run.objective.koleo_weight, which is above 0"
            )
        if self.run.checkpoint is not None:
            raise UserError("run.checkpoint: experiments train from scratch")
        if self.resolution.size <= self.run.data.crops.global_size:
            raise UserError("resolution.size must be above run.data.crops.global_size")
        if min(dataclasses.astuple(self.scores)[:2] + self.scores.dense_images) < 2:
            raise UserError("scores: images must be at least 2 of each kind")
        if self.scores.neighbours < 1:
            raise UserError("scores.neighbours must be at least 1")

    @property
    def seeded(self) -> Config:
        """The run with the experiments' seed."""
        return dataclasses.replace(self.run, seed=self.seed)

    @property
    def finish(self) -> Config:
        """The high-resolution finish, without the checkpoint that it goes on from."""
        config = high_resolution(self.seeded, self.resolution.size, self.resolution.steps)
        train = dataclasses.replace(
            config.train,
            batch_size=self.resolution.batch_size,
            checkpoint_every=self.resolution.steps,
            log_every=max(1, self.resolution.steps // 20),
        )
        images = dataclasses.replace(config.data.images, drawn_size=self.resolution.size)
        data = dataclasses.replace(config.data, images=images)
        return dataclasses.replace(config, train=train, data=data)

    @property
    def small_backbone(self) -> ViTConfig:
        """The student's shape."""
        return dataclasses.replace(self.run.model.backbone, **dataclasses.asdict(self.student))


def smoke() -> ReproduceConfig:
    """Every experiment once, too short for most outcomes: shows that everything runs.

    `python -m dino.reproduce --config=smoke --workdir=runs/dino-reproduce-smoke`; 2 CPU cores,
    97 seconds, most of them compilation. The student is as large as its teacher, so that
    there is less to compile.
    """
    run = small(steps=50, batch_size=32)
    shape = StudentConfig(width=48, num_layers=2, num_heads=2)
    backbone = dataclasses.replace(run.model.backbone, **dataclasses.asdict(shape))
    head = dataclasses.replace(run.model.dino_head, prototypes=64, bottleneck=32, hidden=64)
    model = dataclasses.replace(run.model, backbone=backbone, dino_head=head, ibot_head=head)
    images = dataclasses.replace(run.data.images, drawn_count=1_200)
    return ReproduceConfig(
        run=dataclasses.replace(
            run,
            model=model,
            data=dataclasses.replace(run.data, images=images),
            train=dataclasses.replace(run.train, checkpoint_every=25),
        ),
        resolution=ResolutionConfig(size=64, steps=10, batch_size=32),
        student=shape,
        scores=ScoresConfig(
            train_images=600, test_images=200, dense_images=(60, 40), neighbours=10
        ),
    )


def cpu() -> ReproduceConfig:
    """Every arm for 1,200 steps of 64 images.

    `python -m dino.reproduce --config=cpu --workdir=runs/dino-reproduce-cpu`; 24 minutes on 2 CPU
    cores, 12 of 18 outcomes as expected.
    """
    return ReproduceConfig(
        run=small(steps=1_200, batch_size=64),
        resolution=ResolutionConfig(size=64, steps=120, batch_size=64),
        student=StudentConfig(width=32, num_layers=2, num_heads=2),
    )


def gpu() -> ReproduceConfig:
    """A wider and deeper model, finer patches, and four million images an arm.

    `python -m dino.reproduce --config=gpu --workdir=runs/dino-reproduce-gpu`; one GPU, whose host
    has 16 cores to make crops with: an estimated two hours. Not run yet.
    """
    run = small(steps=16_000, batch_size=256, size=64)
    backbone = dataclasses.replace(run.model.backbone, width=192, num_layers=6, num_heads=3)
    head = dataclasses.replace(run.model.dino_head, prototypes=512, bottleneck=128, hidden=512)
    train = dataclasses.replace(
        run.train, optimizer=_slower(run.train.optimizer, 5e-4), log_every=100
    )
    model = dataclasses.replace(run.model, backbone=backbone, dino_head=head, ibot_head=head)
    return ReproduceConfig(
        run=dataclasses.replace(run, model=model, train=train),
        resolution=ResolutionConfig(size=128, steps=1_000, batch_size=128),
        student=StudentConfig(width=128, num_layers=3, num_heads=2),
        scores=ScoresConfig(dense_images=(2_000, 1_000)),
    )


def _slower(optimizer: OptimizerConfig, rate: float) -> OptimizerConfig:
    return dataclasses.replace(optimizer, learning_rate=rate)


PRESETS = {"smoke": smoke, "cpu": cpu, "gpu": gpu}
