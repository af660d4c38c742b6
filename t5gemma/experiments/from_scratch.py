"""Adapted against from scratch, at equal tokens (paper, sections 3 and 6)."""

from collections.abc import Sequence
from typing import Any

from t5gemma.experiments.bench import Arm, Bench
from t5gemma.experiments.config import FromScratchConfig

COPIED, RANDOM, SCRATCH = "copied", "random", "scratch"
LABELS = {
    COPIED: "adapted, cross attention copied",
    RANDOM: "adapted, cross attention random",
    SCRATCH: "from scratch",
}


def copied(bench: Bench) -> Arm:
    """The balanced pair, as the paper makes it; several experiments compare with it."""
    return Arm(COPIED, lambda: bench.adapted(cross="copy"), curve=True)


def measure_from_scratch(config: FromScratchConfig, bench: Bench) -> dict[str, Any]:
    """Trains the three pairs by PrefixLM on the same batches.

    Returns:
      For each pair `loss` and `rougeL` (continuations), `curve` (held-out loss) at `positions`;
      `needed`, the positions after which an adapted pair is as good as the one from scratch at its
      end, None if it never is; `donor_loss` of the donor itself and `unigram_loss`.
    """
    arms = (
        copied(bench),
        Arm(RANDOM, lambda: bench.adapted(cross="random"), warmup=config.warmup, curve=True),
        Arm(
            SCRATCH,
            lambda: bench.adapted(cross="copy"),
            fresh=True,
            learning_rate=config.learning_rate,
            curve=True,
        ),
    )
    scores = {arm.name: bench.scores(arm) for arm in arms}
    for arm in arms:
        bench.release(arm.name)
    level = scores[SCRATCH]["curve"][-1]
    places = scores[SCRATCH]["positions"]
    curves = {name: score["curve"] for name, score in scores.items()}
    return {
        "parameters": scores[COPIED]["parameters"],
        "donor_parameters": bench.donor.config.num_parameters(),
        "donor": donor_name(bench),
        "warmup": config.warmup,
        "positions": places,
        "curve": curves,
        "loss": {name: score["loss"] for name, score in scores.items()},
        "rougeL": {name: score["rougeL"] for name, score in scores.items()},
        "needed": {name: reached(places, curves[name], level) for name in (COPIED, RANDOM)},
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
