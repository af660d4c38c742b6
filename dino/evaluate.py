"""`python -m dino.evaluate`: what a backbone's frozen features are good for."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx

from common.data.file_sources import CorpusFile
from common.data.image_corpus import DRAWN, open_images, parse_images
from common.data.image_sources import ImageSource, find_images
from common.errors import UserError, nearest
from common.launch import Run, launch, write_report
from common.launch.workdir import write_atomically
from common.sharding import batch_shards, make_mesh
from dino.checkpoint import load
from dino.evaluation import depth, linear, protocols, segmentation
from dino.evaluation.dense_data import PairedFolders, open_labels, read_depth, spread
from dino.evaluation.features import (
    FeatureModel,
    ImageFeatures,
    Pixels,
    View,
    extract,
    view_for,
)
from dino.evaluation.knn import KS, TEMPERATURE
from dino.evaluation.linear import LEARNING_RATES, LinearConfig
from dino.evaluation.logistic import STRENGTHS
from dino.evaluation.metrics import METRICS
from dino.evaluation.protocols import Outcome
from dino.evaluation.retrieval import Relevance, read_ground_truth
from dino.model import Backbone

TASKS = ("knn", "linear", "logistic", "retrieval", "segmentation", "depth")
OF_IMAGES = ("knn", "logistic", "retrieval")  # On features that are computed once.
DENSE = ("segmentation", "depth")
EXAMPLES = [
    "python -m dino.evaluate --checkpoint=dinov2_vits14_pretrain.pth --task=knn "
    "--train=imagenet/train --test=imagenet/val",
    "python -m dino.evaluate --checkpoint=runs/dino-cpu --task=knn,logistic "
    "--train=shapes:train --test=shapes:heldout --baselines=pixels,random",
    "python -m dino.evaluate --checkpoint=dinov2-base --task=segmentation --classes=150 "
    "--reduce_zero_label --train=ade/images/training --train_maps=ade/annotations/training "
    "--test=ade/images/validation --test_maps=ade/annotations/validation",
    "python -m dino.evaluate --task=knn --train_features=train.npy --train_labels=labels.npy "
    "--test_features=test.npy --test_labels=truth.npy",
]
OPTIONS = flags.FlagValues()
_own: dict[str, Any] = {"flag_values": OPTIONS}
_SET = "a folder, .npz, array_record or tfds, or shapes:train, glyphs:heldout, animals, …"
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "anything dino.load takes", **_own)
POSITIONS = flags.DEFINE_enum(
    "position_interpolation", "hub", ["hub", "hf"], "see dino.load", **_own
)
TASK = flags.DEFINE_list("task", ["knn"], f"any of {', '.join(TASKS)}", **_own)
TRAIN = flags.DEFINE_string("train", None, f"training images: {_SET}", **_own)
TEST = flags.DEFINE_list(
    "test", [], "test images, likewise; the linear grid takes several, the first chooses the head",
    **_own,
)  # fmt: skip
STORED = {
    name: flags.DEFINE_string(name, None, f"{what} as .npy, instead of images", **_own)
    for name, what in (
        ("train_features", "features [N, D]"),
        ("train_labels", "labels [N]"),
        ("test_features", "features [N, D]"),
        ("test_labels", "labels [N]"),
    )
}
TRAIN_MAPS = flags.DEFINE_string("train_maps", None, "folder of label or depth maps", **_own)
TEST_MAPS = flags.DEFINE_string("test_maps", None, "folder of label or depth maps", **_own)
BASELINES = flags.DEFINE_list(
    "baselines", [], "pixels (no model), random (the model's shape, random weights)", **_own
)
METRIC = flags.DEFINE_enum("metric", "accuracy", list(METRICS), "of classification", **_own)
MOST = flags.DEFINE_integer(
    "max_images", None, "take at most so many images of a set, spread over it", **_own
)
CROP = flags.DEFINE_integer(
    "crop", None, "pixels a side that the model sees, also of dense training crops", **_own
)
RESIZE = flags.DEFINE_integer("resize", None, "pixels of the shorter side before that", **_own)
BATCH = flags.DEFINE_integer("batch", 64, "images at a time", **_own)
NEIGHBOURS = flags.DEFINE_list("ks", list(map(str, KS)), "neighbours of k-NN", **_own)
TEMPERATURE_OF_VOTES = flags.DEFINE_float("temperature", TEMPERATURE, "of k-NN's votes", **_own)
STEPS = flags.DEFINE_integer("steps", None, "of training heads; default the paper's", **_own)
HEAD_BATCH = flags.DEFINE_integer("head_batch", None, "images of a step; the paper's", **_own)
RATES = flags.DEFINE_list(
    "learning_rates", None, "of linear heads, for a batch of 256; of dense heads the one", **_own
)
AUGMENT = flags.DEFINE_bool(
    "augment", True, "train linear heads on random crops; no: on features computed once", **_own
)
STRENGTH = flags.DEFINE_list("strengths", None, "C's of logistic regression", **_own)
GROUND_TRUTH = flags.DEFINE_string(
    "ground_truth", None, "JSON of what each query finds: see dino.evaluation.retrieval", **_own
)
CLASSES = flags.DEFINE_integer("classes", None, "number of classes of label maps", **_own)
REDUCE_ZERO = flags.DEFINE_bool("reduce_zero_label", False, "label 0 is ignored", **_own)
LAYERS = flags.DEFINE_integer("layers", 1, "blocks that dense heads read: 1 or 4", **_own)
MULTI_SCALE = flags.DEFINE_bool(
    "multi_scale", False, "segmentation's +ms: 4 blocks, test at scales and mirrored", **_own
)
DEPTH_SCALE = flags.DEFINE_float("depth_scale", 1000.0, "what a depth image has for 1 m", **_own)
DEPTHS = flags.DEFINE_list("depths", ["0.001", "10"], "least and most depth in m", **_own)
EVAL_CROP = flags.DEFINE_enum(
    "eval_crop", "none", ["eigen", "garg", "none"], "part of a depth map that counts", **_own
)
ERROR_BUDGET = flags.DEFINE_float(
    "error_budget", 0.01, "images that may be damaged: below 1 a share, else a number", **_own
)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "compute dtype", **_own)
SEED = flags.DEFINE_integer("seed", 0, "of heads, order and the random trunk", **_own)
OUTPUT = flags.DEFINE_string(
    "output", None, "folder of the report; default <checkpoint>/report/evaluation for a run, else "
    "runs/dino-evaluate-<checkpoint>", **_own,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Contestant:
    """What is evaluated, and what has to be known of it."""

    model: FeatureModel
    patch: int
    depth: int
    view: View
    mesh: jax.sharding.Mesh | None


def _main(run: Run) -> None:
    _check_flags()
    outcomes: dict[str, dict[str, Outcome]] = {task: {} for task in TASK.value}
    damaged: dict[str, str] = {}
    if STORED["train_features"].value is not None:
        train, test = _stored("train"), _stored("test")
        for task in TASK.value:
            outcomes[task]["features"] = _of_features(task, "features", train, test, None)
            _tell(task, "features", outcomes[task]["features"])
    else:
        for name, contestant in _contestants().items():
            for task, outcome in _evaluate(name, contestant, damaged).items():
                outcomes[task][name] = outcome
                _tell(task, name, outcome)
    _report(outcomes, list(damaged.values()))


def _check_flags() -> None:
    """Refuses what does not go together, before anything is loaded."""
    unknown = [task for task in TASK.value if task not in TASKS]
    if unknown or not TASK.value:
        name = unknown[0] if unknown else ""
        raise UserError(f"--task={name} is none of {', '.join(TASKS)}{nearest(name, TASKS)}")
    for name in BASELINES.value:
        if name not in ("pixels", "random"):
            raise UserError(f"--baselines={name} is neither pixels nor random")
    for flag in (BATCH, HEAD_BATCH, STEPS, CROP, RESIZE, MOST):
        if flag.value is not None and flag.value < 1:
            raise UserError(f"--{flag.name} must be at least 1, not {flag.value}")
    _numbers(NEIGHBOURS, int)
    for flag in (STRENGTH, RATES, DEPTHS):
        if flag.value is not None:
            _numbers(flag, float)
    if len(DEPTHS.value) != 2:
        raise UserError("--depths takes two numbers, the least and the most")
    if TEMPERATURE_OF_VOTES.value <= 0:
        raise UserError("--temperature must be above 0")
    if LAYERS.value not in (1, 4):
        raise UserError(f"--layers is 1 or 4, not {LAYERS.value}")
    given = [name for name, flag in STORED.items() if flag.value is not None]
    if given:
        missing = [name for name in ("train_features", "test_features") if name not in given]
        if missing:
            raise UserError(f"--{given[0]} needs --{missing[0]} too")
        wrong = [task for task in TASK.value if task in DENSE]
        if wrong:
            raise UserError(f"--task={wrong[0]} needs images, not stored features")
        if CHECKPOINT.value is not None or BASELINES.value:
            raise UserError("stored features need neither --checkpoint nor --baselines")
        return
    for flag in (CHECKPOINT, TRAIN, TEST):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing ({OPTIONS[flag.name].help})")
    if len(TEST.value) > 1 and TASK.value != ["linear"]:
        raise UserError("several sets after --test are for --task=linear alone")


def _contestants() -> dict[str, Contestant]:
    mesh = make_mesh() if jax.device_count() > 1 else None
    model = load(CHECKPOINT.value, POSITIONS.value, dtype=DTYPE.value, mesh=mesh)
    vit = model.config
    view = view_for(vit.image_size, vit.patch_size, CROP.value, RESIZE.value)
    settings = (vit.patch_size, vit.num_layers, view, mesh)
    found = {"model": Contestant(model, *settings)}
    if "random" in BASELINES.value:
        found["random trunk"] = Contestant(_random(model, mesh), *settings)
    if "pixels" in BASELINES.value:
        pixels = Pixels(vit.patch_size, whole="depth" not in TASK.value)
        found["pixels"] = Contestant(pixels, *settings)
    return found


def _random(model: Backbone, mesh: jax.sharding.Mesh | None) -> Backbone:
    """The same shape with random weights, whose blocks count in full from the start."""
    config = model.backbone_config
    if config.vit.layer_scale is not None:
        # As training starts they would be so small that features were those of the patches alone.
        vit = dataclasses.replace(config.vit, layer_scale=1.0)
        config = dataclasses.replace(config, vit=vit)
    fresh = Backbone(config, rngs=nnx.Rngs(SEED.value))
    if mesh is not None:
        graphdef, state = nnx.split(fresh)
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        fresh = nnx.merge(graphdef, jax.device_put(state, whole))
    return fresh


def _evaluate(name: str, contestant: Contestant, damaged: dict[str, str]) -> dict[str, Outcome]:
    """All tasks of one contestant; features of images are computed once for all that need them."""
    found: dict[str, Outcome] = {}
    of_images = [task for task in TASK.value if task not in DENSE]
    if of_images:
        sources = {text: _opened(text) for text in (TRAIN.value, *TEST.value)}
        config = _linear_config(contestant.depth)
        layers = max(config.blocks) if "linear" in of_images else 1
        stored = any(task in OF_IMAGES for task in of_images) or not AUGMENT.value
        features = {
            text: _extracted(contestant, source, layers, f"{name}: {text}", damaged)
            for text, source in sources.items()
            if stored or text in TEST.value
        }
        truth = _ground_truth(sources, features)
        for task in of_images:
            if task == "linear":
                found[task] = _linear(name, contestant, sources, features, config)
            else:
                test = features[TEST.value[0]]
                found[task] = _of_features(task, name, features[TRAIN.value], test, truth)
    if "segmentation" in TASK.value:
        found["segmentation"] = _segmentation(contestant, damaged)
    if "depth" in TASK.value:
        found["depth"] = _depth(contestant)
    return found


def _opened(text: str) -> ImageSource:
    return open_images(dataclasses.replace(parse_images(text), max_images=MOST.value))


def _extracted(
    contestant: Contestant,
    source: ImageSource,
    layers: int,
    title: str,
    damaged: dict[str, str],
) -> ImageFeatures:
    shards = 1 if contestant.mesh is None else batch_shards(contestant.mesh)
    batch = -(-min(BATCH.value, len(source)) // shards) * shards
    features = extract(
        contestant.model,
        source,
        contestant.view,
        layers=layers,
        batch=batch,
        error_budget=ERROR_BUDGET.value,
        mesh=contestant.mesh,
        title=title,
    )
    damaged.update({message: message for message in features.damaged})
    return features


def _of_features(
    task: str,
    name: str,
    train: ImageFeatures,
    test: ImageFeatures,
    truth: Mapping[str, Sequence[Relevance]] | None,
) -> Outcome:
    """A task on features that lie in memory."""
    if task == "knn":
        return protocols.knn(
            name,
            train,
            test,
            ks=_numbers(NEIGHBOURS, int),
            temperature=TEMPERATURE_OF_VOTES.value,
            metric=METRIC.value,
        )
    if task == "logistic":
        strengths = STRENGTHS if STRENGTH.value is None else _numbers(STRENGTH, float)
        return protocols.logistic(
            name, train, test, strengths=strengths, metric=METRIC.value, seed=SEED.value
        )
    if task == "retrieval":
        return protocols.retrieval(test, train, truth)
    config = dataclasses.replace(_linear_config(1), avgpool=(False,))
    protocols.labelled(train, test)
    heads = linear.train_heads(linear.stored_batches(train, config), len(train.classes), config)
    return protocols.linear(name, heads, train.classes, {"test": test}, config, METRIC.value)


def _linear_config(blocks: int) -> LinearConfig:
    default = LinearConfig()
    return LinearConfig(
        learning_rates=LEARNING_RATES if RATES.value is None else _numbers(RATES, float),
        blocks=tuple(n for n in default.blocks if n <= blocks),
        steps=STEPS.value or default.steps,
        batch=HEAD_BATCH.value or default.batch,
        seed=SEED.value,
    )


def _linear(
    name: str,
    contestant: Contestant,
    sources: Mapping[str, ImageSource],
    features: Mapping[str, ImageFeatures],
    config: LinearConfig,
) -> Outcome:
    source = sources[TRAIN.value]
    tests = {text: features[text] for text in TEST.value}
    if AUGMENT.value:
        batches = linear.augmented_batches(
            contestant.model,
            source,
            contestant.view.crop,
            config,
            error_budget=ERROR_BUDGET.value,
            mesh=contestant.mesh,
        )
    else:
        batches = linear.stored_batches(features[TRAIN.value], config)
    if source.labels is None:
        raise UserError("--train has no labels: put its images in one folder for each class")
    heads = linear.train_heads(batches, len(source.classes), config)
    return protocols.linear(name, heads, source.classes, tests, config, METRIC.value)


def _ground_truth(
    sources: Mapping[str, ImageSource], features: Mapping[str, ImageFeatures]
) -> Mapping[str, Sequence[Relevance]] | None:
    """What each query finds, by the names of files below the folders."""
    if GROUND_TRUTH.value is None:
        return None
    names = {}
    for text in (TEST.value[0], TRAIN.value):
        files: list[CorpusFile] = find_images(text)
        if len(files) != len(sources[text]):
            raise UserError("--ground_truth needs whole folders of images, without --max_images")
        names[text] = [files[i].name for i in features[text].indices]
    return read_ground_truth(GROUND_TRUTH.value, names[TEST.value[0]], names[TRAIN.value])


def _segmentation(contestant: Contestant, damaged: dict[str, str]) -> Outcome:
    drawn = TRAIN_MAPS.value is None
    zero = REDUCE_ZERO.value
    train = spread(open_labels(TRAIN.value, TRAIN_MAPS.value, reduce_zero=zero), MOST.value)
    test = spread(open_labels(TEST.value[0], TEST_MAPS.value, reduce_zero=zero), MOST.value)
    classes = CLASSES.value
    if classes is None:
        if not drawn:
            raise UserError("--classes is missing (the number of classes of label maps)")
        classes = 1 + len(DRAWN[TRAIN.value.partition(":")[0]](32, 64).names)
    changes: dict[str, Any] = {"seed": SEED.value}
    if CROP.value is not None or drawn:
        side = contestant.view.crop
        changes |= {"crop": side, "stride": max(1, side * 2 // 3)}
    changes |= _given(steps=STEPS, batch=HEAD_BATCH) | _given_rate()
    if STEPS.value is not None:
        changes["warm_up"] = min(1500, STEPS.value // 10)
    if MULTI_SCALE.value:
        config = segmentation.multi_scale(classes, **changes)
    else:
        config = segmentation.SegmentationConfig(classes, layers=LAYERS.value, **changes)
    if config.layers > contestant.depth:
        raise UserError(f"the model has {contestant.depth} blocks, fewer than {config.layers}")
    options = {"error_budget": ERROR_BUDGET.value, "mesh": contestant.mesh}
    arguments = (contestant.patch, config)
    head = segmentation.train_segmentation(contestant.model, train, *arguments, **options)
    result = segmentation.score_segmentation(contestant.model, head, test, *arguments, **options)
    damaged.update({message: message for message in result.damaged})
    scores = {"mIoU": result.mean_iou, "pixel accuracy": result.accuracy, "IoU": list(result.iou)}
    return Outcome(result.mean_iou, scores)


def _depth(contestant: Contestant) -> Outcome:
    if TRAIN_MAPS.value is None or TEST_MAPS.value is None:
        raise UserError("depth needs --train_maps and --test_maps, folders of depth maps")
    least, most = _numbers(DEPTHS, float)
    changes: dict[str, Any] = {"seed": SEED.value}
    if CROP.value is not None:
        changes["crop"] = (CROP.value, CROP.value)
    changes |= _given(steps=STEPS, batch=HEAD_BATCH) | _given_rate()
    if STEPS.value is not None:
        changes["warm_up"] = STEPS.value // 3
    config = depth.DepthConfig(
        layers=LAYERS.value, least=least, most=most, eval_crop=EVAL_CROP.value, **changes
    )

    def read(path: Path) -> np.ndarray:
        return read_depth(path, DEPTH_SCALE.value)

    sources = [
        spread(PairedFolders(images, maps, read), MOST.value)
        for images, maps in ((TRAIN.value, TRAIN_MAPS.value), (TEST.value[0], TEST_MAPS.value))
    ]
    options = {"error_budget": ERROR_BUDGET.value, "mesh": contestant.mesh}
    arguments = (contestant.patch, contestant.depth, config)
    head = depth.train_depth(contestant.model, sources[0], *arguments, **options)
    errors = depth.score_depth(contestant.model, head, sources[1], *arguments, **options)
    return Outcome(errors["rmse"], errors)


def _given(**fields: Any) -> dict[str, Any]:
    """Fields whose flags were given."""
    return {name: flag.value for name, flag in fields.items() if flag.value is not None}


def _given_rate() -> dict[str, float]:
    if RATES.value is None:
        return {}
    rates = _numbers(RATES, float)
    if len(rates) != 1:
        raise UserError("--learning_rates of a dense head is one number")
    return {"learning_rate": rates[0]}


def _numbers(flag: Any, kind: Any) -> tuple[Any, ...]:
    try:
        found = tuple(kind(text) for text in flag.value)
    except ValueError as error:
        raise UserError(f"--{flag.name} takes numbers separated by commas") from error
    if not found or min(found) <= 0:
        raise UserError(f"--{flag.name} takes numbers above 0")
    return found


def _stored(part: str) -> ImageFeatures:
    """Features and labels from .npy files."""
    features = _array(f"{part}_features")
    if features.ndim != 2 or features.dtype.kind != "f":
        raise UserError(f"--{part}_features holds {features.dtype} {list(features.shape)}: "
                        "floating-point features [N, D] were expected")  # fmt: skip
    labels = None
    if STORED[f"{part}_labels"].value is not None:
        labels = _array(f"{part}_labels")
        if labels.shape != (len(features),) or labels.dtype.kind not in "iu" or (labels < 0).any():
            raise UserError(
                f"--{part}_labels: one whole number from 0 for each of {len(features)} features "
                f"was expected, not {labels.dtype} {list(labels.shape)}"
            )
        labels = labels.astype(np.int64)
    classes = () if labels is None else tuple(map(str, range(int(labels.max(initial=0)) + 1)))
    cls = features.astype(np.float32)
    return ImageFeatures(cls[None], cls, np.arange(len(cls)), labels, classes)


def _array(name: str) -> np.ndarray:
    path = STORED[name].value
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--{name}: {path} is no whole .npy file: {error}") from error


def _tell(task: str, name: str, outcome: Outcome) -> None:
    numbers = (
        f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
        for key, value in outcome.scores.items()
        if isinstance(value, int | float | str)
    )
    print(f"{task}, {name}: {', '.join(numbers)}")


def _report(outcomes: Mapping[str, Mapping[str, Outcome]], damaged: list[str]) -> None:
    """Writes the page, its figures, and `scores.json`."""
    folder = _output()
    tables, figures = [], []
    for task, found in outcomes.items():
        note = ""
        if task == "linear":
            note = "Heads and figures on the first test set, which chose the best one, too."
        tables.append(protocols.task_table(task, found, note))
        lines = [line for outcome in found.values() for line in outcome.curve]
        if lines:
            figures.append(protocols.FIGURES[task](lines, METRIC.value))
    shown = f"Checkpoint {CHECKPOINT.value}." if CHECKPOINT.value else "Stored features."
    if damaged:
        shown += f"\n\n{len(damaged)} damaged images left out:\n\n" + "\n".join(
            f"- {message}" for message in damaged
        )
    write_report(folder, "Evaluation", text=shown, tables=tables, figures=figures)
    scores = {
        task: {name: _plain(dict(outcome.scores)) for name, outcome in found.items()}
        for task, found in outcomes.items()
    }
    document = {"scores": scores, "damaged": damaged}
    write_atomically(folder / "scores.json", json.dumps(document, indent=2, allow_nan=False) + "\n")
    if damaged:
        print(f"{len(damaged)} damaged images left out; the report names them")
    print(f"report: {folder / 'README.md'}")


def _plain(value: Any) -> Any:
    """JSON data; what is not a number becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if np.isfinite(value) else None
    return value


def _output() -> Path:
    if OUTPUT.value is not None:
        return Path(OUTPUT.value)
    if CHECKPOINT.value is None:
        return Path("runs") / "dino-evaluate-features"
    path = Path(CHECKPOINT.value)
    if (path / "checkpoints").is_dir():
        return path / "report" / "evaluation"
    return Path("runs") / f"dino-evaluate-{path.resolve().name}"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="dino",
        verb="evaluate",
        description="Measures frozen features: k-NN, a grid of linear heads in one pass, logistic "
        "regression, retrieval, segmentation and depth heads.",
        examples=EXAMPLES,
        flags=OPTIONS,
        argv=argv,
    )


if __name__ == "__main__":
    main()
