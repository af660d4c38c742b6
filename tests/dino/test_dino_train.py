"""`python -m dino.train` and `dino.distill`, as a user types them; starting points; presets."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import dino
from common.checkpoint.store import load_params
from common.launch import config as configs
from common.models.vit import ViTConfig
from common.nn.positions import resized_positions
from common.train import ModelParts
from dino import distill, train
from dino.data import batch_shapes
from dino.distillation import DistillationConfig
from dino.flops import head_flops, training_flops, views_in
from dino.heads import HeadConfig
from dino.networks import Network, NetworkConfig
from dino.presets import PRESETS, Config, compressed, high_resolution, training, vitg14, vitl14
from dino.starting import in_imagenet_colors
from dino.task import Pretraining

# A run of seconds: the smoke preset, smaller still.
SMALL = [
    "--config=smoke",
    "--set=model.backbone.width=16",
    "--set=model.backbone.num_layers=1",
    *(f"--set=model.{head}.{field}" for head in ("dino_head", "ibot_head") for field in (
        "prototypes=32", "bottleneck=8", "hidden=16")),
    "--set=data.images.drawn_count=64",
    "--set=data.crops.local_crops=2",
    "--set=data.masks.group=2",
    "--set=train.steps=6",
    "--set=train.checkpoint_every=3",
    "--set=train.mesh.data=1",
    "--set=train.mesh.fsdp=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.main([*SMALL, f"--workdir={folder}"])
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A backbone as somebody else would publish it: another shape, other colours."""
    vit = ViTConfig(width=16, num_layers=2, num_heads=2, patch_size=4, image_size=24)
    config = dino.BackboneConfig(vit, (0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
    model = dino.Backbone(config, rngs=nnx.Rngs(3))
    folder = tmp_path_factory.mktemp("published") / "backbone"
    dino.save(model, folder, "huggingface")
    return folder


def fails(capsys, *argv, launcher=train) -> str:
    """Runs a training that must refuse; returns the one line it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        launcher.main([str(a) for a in argv])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1, said
    assert "Traceback" not in said
    return said


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    names = ("loss", "dino_local", "ibot", "koleo", "usage_entropy")
    return [(row["step"], *(row[name] for name in names)) for row in lines(folder)]


def params_of(folder, steps, who="teacher", below="backbone"):
    config = configs.from_json(Config, (folder / "config.json").read_text()).model
    network = nnx.eval_shape(lambda: Network(config, rngs=nnx.Rngs(0)))
    abstract = nnx.to_pure_dict(nnx.state(getattr(network, below)))
    path = folder / "checkpoints" / f"step_{steps:08d}"
    return jax.tree.map(np.array, load_params(path, abstract, within=(who, below)))


def forget(folder, step):
    """Takes a run back to its checkpoint before."""
    shutil.rmtree(folder / "checkpoints" / f"step_{step:08d}")


def assert_same(one, other, **tolerance):
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(ours, theirs, **tolerance)


@pytest.mark.smoke
def test_train_writes_a_run(run):
    found = lines(run)
    assert [row["step"] for row in found] == list(range(1, 7))
    assert found[-1]["loss"] < found[0]["loss"]
    assert found[0]["learning_rate"] == 0.0
    assert 0 < found[-1]["usage_entropy"] <= np.log(32) + 1e-5
    assert (run / "report" / "loss.png").stat().st_size > 1000
    model = dino.load(run)
    assert_same(nnx.to_pure_dict(nnx.state(model)), params_of(run, 6))
    student = params_of(run, 6, "student")
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (student, params_of(run, 6)))))


def test_a_stopped_run_goes_on_as_if_it_had_not(run, tmp_path, capsys):
    """Views, masks, teacher and all: bit for bit."""
    folder = tmp_path / "run"
    # Stopped by a signal: its schedules are those of the whole run.
    shutil.copytree(run, folder)
    forget(folder, 6)
    train.main([*SMALL, f"--workdir={folder}"])
    assert "resumed from step 3" in capsys.readouterr().out
    assert losses(folder) == losses(run)
    for who in ("student", "teacher"):
        assert_same(params_of(folder, 6, who), params_of(run, 6, who), rtol=0)


def test_a_high_resolution_stage(run, tmp_path):
    """From a run's student, teacher and heads, with a larger table of positions."""
    folder = tmp_path / "run"
    options = [
        f"--set=checkpoint={run}",
        "--set=resample_positions=true",
        "--set=model.backbone.image_size=24",
        "--set=data.crops.global_size=24",
        "--set=train.optimizer.learning_rate=1e-12",
        "--set=objective.momentum=1,1",
        "--set=train.steps=2",
    ]
    train.main([*SMALL, f"--workdir={folder}", *options])
    before, after = params_of(run, 6), params_of(folder, 2)
    table = np.array(before.pop("pos_embed"))
    resized = resized_positions(table[1:].reshape(4, 4, -1), (6, 6), "offset").reshape(36, -1)
    grown = after.pop("pos_embed")
    np.testing.assert_allclose(grown, np.concatenate([table[:1], resized]), atol=1e-6)
    assert_same(after, before)
    for who in ("student", "teacher"):
        heads = [params_of(f, n, who, "dino_head") for f, n in ((run, 6), (folder, 2))]
        assert_same(*heads, atol=1e-6)
    # At that size the model computes what it did.
    images = np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32)
    one, other = (dino.load(f).features(images) for f in (run, folder))
    np.testing.assert_allclose(one.cls, other.cls, atol=1e-4)


def test_continuing_from_a_published_backbone(backbone, tmp_path, capsys):
    """Its shape and weights, fresh heads, nothing of the backbone moving while these warm up."""
    folder = tmp_path / "run"
    options = [
        *SMALL,
        f"--workdir={folder}",
        f"--set=checkpoint={backbone}",
        "--set=objective.freeze_backbone_steps=3",
        "--set=objective.freeze_last_layer_steps=0",
    ]
    train.main(options)
    end = params_of(folder, 6, "student")
    forget(folder, 6)
    published, own = dino.load(backbone), dino.load(folder)
    assert own.config.num_layers == 2
    assert own.config.table_size == 6
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), np.uint8)
    one, other = (m.features(m.normalize(images)) for m in (published, own))
    np.testing.assert_allclose(one.cls, other.cls, atol=2e-5)
    np.testing.assert_allclose(one.patches, other.patches, atol=2e-5)
    # Resumed without the checkpoint; now the backbone trains too.
    moved = backbone.rename(backbone.with_name("elsewhere"))
    try:
        train.main(options)
    finally:
        moved.rename(backbone)
    assert "resumed from step 3" in capsys.readouterr().out
    assert_same(params_of(folder, 6, "student"), end, rtol=0)
    frozen = params_of(folder, 3, "student")
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (frozen, end))))


def test_colours_are_absorbed_by_the_patch_embedding():
    config = dino.BackboneConfig(
        ViTConfig(width=8, num_layers=1, num_heads=1, patch_size=2, image_size=4),
        (0.1, 0.2, 0.3), (0.5, 0.6, 0.7),
    )  # fmt: skip
    model = dino.Backbone(config, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model))
    other = dino.Backbone(dino.BackboneConfig(config.vit), rngs=nnx.Rngs(0))
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, in_imagenet_colors(params, config))
    nnx.update(other, state)
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    found = [m.patch_embed(m.normalize(images)) for m in (model, other)]
    np.testing.assert_allclose(*found, atol=1e-5)


DISTILL = [*SMALL, "--set=model.backbone.width=8"]


@pytest.mark.smoke
def test_distill(run, tmp_path, capsys):
    folder = tmp_path / "run"
    options = [*DISTILL, f"--workdir={folder}", f"--set=teacher.checkpoint={run}"]
    distill.main([*options, "--set=train.steps=3"])
    # The teacher's weights are in the run's checkpoints, but its shape is the checkpoint's.
    distill.main(options)
    assert "resumed from step 3" in capsys.readouterr().out
    found = lines(folder)
    assert [row["step"] for row in found] == list(range(1, 7))
    assert found[-1]["loss"] < found[0]["loss"]
    assert dino.load(folder).config.width == 8


def test_distill_from_a_backbone_without_heads(backbone, tmp_path, capsys):
    options = [*DISTILL, f"--workdir={tmp_path}/run", f"--set=teacher.checkpoint={backbone}"]
    assert "teacher.heads=random" in fails(capsys, *options, launcher=distill)
    assert not (tmp_path / "run").exists()
    options += ["--set=teacher.heads=random", "--set=train.steps=3"]
    distill.main([*options, "--set=train.checkpoint_every=1"])
    found = lines(tmp_path / "run")
    assert len(found) == 3
    assert np.isfinite([row["loss"] for row in found]).all()


def test_a_teacher_that_does_not_fit(run, tmp_path, capsys):
    options = [*DISTILL, f"--workdir={tmp_path}/run", f"--set=teacher.checkpoint={run}"]
    said = fails(capsys, *options, "--set=model.dino_head.prototypes=48", launcher=distill)
    assert "--set model.dino_head.prototypes=32" in said
    said = fails(capsys, *DISTILL, f"--workdir={tmp_path}/run", "--set=teacher.preset=none",
                 launcher=distill)  # fmt: skip
    assert "set teacher.checkpoint" in said
    said = fails(capsys, *options[:-1], "--set=teacher.checkpoint=/nowhere", launcher=distill)
    assert "no checkpoint at /nowhere" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--config=vitl", "did you mean 'vitl14'"),
        ("--set=objective.centring=sinkhor", "sinkhorn"),
        ("--set=checkpoint=/nowhere", "no checkpoint at /nowhere"),
        ("--set=resample_positions=true", "set checkpoint"),
        ("--set=train.accumulation=2", "accumulation must be 1"),
        ("--set=objective.koleo_group=5", "not whole groups of objective.koleo_group 5"),
        ("--set=data.masks.group=3", "not whole groups of masks.group 3"),
        ("--set=data.crops.global_size=18", "not a multiple of the patch size 4"),
        ("--set=data.images.kind=folder", "no folder of images"),
        ("--set=train.batch_size=7", "batch_size 7 must be a multiple"),
    ],
)
def test_wrong_input_is_refused_in_a_line(tmp_path, capsys, argument, says):
    assert says in fails(capsys, *SMALL, f"--workdir={tmp_path}/new", argument)
    assert not (tmp_path / "new").exists()


def test_a_folder_of_something_else_is_no_run(tmp_path, capsys):
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    (other / "config.json").write_text('{"model": {"width": 3}}')
    said = fails(capsys, *SMALL, f"--workdir={tmp_path}/new", f"--set=checkpoint={other}")
    assert "is not a run of dino" in said


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_gives_a_task_and_can_be_read_back(name):
    config = PRESETS[name]()
    task = train.make_task(config)
    shapes = batch_shapes(config.data, config.model.backbone.patch_size, config.train.batch_size)
    assert task.flops_per_step(shapes) > 0
    assert configs.from_json(Config, configs.to_json(config)) == config


def test_distillations_presets_are_the_published_models():
    for name, preset in distill.PRESETS.items():
        config = preset()
        text = configs.to_json(config)
        assert configs.from_json(DistillationConfig, text) == config
        if name not in ("smoke", "cpu"):
            backbone = dataclasses.replace(config.model.backbone, image_size=518)
            sizes = {"vits14": 22_056_576, "vitb14": 86_580_480, "vitl14": 304_368_640}
            assert backbone.num_parameters() == sizes[name]
            assert config.model.backbone.drop_path == 0.0
            assert training(config).optimizer.learning_rate == 1e-3


def test_the_papers_settings():
    """Section 3.10."""
    large, giant, short = (PRESETS[name]() for name in ("vitl14", "vitg14", "vitl16_short"))
    for config in (large, giant):
        optimizer = training(config).optimizer
        assert optimizer.learning_rate == pytest.approx(3.464102e-4, rel=1e-6)
        assert optimizer.final_fraction * optimizer.learning_rate == pytest.approx(1e-6)
        assert (optimizer.warmup_steps, config.train.steps) == (100_000, 625_000)
        assert config.model.backbone.mlp == "swiglu"
    assert training(short).optimizer.learning_rate == pytest.approx(5.656854e-3, rel=1e-6)
    assert (short.objective.centring, short.model.ibot_head) == ("moving", None)
    assert short.objective.layer_decay == 0.9
    full = dataclasses.replace(large.model.backbone, image_size=518)
    assert full.num_parameters() == 304_794_880
    assert dataclasses.replace(giant.model.backbone, image_size=518).num_parameters() == (
        1_136_480_768
    )


def test_a_compressed_run_keeps_its_shares():
    config = high_resolution(vitl14())
    assert (config.train.steps, config.train.optimizer.warmup_steps) == (10_000, 1600)
    assert config.objective.temperature_steps == 600
    assert config.objective.freeze_last_layer_steps == 20
    crops = config.data.crops
    assert (crops.global_size, crops.local_size) == (518, 224)
    assert config.model.backbone.image_size == 518
    assert compressed(vitl14(), 625_000) == vitl14()


def test_flops_are_the_specifications_count():
    """Section 8.2: 12.7 forward passes of a view, 1.03 TMAC for L and 3.8 for g; heads 9 GMAC."""
    for config, tera, forward in ((vitl14(), 1.03, 81.0), (vitg14(), 3.8, 299.0)):
        vit = config.model.backbone
        assert vit.flops(224, 224) / 2e9 == pytest.approx(forward, rel=0.015)
        whole = dataclasses.replace(
            config.model,
            backbone=dataclasses.replace(vit, drop_path=0.0),
            dino_head=HeadConfig(1, 1, 1),
            ibot_head=None,
        )
        views = views_in(batch_shapes(config.data, 14, 2))
        each = training_flops(whole, whole, views) / 2
        assert each / 2e12 == pytest.approx(tera, rel=0.03)
        assert each / vit.flops(224, 224) == pytest.approx(12.7, rel=0.02)
        dropped = training_flops(config.model, config.model, views) / 2
        assert 0.6 < dropped / each < 0.75
    head = head_flops(HeadConfig(131_072, 384), 1024)
    assert 160 * head / 2e9 == pytest.approx(9, rel=0.05)


def test_flops_match_the_compiler():
    """Counted by hand against XLA's count of a step's gradients, one layer deep."""
    vit = ViTConfig(width=64, num_layers=1, num_heads=1, patch_size=4, image_size=16)
    model = NetworkConfig(vit, HeadConfig(512, 64, 128), HeadConfig(256, 64, 128))
    config = dataclasses.replace(PRESETS["smoke"](), model=model)
    task = Pretraining(model, config.objective, 10, 4)
    data = dataclasses.replace(config.data, masks=dataclasses.replace(config.data.masks, group=4))
    shapes = batch_shapes(data, 4, 4)
    parts = ModelParts(task, 0)
    params, rest = jax.eval_shape(parts.fresh)

    def loss(student, params, rest, batch):
        model = parts.merge({**params, "student": student}, rest)
        return task.loss(model, batch, jax.random.key(0)).total

    lowered = jax.jit(jax.grad(loss)).lower(params["student"], params, rest, shapes)
    counted = lowered.compile().cost_analysis()["flops"]
    assert task.flops_per_step(shapes) == pytest.approx(counted, rel=0.12)
