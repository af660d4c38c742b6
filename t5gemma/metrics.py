"""How near generated texts come to references: exact match, ROUGE and BLEU.

ROUGE is computed by rouge-score and BLEU by sacrebleu, whose numbers are those that papers report.
"""

import re
import string
from collections.abc import Sequence

from common.errors import UserError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
ROUGE = ("rouge1", "rouge2", "rougeL")


def generation_metrics(
    predictions: Sequence[str], references: Sequence[str], *, stemmer: bool = False
) -> dict[str, float]:
    """Scores of texts against one reference each, all from 0 to 100.

    Args:
      predictions, references: as many of the one as of the other.
      stemmer: let ROUGE compare English words by their stems, as summarisation papers often do.

    Returns:
      `exact_match` (the same text but for white space at its ends), `normalised_match` (nor for
      case, punctuation and articles, as SQuAD counts), `rouge1`, `rouge2`, `rougeL` (means of the
      F-measure; its words are of the letters a to z and digits alone, so that it is no measure for
      other scripts) and `bleu` (of the whole corpus, sacrebleu's 13a tokens).

    Raises:
      UserError: there is nothing to score.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    if not references:
        raise UserError("there are no texts to score")
    pairs = list(zip(predictions, references))
    matches = {
        "exact_match": [p.strip() == r.strip() for p, r in pairs],
        "normalised_match": [normalised(p) == normalised(r) for p, r in pairs],
    }
    scores = {name: 100.0 * sum(values) / len(pairs) for name, values in matches.items()}
    return scores | _rouge(pairs, stemmer) | {"bleu": _bleu(predictions, references)}


def normalised(text: str) -> str:
    """A short answer's text as SQuAD compares it."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _rouge(pairs: Sequence[tuple[str, str]], stemmer: bool) -> dict[str, float]:
    try:
        from rouge_score import rouge_scorer  # Takes seconds to import.
    except ImportError as error:
        raise UserError("ROUGE needs `pip install rouge-score`") from error
    scorer = rouge_scorer.RougeScorer(list(ROUGE), use_stemmer=stemmer)
    scores = [scorer.score(reference, prediction) for prediction, reference in pairs]
    return {
        name: 100.0 * sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE
    }


def _bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    try:
        import sacrebleu
    except ImportError as error:
        raise UserError("BLEU needs `pip install sacrebleu`") from error
    return float(sacrebleu.corpus_bleu(list(predictions), [list(references)]).score)
