"""An encoder-decoder against its donor continued, at equal inference FLOPs."""

from typing import Any

from common.generate.measure import median_seconds
from common.models.decoder import DecoderConfig
from common.models.flops import decoder_flops, head_flops
from t5gemma.config import T5GemmaConfig
from t5gemma.experiments.bench import Bench
from t5gemma.experiments.config import TimingConfig
from t5gemma.experiments.from_scratch import adapted
from t5gemma.flops import forward_flops

ADAPTED, CONTINUED = "adapted", "continued"
LABELS = {ADAPTED: "adapted encoder-decoder", CONTINUED: "donor continued"}


def measure_equal_flops(config: TimingConfig, bench: Bench) -> dict[str, Any]:
    """Continues the donor for as many positions as the adapted pair, and compares the two.

    Returns:
      For each `loss` and `rougeL` of continuations, `flops` and `seconds` of answering one batch;
      `rows`, `prefix` and `continuation` of that batch.
    """
    arm = adapted(bench)
    model = arm.start()
    decoder = bench.scores_of_continued()
    pair = bench.scores(arm)
    # Times depend on shapes alone, so that the trained weights are not needed.
    seconds = median_seconds(
        {ADAPTED: bench.pieces.answers(model), CONTINUED: bench.pieces.answers(bench.donor)},
        repeats=config.repeats,
    )
    pieces = bench.pieces
    return {
        "rows": pieces.batch,
        "prefix": pieces.prefix,
        "continuation": pieces.continuation,
        "loss": {ADAPTED: pair["loss"], CONTINUED: decoder["loss"]},
        "rougeL": {ADAPTED: pair["rougeL"], CONTINUED: decoder["rougeL"]},
        "parameters": {
            ADAPTED: model.config.num_parameters(),
            CONTINUED: bench.donor.config.num_parameters(),
        },
        "flops": {
            ADAPTED: answer_flops(model.config, pieces.prefix, pieces.continuation),
            CONTINUED: decoder_answer_flops(bench.donor.config, pieces.prefix, pieces.continuation),
        },
        "seconds": seconds,
    }


def answer_flops(config: T5GemmaConfig, prefix: int, continuation: int) -> float:
    """FLOPs of one answer of an encoder-decoder: the prompt read once, then token by token."""
    return forward_flops(config, 1, prefix + 1, continuation)


def decoder_answer_flops(config: DecoderConfig, prefix: int, continuation: int) -> float:
    """FLOPs of the same answer of a decoder; logits of the answer alone."""
    body = decoder_flops(config, 1, prefix + continuation, head=False)
    return body + continuation * head_flops(config)
