"""What the paper predicts of the measurements, and what is smaller here than there."""

from collections.abc import Callable, Mapping
from typing import Any

from common.launch import Expectation, Results
from t5gemma.experiments import equal_flops, objectives, unbalanced
from t5gemma.experiments.config import ReproduceConfig
from t5gemma.experiments.from_scratch import ADAPTED, COPIED, RANDOM, SCRATCH, SILENT

CLAIM = (
    "A pretrained decoder-only model becomes an encoder-decoder by adaptation: it is better than "
    "one trained from scratch, at the inference cost of the decoder-only model it is better than "
    "that, its encoder reads better, and a large encoder may go with a small decoder (Encoder-"
    "Decoder Gemma, arXiv:2504.06225)."
)
SMALLER = (
    "Smaller than in the paper: there, Gemma 2 of 2 B and 9 B parameters, and models from 15 M on, "
    "were pretrained on 8 T tokens and adapted on up to 2 T in rows of 4,096 + 4,096 (UL2: 8,192 + "
    "8,192); models from scratch had 8 T; quality was the mean of 22 few-shot tasks, of chat tasks "
    "after instruction tuning, which is not done here, and of seven SuperGLUE tasks; the warm-up "
    "was 1,000 steps of some 190,000. The adapted models have seen their donor's tokens besides. "
    "Losses of so short trainings show directions, not the paper's figures."
)
EQUAL_FLOPS = 1.25  # Largest ratio of FLOPs that still counts as equal: cross attention included.

Measured = Mapping[str, Any]


def results(config: ReproduceConfig, measured: Measured) -> Results:
    """The claim with its expectations, to be decided by `measured`."""
    return Results(CLAIM, setting(config, measured), expectations(measured), measured)


def expectations(measured: Measured) -> list[Expectation]:
    """Those whose measurements were asked for: the causal encoder may have been left out."""
    found = list(EXPECTATIONS)
    if objectives.CAUSAL in measured["objectives"]["loss"]:
        found += CAUSAL_EXPECTATIONS
    return found


def setting(config: ReproduceConfig, measured: Measured) -> str:
    """What was run, and plainly what is smaller than in the paper."""
    scratch, objective = measured["from_scratch"], measured["objectives"]
    other = measured["unbalanced"]
    main, second = config.main, config.other or config.main
    sides = f"{main.data.encoder_length} + {main.data.decoder_length}"
    return (
        f"On {measured['device']}. Adaptation and equal FLOPs: {scratch['donor']}, adapted to "
        f"{scratch['parameters']:,} parameters, {scratch['positions'][-1]:,} positions of both "
        f"sides for every arm (rows of {sides}, {main.dtype}) of Python's own documentation; where "
        f"cross attention begins at random it trains alone for {scratch['warmup']} of "
        f"{main.train.steps} updates. Objectives and unbalanced pairs: "
        f"{measured['other']['donor']}, pairs of {other['parameters'][unbalanced.SMALL]:,} to "
        f"{other['parameters'][unbalanced.LARGE]:,} parameters, "
        f"{measured['other']['positions']:,} positions for every arm (rows of "
        f"{second.data.encoder_length} + {second.data.decoder_length}). Classification: which of "
        f"{len(objective['labels'])} packages a docstring is from; {objective['texts']:,} texts to "
        f"fine-tune on, {objective['dev_texts']:,} scored, a head on the last token, all of the "
        f"encoder trained, the best of {config.objectives.tuning.evaluations} evaluations. One "
        f"seed ({config.seed}). {SMALLER}"
    )


def _below_scratch(name: str) -> Callable[[Measured], bool]:
    def holds(m: Measured) -> bool:
        loss = m["from_scratch"]["loss"]
        return loss[name] < loss[SCRATCH]

    return holds


def _sooner(m: Measured) -> bool:
    part = m["from_scratch"]
    needed = [n for n in (part["needed"][name] for name in ADAPTED) if n is not None]
    return bool(needed) and 3 * min(needed) <= part["positions"][-1]


def _writes_better(m: Measured) -> bool:
    loss = m["objectives"]["loss"]
    return loss[objectives.DISTILLED] < loss[objectives.UL2]


def _writes_nearer(m: Measured) -> bool:
    rouge = m["objectives"]["rougeL"]
    return rouge[objectives.DISTILLED] > rouge[objectives.UL2]


def _reads_better(m: Measured) -> bool:
    accuracy = m["objectives"]["accuracy"]
    return accuracy[objectives.UL2] > accuracy[objectives.DISTILLED]


def _encoders_beat_donor(m: Measured) -> bool:
    accuracy = m["objectives"]["accuracy"]
    donor = accuracy[objectives.DONOR]
    return min(accuracy[objectives.UL2], accuracy[objectives.DISTILLED]) > donor


def _flops_are_equal(m: Measured) -> bool:
    flops = m["equal_flops"]["flops"]
    return flops[equal_flops.ADAPTED] <= EQUAL_FLOPS * flops[equal_flops.CONTINUED]


def _better_at_equal_flops(m: Measured) -> bool:
    loss = m["equal_flops"]["loss"]
    return loss[equal_flops.ADAPTED] <= loss[equal_flops.CONTINUED]


def _as_fast(m: Measured) -> bool:
    seconds = m["equal_flops"]["seconds"]
    return seconds[equal_flops.ADAPTED] <= EQUAL_FLOPS * seconds[equal_flops.CONTINUED]


def _unbalanced_beats_small(m: Measured) -> bool:
    loss = m["unbalanced"]["loss"]
    return loss[unbalanced.UNBALANCED] < loss[unbalanced.SMALL]


def _unbalanced_costs_less(m: Measured) -> bool:
    part = m["unbalanced"]
    return all(
        part[cost][unbalanced.UNBALANCED] < part[cost][unbalanced.LARGE]
        for cost in ("flops", "seconds")
    )


def _short_warmup_helps(m: Measured) -> bool:
    without, few, _ = m["unbalanced"]["loss_by_warmup"]
    return few <= without


def _long_warmup_harms(m: Measured) -> bool:
    *shorter, many = m["unbalanced"]["loss_by_warmup"]
    return many > max(shorter)


def _both_ways_writes(m: Measured) -> bool:
    loss = m["objectives"]["loss"]
    return loss[objectives.PREFIX] < loss[objectives.CAUSAL]


def _both_ways_reads(m: Measured) -> bool:
    accuracy = m["objectives"]["accuracy"]
    return accuracy[objectives.PREFIX] > accuracy[objectives.CAUSAL]


EXPECTATIONS = (
    Expectation(
        "copied_below_scratch",
        "after equal tokens the pair whose cross attention was copied continues held-out text at a "
        "lower loss than the pair from scratch",
        _below_scratch(COPIED),
    ),
    Expectation(
        "random_below_scratch",
        "so does the pair whose cross attention was drawn and trained alone at first",
        _below_scratch(RANDOM),
    ),
    Expectation(
        "silent_below_scratch",
        "so does the pair whose cross attention added nothing at first (an option of ours)",
        _below_scratch(SILENT),
    ),
    Expectation(
        "adapted_sooner",
        "one of them is as good as the pair from scratch at its end after at most a third of its "
        "tokens",
        _sooner,
    ),
    Expectation(
        "prefixlm_writes_better",
        "PrefixLM with distillation continues held-out text at a lower loss than UL2",
        _writes_better,
    ),
    Expectation(
        "prefixlm_writes_nearer",
        "and its own continuations are nearer to the true ones (ROUGE-L)",
        _writes_nearer,
    ),
    Expectation(
        "ul2_reads_better",
        "UL2's encoder, fine-tuned, classifies better than that of PrefixLM with distillation",
        _reads_better,
    ),
    Expectation(
        "encoders_read_better",
        "either encoder classifies better than the decoder-only donor by its last token",
        _encoders_beat_donor,
    ),
    Expectation(
        "flops_equal",
        "an answer takes the encoder-decoder at most 1.25 times the FLOPs of the donor, which has "
        "half its depth",
        _flops_are_equal,
    ),
    Expectation(
        "better_at_equal_flops",
        "after equal further training the adapted pair continues held-out text at no higher loss "
        "than the donor continued",
        _better_at_equal_flops,
    ),
    Expectation(
        "as_fast",
        "and takes at most 1.25 times its seconds for an answer",
        _as_fast,
    ),
    Expectation(
        "unbalanced_beats_small",
        "a large encoder with a small decoder continues held-out text at a lower loss than the "
        "small balanced pair",
        _unbalanced_beats_small,
    ),
    Expectation(
        "unbalanced_costs_less",
        "and answers with fewer FLOPs and in less time than the large balanced pair",
        _unbalanced_costs_less,
    ),
    Expectation(
        "short_warmup_helps",
        "training cross attention alone for a few updates is no worse than not at all",
        _short_warmup_helps,
    ),
    Expectation(
        "long_warmup_harms",
        "and for most of a training worse than either",
        _long_warmup_harms,
    ),
)
CAUSAL_EXPECTATIONS = (
    Expectation(
        "both_ways_write_better",
        "PrefixLM with an encoder that sees both ways continues held-out text at a lower loss than "
        "with a causal one",
        _both_ways_writes,
    ),
    Expectation(
        "both_ways_read_better",
        "the encoder that sees both ways classifies better than the causal one",
        _both_ways_reads,
    ),
)
