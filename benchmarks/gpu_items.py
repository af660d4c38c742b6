"""What `benchmarks.gpu` measures: sections of items, each one program of one contender."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import jax
import numpy as np
from flax import nnx

from benchmarks import harness, workloads
from benchmarks.peers.contender import Setting
from benchmarks.peers.recurrentgemma_tenfold import Tenfold
from common.generate.measure import cache_bytes
from common.sharding import accelerator_of
from recurrentgemma import Griffin, GriffinConfig
from recurrentgemma import config as presets
from recurrentgemma.objective import forward_flops

OURS = "ours"
# A relative difference from the plain XLA form that rounding does not explain.
_WRONG = 3e-2
# The loop that is timed takes about so long, were the program as fast as it can be.
_LOOP_SECONDS = 0.02
# From here the 2B model trains: 16 bytes a parameter, and activations.
_LARGE_MEMORY = 75e9


class Result(TypedDict):
    """Seconds of one call; what it does in that time; as a share of the device's limit; a remark.

    The share is None on a device that the table of accelerators does not hold.
    """

    seconds: float
    rate: str
    share: float | None
    note: str


@dataclasses.dataclass(frozen=True)
class Item:
    """One program of one contender.

    Attributes:
        what: The task, the same for all that do it.
        contender: Who does it; the ratios are to `OURS`.
        measure: Runs it.
    """

    what: str
    contender: str
    measure: Callable[[], Result]

    @property
    def key(self) -> str:
        """Names it within a section."""
        return f"{self.what} | {self.contender}"


def sections() -> dict[str, tuple[float, Callable[[bool], Iterator[Item]]]]:
    """Returns each section's share of the time, and its items, tiny or not.

    RecurrentGemma comes last: it also gets the time that the others leave.
    """
    shares = {
        "linear_scan": 0.12,
        "rg_lru": 0.1,
        "attention": 0.2,
        "decode_attention": 0.08,
        "nearest_centroid": 0.12,
    }
    kernels = {
        name: (shares[name], functools.partial(_kernel_items, name)) for name in workloads.KERNELS
    }
    return {**kernels, "dino": (0.12, _dino_items), "recurrentgemma": (0.26, _model_items)}


# --- Kernels ---


def _kernel_items(kernel: str, tiny: bool) -> Iterator[Item]:
    for workload in workloads.of(kernel, tiny=tiny):
        contenders = {OURS: workload.ours(None), "plain XLA": workload.ours("xla")}
        for name, function in {**contenders, **workload.peers}.items():
            yield Item(
                workload.name,
                name,
                functools.partial(_measure_kernel, workload, function, tiny, check=name == OURS),
            )


def _measure_kernel(
    workload: workloads.Workload, function: workloads.Program, tiny: bool, *, check: bool
) -> Result:
    """Times one contender; all are held against the bytes that our form has to move."""
    program, operands = workload.prepare(function)
    flops = workload.flops * workload.passes
    moved = workload.bytes_moved()
    least = harness.least_seconds(flops, moved)
    calls = 1 if tiny else max(3, min(200, round(_LOOP_SECONDS / (least or 1e-3))))
    times, results = harness.device_seconds(
        program, operands, calls=calls, repeats=2 if tiny else 7
    )
    seconds = statistics.median(times)
    device = accelerator_of(jax.devices()[0])
    by_flops = flops > 0 and (device is None or flops / device.flops > moved / device.bandwidth)
    if by_flops:
        rate = f"{workload.flops / seconds / 1e12:.3g} TFLOP/s"
    else:
        rate = f"{moved / seconds / 1e9:.4g} GB/s"
    note = _difference(workload, results) if check else ""
    return Result(seconds=seconds, rate=rate, share=least and least / seconds, note=note)


def _difference(workload: workloads.Workload, results: list[jax.Array]) -> str:
    """Says how far our results are from those of the plain XLA form."""
    program, operands = workload.prepare(workload.ours("xla"))
    error = workloads.error(results, jax.jit(program)(*operands))
    return f"{'off' if error < _WRONG else 'WRONG'} by {error:.0e}"


# --- DINOv2: features, and the trainer's step ---


def _dino_items(tiny: bool) -> Iterator[Item]:
    # Images need Pillow: where it is missing, this section fails alone.
    from benchmarks.peers import dino_tenfold
    from benchmarks.peers.dino_workload import Setting

    settings = [
        Setting("features", "l", "bfloat16", 64, 224),
        Setting("features", "l", "bfloat16", 16, 518),
        Setting("train", "l", "bfloat16", 32, 224, drop_path=0.4),
    ]
    if tiny:
        settings = [Setting(task, "tiny", "float32", 2, 56) for task in ("features", "train")]
    tenfold = functools.cache(lambda: dino_tenfold.Tenfold(prototypes=16 if tiny else 65_536))
    for setting in settings:
        yield Item(
            f"DINOv2 ViT-{setting.model.upper()} {setting.name} [{setting.batch}, {setting.size}²] "
            f"{setting.dtype}",
            OURS,
            functools.partial(_measure_dino, setting, tenfold, tiny),
        )


def _measure_dino(setting: Any, tenfold: Callable[[], Any], tiny: bool) -> Result:
    from benchmarks.peers import dino_workload

    ours = tenfold()
    if setting.task == "train":
        batch = dino_workload.training_batch(setting)
        run = ours.prepare_train(setting, ours.fresh_params(setting), batch)
    else:
        run = ours.prepare_features(setting, None, dino_workload.images(setting))
    seconds = statistics.median(run() for _ in range(2 if tiny else 7))
    least = harness.least_seconds(ours.flops(setting), 0)
    return Result(
        seconds=seconds,
        rate=f"{setting.batch / seconds:,.1f} images/s",
        share=least and least / seconds,
        note="share: MFU",
    )


# --- RecurrentGemma: the programs of generation and training ---


def _model_items(tiny: bool) -> Iterator[Item]:
    device = accelerator_of(jax.devices()[0])
    name, config = "smoke", presets.smoke().model
    if not tiny and device is not None and device.memory > _LARGE_MEMORY:
        name, config = "2B", presets.recurrentgemma_2b().model
    elif not tiny:
        name, config = "0.3B", _small(presets.recurrentgemma_2b().model)
    settings = [
        Setting("decode", "bfloat16", 8, 2048, 128),
        Setting("prefill", "bfloat16", 8, 2048, 128),
        Setting("train", "bfloat16", 4, 2048, 1),
        Setting("decode", "bfloat16", 64, 2048, 128),
        Setting("prefill", "bfloat16", 1, 8192, 1),
    ]
    if tiny:
        settings = [Setting(task, "float32", 2, 16, 4) for task in ("prefill", "decode", "train")]
    tenfold = functools.cache(lambda: Tenfold(config, _parameters(config), loss_chunk=1024))
    for setting in settings:
        rows = f"[{setting.batch}, {setting.context}]"
        new = f" + {setting.new_tokens}" if setting.task == "decode" else ""
        yield Item(
            f"RecurrentGemma {name} {setting.task} {rows}{new} {setting.dtype}",
            OURS,
            functools.partial(_measure_model, config, setting, tenfold, tiny),
        )


def _small(config: GriffinConfig) -> GriffinConfig:
    """Returns a model of the same proportions for a GPU of 16 GB or more."""
    return dataclasses.replace(
        config,
        vocab_size=32_000,
        width=1024,
        mlp_width=3072,
        lru_width=1024,
        num_heads=8,
        num_layers=20,
    )


def _parameters(config: GriffinConfig) -> dict[str, Any]:
    def initial() -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.state(Griffin(config, rngs=nnx.Rngs(0))))

    return jax.jit(initial)()


def _measure_model(
    config: GriffinConfig, setting: Setting, tenfold: Callable[[], Tenfold], tiny: bool
) -> Result:
    shape = (setting.batch, setting.context + 1)
    tokens = np.random.default_rng(0).integers(2, config.vocab_size, shape).astype(np.int32)
    run = tenfold().prepare(setting, tokens)
    seconds = statistics.median(run() for _ in range(2 if tiny else 5))
    written = setting.batch * (setting.new_tokens if setting.task == "decode" else setting.context)
    least = _least_seconds(config, setting)
    return Result(
        seconds=seconds,
        rate=f"{written / seconds:,.0f} tokens/s",
        share=least and least / seconds,
        note={"train": "share: MFU", "decode": "share: bytes of weights and caches"}.get(
            setting.task, ""
        ),
    )


def _least_seconds(config: GriffinConfig, setting: Setting) -> float | None:
    forward = forward_flops(config, setting.batch, setting.context)
    if setting.task == "train":
        return harness.least_seconds(3 * forward, 0)
    if setting.task == "prefill":  # only the last token has logits
        head = 2.0 * config.width * config.vocab_size * setting.batch
        return harness.least_seconds(forward - head * (setting.context - 1), 0)
    size = np.dtype(setting.dtype).itemsize
    model = nnx.eval_shape(lambda: Griffin(config, rngs=nnx.Rngs(0)))
    caches = cache_bytes(model, setting.context + setting.new_tokens, setting.batch)
    step = harness.least_seconds(0, config.num_parameters() * size + caches)
    return step and step * setting.new_tokens
