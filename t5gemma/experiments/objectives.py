"""PrefixLM with distillation against UL2: as writers, and their encoders as readers (section 3)."""

from typing import Any

from common.launch.experiments import Stopped, measured
from t5gemma.experiments.bench import Arm, Bench
from t5gemma.experiments.config import ObjectivesConfig
from t5gemma.experiments.from_scratch import adapted
from t5gemma.experiments.labelled import write_labelled
from t5gemma.fine_tuning import fine_tune

PREFIX, DISTILLED, UL2, CAUSAL, DONOR = "prefix_lm", "distilled", "ul2", "causal", "donor"
LABELS = {
    PREFIX: "PrefixLM",
    DISTILLED: "PrefixLM + distillation",
    UL2: "UL2",
    CAUSAL: "PrefixLM, causal encoder",
    DONOR: "donor (decoder-only)",
}


def measure_objectives(config: ObjectivesConfig, bench: Bench) -> dict[str, Any]:
    """Adapts the donor by each objective for as many positions, and scores both uses.

    Returns:
      For each objective and the donor `loss` and `rougeL` of continuations, and `accuracy` of the
      classification, with its `labels`, its `majority` and how many `texts` and `dev_texts`.
    """
    cross = bench.config.cross
    arms = {
        PREFIX: adapted(bench),
        DISTILLED: Arm(DISTILLED, lambda: bench.adapted(cross=cross), "distillation"),
        UL2: Arm(UL2, lambda: bench.adapted(cross=cross), "ul2"),
    }
    if config.causal_encoder:
        arms[CAUSAL] = Arm(CAUSAL, lambda: bench.adapted(cross=cross, causal_encoder=True))
    task = _Task(config, bench)
    scores = {name: bench.scores(arm) for name, arm in arms.items()}
    scores[DONOR] = measured(
        bench.folder.parent,
        f"{bench.folder.name}-donor",
        lambda: bench.pieces.score(bench.donor),
    )
    ablation = (PREFIX, CAUSAL) if config.causal_encoder else ()
    read = {}
    for name in (DISTILLED, UL2, *ablation, DONOR):
        read[name] = task.accuracy(name, arms.get(name))
        if name not in (PREFIX, DONOR):
            bench.release(name)
    return {
        "loss": {name: score["loss"] for name, score in scores.items()},
        "rougeL": {name: score["rougeL"] for name, score in scores.items()},
        "bleu": {name: score["bleu"] for name, score in scores.items()},
        "sample": {name: score["sample"] for name, score in scores.items()},
        "generated": bench.config.generated,
        "accuracy": {name: result["accuracy"] for name, result in read.items()},
        "majority": read[DONOR]["majority"],
        "texts": read[DONOR]["texts"],
        "dev_texts": read[DONOR]["dev_texts"],
        "labels": read[DONOR]["labels"],
    }


class _Task:
    """The classification task on a bench."""

    def __init__(self, config: ObjectivesConfig, bench: Bench):
        self._config, self._bench = config, bench

    def accuracy(self, name: str, arm: Arm | None) -> dict[str, Any]:
        """Fine-tunes an arm's encoder, or the donor where there is no arm, once."""
        bench = self._bench
        label = f"{bench.folder.name}-{name}-labelled"
        return measured(bench.folder.parent, label, lambda: self._tuned(name, arm))

    def _tuned(self, name: str, arm: Arm | None) -> dict[str, Any]:
        bench, config = self._bench, self._config
        model: Any = bench.donor if arm is None else bench.model(arm)
        train, dev = write_labelled(
            bench.folder / "labelled",
            bench.config.data.corpus,
            config.classes,
            config.texts,
            config.dev_texts,
            bench.seed,
        )
        scores = fine_tune(
            model,
            train,
            dev,
            config.tuning,
            bench.folder / "labelled" / name,
            checkpoint=name,
            resume_command=bench.resume_command,
        )
        if scores.preempted:
            raise Stopped
        return {
            "accuracy": scores.accuracy,
            "majority": scores.majority,
            "texts": scores.train_texts,
            "dev_texts": scores.dev_texts,
            "labels": scores.labels,
        }
