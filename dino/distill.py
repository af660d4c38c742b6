"""`python -m dino.distill`: a student learns from a large frozen teacher; resumes, reports."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from common.data.image_sources import HealthyImages
from common.errors import UserError, nearest
from common.launch import Run, launch
from common.train import TrainResult
from dino import presets
from dino.config import public
from dino.distillation import (
    Distillation,
    DistillationConfig,
    TeacherConfig,
    check_teacher,
    load_teacher,
)
from dino.networks import NetworkConfig
from dino.objective import ObjectiveConfig
from dino.train import train

EXAMPLES = [
    "python -m dino.distill --config=smoke --workdir=runs/distilled",
    "python -m dino.distill --config=cpu --workdir=runs/dino-distilled "
    "--set teacher.checkpoint=runs/dino-cpu",
    "python -m dino.distill --config=vits14 --workdir=runs/vits14 "
    "--set teacher.checkpoint=runs/vitg14 --set data.images.path=images/",
    "python -m dino.distill --config=vits14 --workdir=runs/vits14 --set data.images.path=images/ "
    "--set teacher.checkpoint=dinov2_vitg14_pretrain.pth --set teacher.heads=random",
]
TEACHER_FOLDER = "teacher"


class _Stopped(Exception):
    """A signal stopped the teacher's training."""

    def __init__(self, result: TrainResult):
        super().__init__()
        self.result = result


def distil(
    config: DistillationConfig,
    workdir: Path,
    resume_command: str | None = None,
    *,
    images: HealthyImages | None = None,
) -> TrainResult:
    """Distils in `workdir` from where it stands, and writes the report.

    A teacher that no checkpoint gives is trained first, in a folder below. `images` are those of
    `config.data`, where a caller has opened them for several runs.

    Raises:
      UserError: teacher, config, images, mesh or folder do not fit. What was there stays.
    """
    _check(config)

    def task_of(config: DistillationConfig, mesh: jax.sharding.Mesh) -> Distillation:
        settings = config.teacher
        if settings.checkpoint is None:
            settings = dataclasses.replace(
                settings, checkpoint=_trained_teacher(config, Path(workdir), resume_command)
            )
        teacher, shape = load_teacher(settings, config.model, mesh, config.seed)
        return Distillation(config.model, config.objective, config.train.steps, teacher, shape)

    try:
        return train(config, workdir, resume_command, task_of=task_of, images=images)
    except _Stopped as stopped:
        return stopped.result


def _check(config: DistillationConfig) -> None:
    settings = config.teacher
    if settings.checkpoint is None and settings.preset is None:
        raise UserError(
            "distillation needs a teacher: set teacher.checkpoint (the workdir of a run), or "
            "teacher.preset for one that is trained first"
        )
    if settings.checkpoint is None:
        known = presets.PRESETS
        if settings.preset not in known:
            raise UserError(
                f"teacher.preset: unknown preset '{settings.preset}'"
                f"{nearest(str(settings.preset), known)}"
            )
        check_teacher(config.model, known[str(settings.preset)]().model)


def _trained_teacher(config: DistillationConfig, workdir: Path, resume_command: str | None) -> str:
    """Trains the teacher's preset as far as it is not; returns its folder."""
    own = presets.PRESETS[str(config.teacher.preset)]()
    settings = dataclasses.replace(own.train, mesh=config.train.mesh)
    folder = workdir / TEACHER_FOLDER
    own = dataclasses.replace(own, train=settings, seed=config.seed)
    result = train(own, folder, resume_command)
    if result.preempted:
        raise _Stopped(result)
    return str(folder)


def smoke() -> DistillationConfig:
    """Shows that everything runs: a teacher by `dino.train`'s smoke, and half as deep a student.

    `python -m dino.distill --config=smoke --workdir=runs/distilled`; 2 CPU cores, a minute.
    """
    config = presets.smoke()
    backbone = dataclasses.replace(config.model.backbone, num_layers=1)
    model = dataclasses.replace(config.model, backbone=backbone)
    config = dataclasses.replace(config, model=model)
    return _distilling(config, TeacherConfig(preset="smoke", dtype="float32"))


def cpu() -> DistillationConfig:
    """A quarter of `dino.train`'s cpu model learns from it, on letters in many fonts.

    `python -m dino.distill --config=cpu --workdir=runs/dino-distilled --set
    teacher.checkpoint=runs/dino-cpu`; 2 CPU cores, a quarter of an hour at most. Without a
    checkpoint the teacher is trained first.
    """
    config = presets.cpu()
    shape = {"width": 32, "num_layers": 2, "num_heads": 2}
    backbone = dataclasses.replace(config.model.backbone, **shape)
    model = dataclasses.replace(config.model, backbone=backbone)
    config = dataclasses.replace(config, model=model)
    return _distilling(config, TeacherConfig(preset="cpu", dtype="float32"))


def _published(size: str, registers: int = 0) -> DistillationConfig:
    vit = dataclasses.replace(public(size, registers), image_size=224, dtype="bfloat16")
    config = presets.vitl14()
    optimizer = dataclasses.replace(config.train.optimizer, learning_rate=1e-3, final_fraction=1e-3)
    return _distilling(
        dataclasses.replace(
            config,
            model=NetworkConfig(vit),
            objective=ObjectiveConfig(koleo_group=32),
            train=dataclasses.replace(config.train, batch_size=2048, optimizer=optimizer),
            reference_batch=2048,
        ),
        TeacherConfig(),
    )


def _distilling(config: presets.Config, teacher: TeacherConfig) -> DistillationConfig:
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return DistillationConfig(**fields, teacher=teacher)


def vits14() -> DistillationConfig:
    """ViT-S/14 from ViT-g/14, as published: 79.0 % by k-NN, 81.1 % linear; 4,500 A100 hours."""
    return _published("s")


def vitb14() -> DistillationConfig:
    """ViT-B/14 from ViT-g/14, as published: 82.1 % by k-NN, 84.5 % linear; 5,300 A100 hours."""
    return _published("b")


def vitl14() -> DistillationConfig:
    """ViT-L/14 from ViT-g/14, as published: 83.5 % by k-NN, 86.3 % linear; 8,000 A100 hours."""
    return _published("l")


PRESETS: dict[str, Callable[[], DistillationConfig]] = {
    preset.__name__: preset for preset in (smoke, cpu, vits14, vitb14, vitl14)
}


def _main(run: Run) -> None:
    assert run.workdir is not None
    distil(run.config, run.workdir, run.command)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="dino",
        verb="distill",
        description="Distils a large frozen teacher into a smaller vision transformer; the same "
        "command again resumes.",
        examples=EXAMPLES,
        presets=PRESETS,
        several_processes=True,
        argv=argv,
    )


if __name__ == "__main__":
    main()
