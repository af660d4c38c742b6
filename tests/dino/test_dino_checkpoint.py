"""Backbones from every format they come in, and back; files that are not what they should be."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_backbone import BASE, REGISTERS, SIZES, huggingface, images, tensors, timm
from safetensors.numpy import load_file, save_file
from torch_writer import Call, Global, archive, write_tensors

import dino
from common import values
from common.checkpoint import save_params
from common.convert import convert
from common.errors import UserError
from common.sharding import MeshConfig, make_mesh
from dino.heads import HeadConfig
from dino.networks import NetworkConfig, Pair


def parameters(model) -> dict:
    return nnx.to_pure_dict(nnx.state(model))


def assert_same(model, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, parameters(model), parameters(other))


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict:
    """Each size from the bare file that the goldens are checked with."""
    folder = tmp_path_factory.mktemp("original")
    return {
        size: dino.load(write_tensors(folder / f"{size}.pth", tensors(config)), num_heads=3)
        for size, config in SIZES.items()
    }


def prefixed(prefix: str, arrays: dict) -> dict:
    return {f"{prefix}{name}": array for name, array in arrays.items()}


def chunked(arrays: dict, size: int = 2) -> dict:
    """Blocks in chunks, which keep their numbers (a training run's files)."""

    def renamed(name: str) -> str:
        if not name.startswith("blocks."):
            return name
        number = int(name.split(".")[1])
        return name.replace("blocks.", f"blocks.{number // size}.")

    return {renamed(name): array for name, array in arrays.items()}


HEADS = {"dino_head.mlp.0.weight": np.ones((4, 24), np.float32)}
STUDENT = {name: array + 1 for name, array in tensors(BASE).items()}
WRAPPERS = {
    "model": {"model": tensors(BASE), "iteration": 7},
    "teacher": {"teacher": {**prefixed("backbone.", tensors(BASE)), **HEADS}},
    "module": {"teacher": prefixed("module.backbone.", tensors(BASE))},
    "bare with heads": {**tensors(BASE), **HEADS},
    "chunks": {"teacher": prefixed("backbone.", chunked(tensors(BASE)))},
    "bare chunks": chunked(tensors(BASE), 1),
    "training state": {
        "model": {
            **prefixed("student.backbone.", STUDENT),
            **prefixed("teacher.backbone.", tensors(BASE)),
            **prefixed("teacher.", HEADS),
        },
        "optimizer": {
            "state": {0: {"step": np.ones(1, np.float32)}},
            "param_groups": [{"lr": 1.0}],
        },
    },
    "sharded": {
        "teacher": prefixed("_fsdp_wrapped_module.backbone._fsdp_wrapped_module.", tensors(BASE))
    },
    "compiled": {"state_dict": prefixed("_orig_mod.", tensors(BASE))},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers(wrapper, originals, tmp_path):
    file = write_tensors(tmp_path / "state.pth", WRAPPERS[wrapper])
    assert_same(dino.load(file, num_heads=3), originals["base"])
    assert_same(dino.load(tmp_path, num_heads=3), originals["base"])  # The one file of a folder.


@pytest.mark.parametrize("size", SIZES)
def test_timm(size, originals, tmp_path):
    config = {"architecture": "vit_x", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(timm(tensors(SIZES[size])), tmp_path / "model.safetensors")
    model = dino.load(tmp_path, num_heads=3)
    assert model.backbone_config.image_mean == (0.5, 0.5, 0.5)
    assert model.mask_token is None
    sizes = images(28, 42)
    ours, theirs = originals[size].features(sizes), model.features(sizes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), ours, theirs)
    # One file of its own is enough.
    lone = dino.load(tmp_path / "model.safetensors", num_heads=3)
    assert_same(lone, model)
    assert lone.backbone_config.image_mean == (0.485, 0.456, 0.406)


def huggingface_folder(folder, size: str, in_memory: bool = False, prefix: str = "", **changes):
    config = SIZES[size]
    data = {
        "model_type": "dinov2_with_registers" if config.registers else "dinov2",
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "mlp_ratio": 4,
        "image_size": 56,
        "patch_size": 14,
        "use_swiglu_ffn": config.mlp == "swiglu",
        "num_register_tokens": config.registers,
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data))
    arrays = prefixed(prefix, huggingface(tensors(config), in_memory))
    if prefix:
        arrays["classifier.weight"] = np.ones((5, 48), np.float32)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(arrays, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_huggingface(size, in_memory, originals, tmp_path):
    model = dino.load(huggingface_folder(tmp_path, size, in_memory))
    assert_same(model, originals[size])
    # Its MLP's width is what a file of tensors tells, too.
    assert model.config.hidden == originals[size].config.hidden
    assert model.config.interpolation == originals[size].config.interpolation


@pytest.mark.parametrize("size", ["base", "registers"])
def test_classifiers(size, originals, tmp_path):
    kind = "dinov2_with_registers" if size == "registers" else "dinov2"
    folder = huggingface_folder(tmp_path, size, prefix=f"{kind}.")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5307] * 3}))
    model = dino.load(folder)
    assert_same(model, originals[size])
    assert model.backbone_config.image_mean == (0.5307,) * 3


@pytest.mark.parametrize("size", SIZES)
def test_export_is_what_was_read(size, originals, tmp_path):
    dino.save(originals[size], tmp_path / "out", "huggingface")
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = huggingface(tensors(SIZES[size]))
    assert written.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(written[name], array)
    assert_same(dino.load(tmp_path / "out"), originals[size])


def test_workspace(originals, tmp_path):
    dino.save(originals["registers"], tmp_path / "own")
    again = dino.load(tmp_path / "own", dtype="bfloat16", param_dtype="float32")
    assert_same(again, originals["registers"])
    assert again.config.interpolation == "antialias"
    assert again.config.dtype == "bfloat16"
    with pytest.raises(UserError, match="not empty"):
        dino.save(originals["base"], tmp_path / "own")
    with pytest.raises(UserError, match="unknown format"):
        dino.save(originals["base"], tmp_path / "new", "onnx")


def test_convert(originals, tmp_path):
    """`python -m common.convert --package=dino`, both ways."""
    folder = huggingface_folder(tmp_path / "theirs", "swiglu")
    convert("dino", folder, tmp_path / "ours", "workspace")
    convert("dino", tmp_path / "ours", tmp_path / "back", "huggingface", "bfloat16")
    assert_same(dino.load(tmp_path / "ours"), originals["swiglu"])
    back = dino.load(tmp_path / "back")
    rounded = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), parameters(originals["swiglu"])
    )
    jax.tree.map(np.testing.assert_array_equal, parameters(back), rounded)


def test_mesh(originals, tmp_path):
    folder = huggingface_folder(tmp_path, "base")
    model = dino.load(folder, mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    assert_same(model, originals["base"])
    assert len(model.blocks.attention.qkv[...].addressable_shards[0].data.shape) == 4
    assert model.blocks.mlp.up.kernel[...].addressable_shards[0].data.shape == (3, 12, 48)


def test_positions_of_both_manners(originals, tmp_path):
    folder = huggingface_folder(tmp_path, "base")
    theirs = dino.load(folder, position_interpolation="hf")
    assert theirs.config.interpolation == "size"
    assert (
        np.abs(
            theirs.features(images(56, 56)).cls - originals["base"].features(images(56, 56)).cls
        ).max()
        == 0
    )
    other = theirs.features(images(28, 42)).cls - originals["base"].features(images(28, 42)).cls
    assert np.abs(other).max() > 1e-3
    registers = huggingface_folder(tmp_path / "r", "registers")
    assert dino.load(registers, "hf").config.interpolation == "antialias"
    with pytest.raises(UserError, match="must be 'hub' or 'hf'"):
        dino.load(folder, "timm")


def test_a_training_run_gives_its_teacher(tmp_path):
    network = NetworkConfig(BASE, HeadConfig(8, 4, 4), None)
    pair = Pair(network, rngs=nnx.Rngs(1))
    teacher = pair.teacher.backbone
    teacher.cls_token[...] = teacher.cls_token[...] + 1
    save_params(tmp_path / "checkpoints", nnx.to_pure_dict(nnx.state(pair, nnx.Param)))
    config = {"model": values.encode(network, NetworkConfig), "seed": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = dino.load(tmp_path, dtype="bfloat16", param_dtype="float32")
    assert_same(model, dino.as_backbone(teacher))
    assert model.config == dataclasses.replace(BASE, dtype="bfloat16")
    (tmp_path / "config.json").write_text(json.dumps({"model": {"vocab_size": 3}}))
    with pytest.raises(UserError, match=r"no 'model\.backbone': not a run of dino"):
        dino.load(tmp_path)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    proof = tmp_path / "ran"
    calls = (
        Call("posix system", f"touch {proof}"),
        Call("builtins eval", f"open({str(proof)!r}, 'w')"),
    )
    for call in calls:
        file = archive(tmp_path / "bad.pth", {"teacher": call})
        with pytest.raises(UserError, match="wants to run"):
            dino.load(file)
    file = archive(tmp_path / "bad.pth", {"cls_token": Global("numpy.core.multiarray scalar")})
    with pytest.raises(UserError, match="wants to run"):
        dino.load(file)
    assert not proof.exists()


def without(arrays: dict, *names: str) -> dict:
    return {name: array for name, array in arrays.items() if name not in names}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"weight": np.ones((2, 2), np.float32)}, "holds no backbone"),
        ({"a": tensors(BASE), "b": tensors(BASE)}, "several backbones .'a.', 'b.'."),
        (without(tensors(BASE), "blocks.1.ls1.gamma"), "missing tensors .'blocks.1.ls1.gamma'"),
        ({**tensors(BASE), "blocks.0.extra": np.ones(3, np.float32)}, "unexpected tensors"),
        (
            {**tensors(BASE), "pos_embed": np.ones((1, 16, 24), np.float32)},
            "15 patches, which are no square",
        ),
        ({**tensors(BASE), "norm.weight": np.ones(5, np.float32)}, r"\[5\], not \[24\]"),
        ({**tensors(BASE), **chunked(tensors(BASE))}, "in two chunks"),
        ({**tensors(BASE), **prefixed("module.", tensors(BASE))}, "twice"),
        ({**tensors(BASE), "patch_embed.proj.weight": np.ones(3, np.float32)}, "4 dimensions"),
        (
            {k: v for k, v in tensors(BASE).items() if not k.startswith("blocks.")},
            "no blocks",
        ),
        (
            {**tensors(BASE), "blocks.99999999999.norm1.bias": np.ones(24, np.float32)},
            "does not fit",
        ),
    ],
)
def test_other_checkpoints(tree, message, tmp_path):
    file = write_tensors(tmp_path / "other.pth", tree)
    with pytest.raises(UserError, match=message):
        dino.load(file, num_heads=3)


def test_heads_that_cannot_be_told(tmp_path):
    file = write_tensors(tmp_path / "narrow.pth", tensors(BASE))
    with pytest.raises(UserError, match="give num_heads"):
        dino.load(file)
    with pytest.raises(UserError, match="multiple of"):
        dino.load(file, num_heads=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "vit"}, "model_type is 'vit'"),
        ({"hidden_size": "24"}, "hidden_size is '24'"),
        ({"num_hidden_layers": 10**18}, "not a natural number"),
        ({"num_hidden_layers": 5}, "missing tensors"),
        ({"num_hidden_layers": 900_000}, "states 900000 layers"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"mlp_ratio": -1}, "mlp_ratio"),
        ({"layer_norm_eps": None}, "layer_norm_eps"),
        ({"image_size": 70}, "pos"),
        ({"patch_size": [14, 7]}, "patch_size"),
        ({"use_swiglu_ffn": 1}, "use_swiglu_ffn"),
        ({"num_attention_heads": 0}, "num_heads"),
    ],
)
def test_other_configurations(changes, message, tmp_path):
    folder = huggingface_folder(tmp_path, "base", **changes)
    with pytest.raises(UserError, match=message):
        dino.load(folder)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        dino.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no model"):
        dino.load(tmp_path)
    for name in "ab":
        write_tensors(tmp_path / f"{name}.pth", tensors(BASE))
    with pytest.raises(UserError, match=r"2 \.pth files: name one"):
        dino.load(tmp_path)
    damaged = tmp_path / "c.pth"
    damaged.write_bytes((tmp_path / "a.pth").read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged or truncated"):
        dino.load(damaged)


def test_what_huggingface_cannot_express(tmp_path):
    for change, message in (({"layer_scale": None}, "LayerScale"), ({"mlp_width": 50}, "ratio")):
        config = dino.BackboneConfig(dataclasses.replace(REGISTERS, **change))
        with pytest.raises(UserError, match=message):
            dino.save(dino.Backbone(config, rngs=nnx.Rngs(0)), tmp_path / "out", "huggingface")
