"""Loading DINOv2's backbones from any format they come in, and saving them again."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx

from common import values
from common.checkpoint import (
    TensorReader,
    open_checkpoint,
    open_huggingface,
    subtree,
)
from common.errors import UserError
from common.models.loading import (
    Placement,
    check_layers,
    open_workspace,
    read_json,
    recognise,
    save_huggingface,
    save_workspace,
    write_as,
)
from common.models.vit import ViT, ViTConfig
from common.nn.positions import Interpolation
from common.sharding import DEFAULT_RULES, Rules
from dino import convert
from dino.config import IMAGENET_MEAN, IMAGENET_STD, BackboneConfig, Color
from dino.model import Backbone

PACKAGE = "dino"
# Where the model of a run's configuration has its backbone, and its parameters the teacher's.
RUN_MODEL = "backbone"
RUN_BACKBONE = ("teacher", "backbone")
PREPROCESSOR = "preprocessor_config.json"
_TORCH_SUFFIXES = (".pth", ".pt")

Positions = Literal["hub", "hf"]


def load(
    path: str | Path,
    position_interpolation: Positions = "hub",
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    param_dtype: jax.typing.DTypeLike | None = None,
    num_heads: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    remat: Literal["none", "full", "dots"] = "none",
) -> Backbone:
    """Loads a backbone.

    Args:
      path: an original .pth, bare or a training state with the teacher in it; a Hugging Face folder
        (Dinov2Model, Dinov2WithRegistersModel, or their classifiers, whose head is left out); a
        timm folder or file; a workspace model folder; or the workdir of a training run (the teacher
        of its newest checkpoint).
      position_interpolation: how the position table is resized for images of other sizes: "hub" as
        the weights were trained and torch.hub has it, "hf" as transformers does; the two differ
        for models without registers.
      dtype: compute dtype.
      param_dtype: dtype the parameters are kept in; default `dtype`'s.
      num_heads: of an original checkpoint whose heads are not 64 wide; the file does not tell.
      mesh: places each parameter on its shards, without ever holding the whole model on one host.
      rules: logical axis names to mesh axes.
      remat: what the backward pass recomputes.

    Raises:
      UserError: nothing there, damaged, or another model's checkpoint.
    """
    path = Path(path)
    kind = recognise(path)
    if position_interpolation not in ("hub", "hf"):
        raise UserError(
            f"position_interpolation must be 'hub' or 'hf', not {position_interpolation!r}"
        )
    placement = Placement(dtype if param_dtype is None else param_dtype, mesh, rules)
    options = _Options(dtype, remat, position_interpolation)
    if kind == "workspace":
        return _load_workspace(path, placement, options)
    data = read_json(path / "config.json") if kind == "huggingface" else {}
    if "model_type" in data:
        return _load_huggingface(path, data, placement, options)
    return _load_original(path, data, num_heads, placement, options)


def save(
    model: Backbone,
    path: str | Path,
    format: Literal["workspace", "huggingface"] = "workspace",
    dtype: jax.typing.DTypeLike | None = None,
) -> None:
    """Writes a backbone to a new folder.

    Args:
      model: the backbone.
      path: the folder; must not exist or be empty.
      format: "workspace", or "huggingface" as `Dinov2Model.from_pretrained` (with registers:
        `Dinov2WithRegistersModel`) reads it.
      dtype: dtype of the stored parameters; default as they are.

    Raises:
      UserError: the folder is not empty, or the format cannot express the model.
    """
    path = Path(path)

    def workspace() -> None:
        config = values.encode(model.backbone_config, BackboneConfig)
        save_workspace(model, path, PACKAGE, config, dtype)

    def huggingface() -> None:
        _save_huggingface(model, path, dtype)

    write_as(path, format, {"workspace": workspace, "huggingface": huggingface})


def as_backbone(vit: ViT, config: BackboneConfig | None = None) -> Backbone:
    """The same parameters as a `Backbone`; a training run's teacher, say.

    Args:
      vit: the trunk.
      config: of the backbone; None: the trunk's with ImageNet's mean and deviation.
    """
    config = BackboneConfig(vit.config) if config is None else config
    model = nnx.eval_shape(lambda: Backbone(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.state(vit)))
    return nnx.merge(graphdef, state)


@dataclasses.dataclass(frozen=True)
class _Options:
    """What the caller decides of the model, whatever its checkpoint says."""

    dtype: Literal["float32", "bfloat16"]
    remat: Literal["none", "full", "dots"]
    positions: Positions

    def config(self, vit: ViTConfig, mean: Color, std: Color) -> BackboneConfig:
        vit = dataclasses.replace(vit, dtype=self.dtype, remat=self.remat)
        if self.positions == "hf":
            manner: Interpolation = "antialias" if vit.registers else "size"
            vit = dataclasses.replace(vit, interpolation=manner)
        return BackboneConfig(vit, mean, std)


def _builder(config: BackboneConfig):
    return lambda: Backbone(config, rngs=nnx.Rngs(0))


def _load_huggingface(
    path: Path, data: dict[str, Any], placement: Placement, options: _Options
) -> Backbone:
    where = path / "config.json"
    vit = convert.config_from_huggingface(data, str(where))
    reader = open_huggingface(path)
    reader = subtree(reader, *(f"{kind}." for kind in reversed(convert.MODEL_TYPES)))
    check_layers(where, vit.num_layers, reader)
    rows = convert.huggingface_rows(vit, reader.keys())
    config = options.config(vit, *_colors(path / PREPROCESSOR, "image_mean", "image_std"))
    return placement.from_tensors(_builder(config), reader, rows, convert.IGNORED_HUGGINGFACE)


def _load_original(
    path: Path,
    data: dict[str, Any],
    num_heads: int | None,
    placement: Placement,
    options: _Options,
) -> Backbone:
    """The original's file, or timm's file or folder."""
    reader = convert.backbone_tensors(_open(path))
    vit = convert.config_from_tensors(reader, num_heads)
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if "pretrained_cfg" in data:  # timm's
        mean, std = _colors(path / "config.json", "mean", "std", within="pretrained_cfg")
    rows = convert.original_rows(vit, reader.keys())
    build = _builder(options.config(vit, mean, std))
    return placement.from_tensors(build, reader, rows, convert.IGNORED)


def _open(path: Path) -> TensorReader:
    """The tensors of a file, or of a folder of which it is clear which file is meant."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _TORCH_SUFFIXES)
        if len(files) == 1:
            return open_checkpoint(files[0])
        if len(files) > 1:
            raise UserError(f"{path} has {len(files)} .pth files: name one, as {files[0]}")
    return open_checkpoint(path)


def _load_workspace(path: Path, placement: Placement, options: _Options) -> Backbone:
    """A model folder, or a run's workdir with its checkpoints."""
    saved = open_workspace(path, PACKAGE, f"of {PACKAGE}")
    if (path / "model.json").is_file():
        stored = values.decode(saved.config, BackboneConfig, "", saved.where)
        config = options.config(stored.vit, stored.image_mean, stored.image_std)
        return placement.from_params(_builder(config), saved.params)
    found = saved.config.get(RUN_MODEL)
    if not isinstance(found, dict):
        raise UserError(f"{saved.where} has no 'model.{RUN_MODEL}': not a run of {PACKAGE}")
    vit = values.decode(found, ViTConfig, f"model.{RUN_MODEL}", saved.where)
    config = options.config(vit, IMAGENET_MEAN, IMAGENET_STD)
    return placement.from_params(_builder(config), saved.params, RUN_BACKBONE)


def _colors(file: Path, mean: str, std: str, within: str | None = None) -> tuple[Color, Color]:
    """Mean and deviation of images as a configuration file states them; else ImageNet's."""
    data: Any = read_json(file, missing_ok=True)
    if within is not None:
        data = data.get(within)
    found = []
    for name, default in ((mean, IMAGENET_MEAN), (std, IMAGENET_STD)):
        value = data.get(name) if isinstance(data, dict) else None
        value = default if value is None else value
        numbers = isinstance(value, list | tuple) and len(value) == 3
        if not numbers or not all(type(v) in (int, float) and abs(v) < 1e6 for v in value):
            raise UserError(f"{file}: {name} is {value!r}, not three numbers")
        found.append((float(value[0]), float(value[1]), float(value[2])))
    return found[0], found[1]


def _save_huggingface(model: Backbone, path: Path, dtype: Any) -> None:
    vit, settings = model.config, model.backbone_config
    rows = convert.huggingface_rows(vit)
    save_huggingface(
        model, path, rows, lambda kept: convert.config_to_huggingface(vit, kept), dtype
    )
    if jax.process_index() == 0:
        data = convert.preprocessor_to_huggingface(settings.image_mean, settings.image_std)
        text = json.dumps(data, indent=2) + "\n"
        (path / PREPROCESSOR).write_text(text, encoding="utf-8")
