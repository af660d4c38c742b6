"""A large encoder with a small decoder against balanced pairs (paper, sections 3 and 6)."""

from typing import Any

from common.generate.measure import median_seconds
from t5gemma.adaptation import adapt
from t5gemma.experiments.bench import Arm, Bench
from t5gemma.experiments.config import TimingConfig, UnbalancedConfig
from t5gemma.experiments.equal_flops import answer_flops
from t5gemma.experiments.from_scratch import adapted
from t5gemma.model import T5Gemma

LARGE, SMALL, UNBALANCED = "large-large", "small-small", "large-small"
PAIRS = (SMALL, UNBALANCED, LARGE)


def measure_unbalanced(
    config: UnbalancedConfig, timing: TimingConfig, bench: Bench
) -> dict[str, Any]:
    """Trains the pairs by PrefixLM on the same batches; the unbalanced one with each warm-up.

    Returns:
      For each pair `loss` and `rougeL` of continuations (the unbalanced one's after the short
      warm-up, as the paper makes it), `flops` and `seconds` of answering one batch, and
      `parameters`; `warmups` and `loss_by_warmup`.
    """
    large = adapted(bench)
    small = bench.made(config.small, "small-donor")
    shapes = {
        LARGE: large.start(),
        SMALL: adapt(small, seed=bench.seed),
        UNBALANCED: adapt(bench.donor, small, seed=bench.seed),
    }
    arms = [_unbalanced(shapes[UNBALANCED], warmup) for warmup in config.warmups]
    warmed = [bench.scores(arm) for arm in arms]
    scores = {
        LARGE: bench.scores(large),
        SMALL: bench.scores(Arm(SMALL, lambda: shapes[SMALL])),
        UNBALANCED: warmed[1],
    }
    for name in (SMALL, *(arm.name for arm in arms)):
        bench.release(name)
    seconds = median_seconds(
        {name: bench.pieces.answers(model) for name, model in shapes.items()},
        repeats=timing.repeats,
    )
    pieces = bench.pieces
    return {
        "rows": pieces.batch,
        "prefix": pieces.prefix,
        "continuation": pieces.continuation,
        "loss": {name: scores[name]["loss"] for name in PAIRS},
        "rougeL": {name: scores[name]["rougeL"] for name in PAIRS},
        "parameters": {name: shapes[name].config.num_parameters() for name in PAIRS},
        "flops": {
            name: answer_flops(shapes[name].config, pieces.prefix, pieces.continuation)
            for name in PAIRS
        },
        "seconds": seconds,
        "warmups": config.warmups,
        "steps": bench.config.train.steps,
        "loss_by_warmup": [score["loss"] for score in warmed],
    }


def _unbalanced(model: T5Gemma, warmup: int) -> Arm:
    return Arm(f"{UNBALANCED}-warmup{warmup}", lambda: model, warmup=warmup)
