"""The loss of a model that knows only how frequent each token is: what training has to beat."""

import numpy as np

from common.data.rows import Rows


def count_targets(rows: Rows, vocab_size: int, max_rows: int | None = None) -> np.ndarray:
    """How often each id is to be predicted in the first `max_rows` rows, int64 [vocab_size]."""
    counts = np.zeros(vocab_size, np.int64)
    limit = len(rows) if max_rows is None else min(max_rows, len(rows))
    for start in range(0, limit, 256):
        batch = rows.batch(np.arange(start, min(start + 256, limit)))
        scored = batch["targets"][batch["weights"] > 0]
        counts += np.bincount(scored, minlength=vocab_size)
    return counts


def unigram_cross_entropy(train_counts: np.ndarray, heldout_counts: np.ndarray) -> float:
    """Cross-entropy of held-out targets under add-one-smoothed training frequencies.

    Args:
        train_counts: [vocab_size], how often each id is a target in training
            (`TokenStore.target_counts` or `count_targets`).
        heldout_counts: [vocab_size], the same of the held-out rows.

    Returns:
        Nats per token.
    """
    smoothed = np.asarray(train_counts, np.float64) + 1.0
    log_probability = np.log(smoothed) - np.log(smoothed.sum())
    heldout = np.asarray(heldout_counts, np.float64)
    if heldout.shape != smoothed.shape:
        raise ValueError(f"counts of {smoothed.shape} and {heldout.shape} tokens")
    return float(-(heldout * log_probability).sum() / heldout.sum())
