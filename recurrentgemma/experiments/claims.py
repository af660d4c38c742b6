"""What the papers predict of the measurements, and what is smaller here than there."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.launch import Expectation, Results
from recurrentgemma.experiments.config import ReproduceConfig
from recurrentgemma.experiments.contenders import ATTENTION, GRIFFIN, HAWK, RECURRENT

CLAIM = (
    "A model of gated linear recurrences and local attention decodes from a state of fixed size, "
    "so that its speed does not fall with the context, at the loss of a Transformer of equal size "
    "and training, and it goes on working beyond the length that it was trained on "
    "(Griffin, arXiv:2402.19427; RecurrentGemma, arXiv:2404.07839)."
)
FLAT = 1.25  # Largest ratio of two times that still counts as equal on a shared machine.
SLOWER = 1.5  # Least ratio of two times that counts as slowing down.
RISES = 1.1  # Loss beyond the training length to loss at it: a sharp rise.
LEVEL = 1.01  # The same: no rise.

Measured = Mapping[str, Any]


def results(config: ReproduceConfig, measured: Measured) -> Results:
    """The claim with its expectations, to be decided by `measured`."""
    return Results(CLAIM, setting(config, measured), EXPECTATIONS, measured)


def setting(config: ReproduceConfig, measured: Measured) -> str:
    """What was run, and plainly what is smaller than in the papers."""
    speed, language, induction = (measured[name] for name in ("speed", "language", "induction"))
    memory = measured["memory"]
    return (
        f"On {speed['device']}. Griffin, Hawk (recurrences alone) and a full-attention decoder "
        "(multi-query, rotary positions) of equal parameter counts: "
        f"{memory['parameters'][GRIFFIN]:,} for sizes and times ({config.speed.model.dtype}, "
        f"{speed['batch_size']} row(s), contexts to {speed['contexts'][-1]:,}); "
        f"{language['parameters'][GRIFFIN]:,} for text, each trained on the same "
        f"{language['train_tokens']:,} tokens of the {config.language.data.corpus.kind} corpus in "
        f"rows of {language['train_length']} with a window of "
        f"{config.language.model.attention_window}; {induction['parameters'][GRIFFIN]:,} for "
        f"induction ({config.induction.model.num_layers} blocks), "
        f"{config.induction.train.steps:,} steps at length {induction['train_length']} "
        f"with a window of {config.induction.model.attention_window}. One seed ({config.seed}). "
        "Smaller than in the papers: there, models of 100 M to 14 B parameters trained on up to "
        "300 B tokens of web text, books and code (RecurrentGemma: 2 B and 9 B on 2 T) in rows of "
        "2,048 to 8,192, were timed on TPUs; induction was trained for 100,000 steps at length "
        "256 with a window of 128. Losses and accuracies of so short trainings show directions, "
        "not the papers' figures."
    )


def ratio(values: Sequence[float]) -> float:
    """The last of a series to the first."""
    return values[-1] / values[0]


def _state_is_fixed(m: Measured) -> bool:
    memory = m["memory"]
    return all(
        len(set(memory["bytes"][name])) == 1
        and memory["bytes"][name] == memory["formula_bytes"][name]
        for name in RECURRENT
    )


def _cache_grows(m: Measured) -> bool:
    sizes, contexts = m["memory"]["bytes"][ATTENTION], m["memory"]["contexts"]
    per_token = [size / context for size, context in zip(sizes, contexts)]
    return len(set(per_token)) == 1 and sizes[-1] > m["memory"]["bytes"][GRIFFIN][-1]


def _decode_is_flat(m: Measured) -> bool:
    return all(ratio(m["speed"]["decode_seconds"][name]) <= FLAT for name in RECURRENT)


def _attention_slows_down(m: Measured) -> bool:
    return ratio(m["speed"]["decode_seconds"][ATTENTION]) >= SLOWER


def _decodes_faster(m: Measured) -> bool:
    seconds = {name: series[-1] for name, series in m["speed"]["decode_seconds"].items()}
    return all(seconds[name] < seconds[ATTENTION] for name in RECURRENT)


def _prefill_is_linear(m: Measured) -> bool:
    speed = m["speed"]
    growth = ratio(speed["prompts"])
    return all(ratio(speed["prefill_seconds"][name]) <= SLOWER * growth for name in RECURRENT)


def _prefill_keeps_up(m: Measured) -> bool:
    seconds = {name: series[-1] for name, series in m["speed"]["prefill_seconds"].items()}
    return seconds[GRIFFIN] <= FLAT * seconds[ATTENTION]


def _griffin_loss(m: Measured) -> bool:
    loss = m["language"]["loss"]
    return loss[GRIFFIN][0] <= loss[ATTENTION][0]


def _hawk_loss(m: Measured) -> bool:
    loss = m["language"]["loss"]
    return loss[HAWK][0] <= 1.02 * loss[ATTENTION][0]


def _recurrent_loss_beyond(m: Measured) -> bool:
    loss = m["language"]["loss"]
    return all(max(loss[name]) <= LEVEL * loss[name][0] for name in RECURRENT)


def _attention_loss_beyond(m: Measured) -> bool:
    return ratio(m["language"]["loss"][ATTENTION]) >= RISES


def _accuracy(m: Measured, name: str, multiple: int) -> float:
    induction = m["induction"]
    place = induction["lengths"].index(multiple * induction["train_length"])
    return induction["accuracy"][name][place]


def _induction_is_learned(m: Measured) -> bool:
    return all(_accuracy(m, name, 1) >= 0.995 for name in (*RECURRENT, ATTENTION))


def _induction_of_hawk(m: Measured) -> bool:
    return _accuracy(m, HAWK, 4) >= 0.95


def _induction_beyond(m: Measured) -> bool:
    return all(_accuracy(m, name, 2) >= _accuracy(m, ATTENTION, 2) for name in RECURRENT)


def _induction_of_attention(m: Measured) -> bool:
    return _accuracy(m, ATTENTION, 4) <= 0.5


EXPECTATIONS = (
    Expectation(
        "state_fixed",
        "the decode state of Griffin and Hawk has the same bytes at every context, those of the "
        "formula",
        _state_is_fixed,
    ),
    Expectation(
        "cache_grows",
        "the cache of full attention grows in proportion to the context and is larger at the "
        "longest",
        _cache_grows,
    ),
    Expectation(
        "decode_flat",
        "Griffin and Hawk take at most 1.25 times as long for a token at the longest context as "
        "at the shortest",
        _decode_is_flat,
    ),
    Expectation(
        "decode_attention_slows",
        "full attention takes at least 1.5 times as long for a token at the longest context as at "
        "the shortest",
        _attention_slows_down,
    ),
    Expectation(
        "decode_faster",
        "at the longest context Griffin and Hawk decode faster than full attention",
        _decodes_faster,
    ),
    Expectation(
        "prefill_linear",
        "Griffin and Hawk take at most 1.5 times as long for each token of the longest prompt as "
        "of the shortest",
        _prefill_is_linear,
    ),
    Expectation(
        "prefill_keeps_up",
        "Griffin reads the longest prompt in at most 1.25 times the time of full attention",
        _prefill_keeps_up,
    ),
    Expectation(
        "loss_griffin",
        "after equal training Griffin's held-out loss is not above that of full attention",
        _griffin_loss,
    ),
    Expectation(
        "loss_hawk",
        "after equal training Hawk's held-out loss is at most 2 % above that of full attention",
        _hawk_loss,
    ),
    Expectation(
        "loss_beyond_recurrent",
        "at no length beyond the training length is the loss of Griffin or Hawk higher than at it "
        "(by more than 1 %)",
        _recurrent_loss_beyond,
    ),
    Expectation(
        "loss_beyond_attention",
        "at the longest length the loss of full attention is at least 10 % higher than at the "
        "training length",
        _attention_loss_beyond,
    ),
    Expectation(
        "induction_learned",
        "all three recall the token at the training length (accuracy 1.00)",
        _induction_is_learned,
    ),
    Expectation(
        "induction_hawk",
        "Hawk recalls it in at least 95 % of rows of 4 times the training length",
        _induction_of_hawk,
    ),
    Expectation(
        "induction_beyond",
        "at twice the training length Griffin and Hawk are at least as accurate as full attention",
        _induction_beyond,
    ),
    Expectation(
        "induction_attention_fails",
        "at 4 times the training length full attention recalls it in at most half of the rows",
        _induction_of_attention,
    ),
)
