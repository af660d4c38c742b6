"""Adapted against from scratch, at equal tokens (paper, sections 3 and 6)."""

from collections.abc import Sequence
from typing import Any

from t5gemma.adaptation import CrossInit
from t5gemma.experiments.bench import Arm, Bench
from t5gemma.experiments.config import FromScratchConfig

COPIED, RANDOM, SILENT, SCRATCH = "copied", "random", "silent", "scratch"
ADAPTED = (COPIED, RANDOM, SILENT)
NAMES = {"copy": COPIED, "random": RANDOM, "zero": SILENT}
LABELS = {
    COPIED: "adapted, cross attention copied",
    RANDOM: "adapted, cross attention random",
    SILENT: "adapted, cross attention silent",
    SCRATCH: "from scratch",
}


def adapted(bench: Bench, cross: CrossInit | None = None, warmup: int = 0) -> Arm:
    """The donor adapted, by PrefixLM; by default as the bench says, to compare others with."""
    cross = cross or bench.config.cross
    return Arm(NAMES[cross], lambda: bench.adapted(cross=cross), warmup=warmup, curve=True)


def measure_from_scratch(config: FromScratchConfig, bench: Bench) -> dict[str, Any]:
    """Trains the pairs by PrefixLM on the same batches.

    Returns:
      For each pair `loss` and `rougeL` (continuations), `curve` (held-out loss) at `positions` and
      `first`, the loss of its first batch; `needed`, the positions after which an adapted pair is
      as good as the one from scratch at its end, None if it never is; `donor_loss` of the donor
      itself and `unigram_loss`.
    """
    fresh = Arm(SCRATCH, bench.adapted, fresh=True, learning_rate=config.learning_rate, curve=True)
    arms = (
        adapted(bench, "copy"),
        adapted(bench, "random", config.warmup),
        adapted(bench, "zero"),
        fresh,
    )
    scores = {}
    for arm in arms:
        scores[arm.name] = bench.scores(arm)
        if arm.name != NAMES[bench.config.cross]:  # Which others compare with.
            bench.release(arm.name)
    level = scores[SCRATCH]["curve"][-1]
    places = scores[SCRATCH]["positions"]
    curves = {name: score["curve"] for name, score in scores.items()}
    return {
        "parameters": scores[SCRATCH]["parameters"],
        "donor_parameters": bench.donor.config.num_parameters(),
        "donor": donor_name(bench),
        "warmup": config.warmup,
        "positions": places,
        "curve": curves,
        "first": {name: score["first"] for name, score in scores.items()},
        "loss": {name: score["loss"] for name, score in scores.items()},
        "rougeL": {name: score["rougeL"] for name, score in scores.items()},
        "needed": {name: reached(places, curves[name], level) for name in ADAPTED},
        "donor_loss": bench.pieces.loss(bench.donor),
        "unigram_loss": bench.unigram_loss(),
    }


def donor_name(bench: Bench) -> str:
    """How texts call the donor."""
    config = bench.config.donor
    if config.asset is not None:
        return config.asset
    return f"a decoder of {bench.donor.config.num_parameters():,} parameters trained in the run"


def reached(positions: Sequence[int], curve: Sequence[float], level: float) -> int | None:
    """The first of `positions` at which the curve is at or below `level`."""
    return next((place for place, loss in zip(positions, curve) if loss <= level), None)
