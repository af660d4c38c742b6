"""DINOv2 against the transformers library: weights in, features at any size, weights out."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import dino
from common.nn.positions import resized_positions

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("highest_precision")]

KINDS = {
    "plain": ("Dinov2", {}),
    "plain swiglu": ("Dinov2", {"use_swiglu_ffn": True}),
    "registers": ("Dinov2WithRegisters", {"num_register_tokens": 3}),
    "registers swiglu": ("Dinov2WithRegisters", {"use_swiglu_ffn": True}),
}
# The table's own grid of 6 × 6, smaller and larger, square and not, and both at once.
SIZES = [(48, 48), (24, 24), (16, 40), (72, 72), (88, 56), (32, 80), (8, 8)]


@functools.cache
def reference(kind: str, head: str = "Model"):
    """A small reference model with every parameter randomised."""
    name, changes = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        mlp_ratio=4,
        image_size=48,
        patch_size=8,
        attn_implementation="eager",
        **changes,
    )
    model = getattr(transformers, f"{name}{head}")(config).eval().float()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def images(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).normal(size=(2, height, width, 3)).astype(np.float32)


def torch_images(array: np.ndarray):
    return torch.from_numpy(array.transpose(0, 3, 1, 2).copy())


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    theirs = reference(request.param)
    folder = tmp_path_factory.mktemp("theirs") / "model"
    theirs.save_pretrained(folder)
    return theirs, dino.load(folder, position_interpolation="hf"), folder


def close(ours, theirs, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=tolerance, rtol=0)


def test_features(pair):
    """Class token, registers and patches at every size; all blocks' raw outputs at one."""
    theirs, ours, _ = pair
    prefix = ours.config.prefix
    for size in SIZES:
        x = images(*size)
        with torch.no_grad():
            expected = theirs(torch_images(x), output_hidden_states=size == (88, 56))
        found = ours.features(x)
        close(found.cls, expected.pooler_output)
        close(found.registers, expected.last_hidden_state[:, 1:prefix])
        close(found.patches, expected.last_hidden_state[:, prefix:])
        if expected.hidden_states is not None:
            raw = ours.features(x, layers=4, norm=False)
            for n in range(4):
                close(raw.cls[n], expected.hidden_states[n + 1][:, 0])
                close(raw.patches[n], expected.hidden_states[n + 1][:, prefix:], 5e-5)


def test_masked_patches(pair):
    theirs, ours, _ = pair
    x = images(48, 48)
    masks = np.random.default_rng(1).random((2, 36)) < 0.4
    with torch.no_grad():
        expected = theirs(torch_images(x), bool_masked_pos=torch.from_numpy(masks))
    found = ours(jnp.asarray(x), masks=jnp.asarray(masks))
    close(found.patches, expected.last_hidden_state[:, ours.config.prefix :])


def test_attention_maps(pair):
    theirs, ours, _ = pair
    x = images(32, 80)
    with torch.no_grad():
        expected = theirs(torch_images(x), output_attentions=True).attentions
    for block in (-1, 0, 2):
        close(ours.attention_maps(x, block), expected[block], 1e-5)


def test_export(pair, tmp_path):
    """What we write, transformers reads, and gives the same features."""
    theirs, ours, _ = pair
    dino.save(ours, tmp_path / "out", "huggingface")
    again, report = type(theirs).from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    x = torch_images(images(32, 80))
    with torch.no_grad():
        np.testing.assert_array_equal(again(x).last_hidden_state, theirs(x).last_hidden_state)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]


@pytest.mark.parametrize("kind", ["plain", "registers swiglu"])
def test_classifiers(kind, tmp_path):
    theirs = reference(kind, "ForImageClassification")
    theirs.save_pretrained(tmp_path / "model")
    ours = dino.load(tmp_path / "model", position_interpolation="hf")
    x = images(24, 24)
    body = theirs.dinov2 if kind == "plain" else theirs.dinov2_with_registers
    with torch.no_grad():
        close(ours.features(x).cls, body(torch_images(x)).pooler_output)


@pytest.mark.parametrize("manner", ["offset", "size", "antialias"])
def test_positions(manner):
    """The three manners are torch's bicubic resize, called in three ways."""
    table = np.random.default_rng(0).normal(size=(37, 37, 5)).astype(np.float32)
    channels_first = torch.from_numpy(table.transpose(2, 0, 1)[None].copy())
    for h, w in [(16, 16), (7, 7), (37, 20), (50, 64), (1, 90), (36, 38)]:
        options = {
            "offset": {"scale_factor": ((h + 0.1) / 37, (w + 0.1) / 37)},
            "size": {"size": (h, w)},
            "antialias": {"size": (h, w), "antialias": True},
        }[manner]
        expected = torch.nn.functional.interpolate(channels_first, mode="bicubic", **options)
        assert expected.shape[2:] == (h, w)
        close(
            np.asarray(resized_positions(jnp.asarray(table), (h, w), manner)),
            expected[0].permute(1, 2, 0),
        )


def test_a_torch_file(tmp_path):
    """A file that torch itself wrote, as a training run of the original code keeps it."""
    width, registers = 64, 2
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 10, width),
        "mask_token": (1, width),
        "register_tokens": (1, registers, width),
        "patch_embed.proj.weight": (width, 3, 8, 8),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for name, shape in {
        "norm1": (width,),
        "norm2": (width,),
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.w12": (344, width),
        "mlp.w3": (width, 172),
    }.items():
        shapes[f"blocks.0.0.{name}.weight"] = shape
        shapes[f"blocks.0.0.{name}.bias"] = shape[:1]
    shapes["blocks.0.0.ls1.gamma"] = shapes["blocks.0.0.ls2.gamma"] = (width,)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    half = {f"module.backbone.{name}": value.half() for name, value in state.items()}
    torch.save({"teacher": half, "iteration": 3}, tmp_path / "teacher_checkpoint.pth")
    ours = dino.load(tmp_path / "teacher_checkpoint.pth")
    assert (ours.config.num_heads, ours.config.registers, ours.config.hidden) == (1, 2, 172)
    kernel = ours.patch_embed.kernel[...].reshape(8, 8, 3, width)
    close(kernel, state["patch_embed.proj.weight"].permute(2, 3, 1, 0).half().float(), 0)
    assert ours.features(images(16, 32)).patches.shape == (2, 8, width)
