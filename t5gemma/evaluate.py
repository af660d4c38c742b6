"""`python -m t5gemma.evaluate`: text, answers and classification, of one checkpoint."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from common.data.corpus import CorpusConfig, open_corpus
from common.data.sources import HealthyDocuments
from common.data.tokenizers import Tokenizer, check_vocabulary, load_tokenizer
from common.errors import UserError
from common.launch import Run, Table, launch, write_report
from common.launch import config as configs
from common.launch.workdir import write_atomically
from common.models.loading import attach_tokenizer
from t5gemma.checkpoint import load
from t5gemma.data import ul2_tokens
from t5gemma.evaluation import AnswerScores, TextScore, score_answers, score_text
from t5gemma.fine_tuning import FineTuning, Scores, fine_tune
from t5gemma.instruction import Instruction, Pair, read_pairs
from t5gemma.model import T5Gemma
from t5gemma.presets import Config
from t5gemma.ul2 import UL2Tokens

EXAMPLES = [
    "python -m t5gemma.evaluate --checkpoint=runs/t5-cpu",
    "python -m t5gemma.evaluate --checkpoint=runs/t5-tuned --pairs=dev.jsonl --num_beams=4",
    "python -m t5gemma.evaluate --checkpoint=t5gemma-2b-2b-ul2 --dtype=bfloat16 "
    "--train=boolq/train.jsonl --dev=boolq/dev.jsonl --learning_rates=1e-5,3e-5",
]
OPTIONS = flags.FlagValues()
_own: dict[str, Any] = {"flag_values": OPTIONS}
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "what to load: anything t5gemma.load takes", required=True, **_own
)
CORPUS = flags.DEFINE_string(
    "corpus", None, "text files (a glob) to continue; default the run's own held-out part", **_own
)
PREFIX = flags.DEFINE_integer("prefix", None, "tokens that the encoder reads of a text", **_own)
CONTINUATION = flags.DEFINE_integer("continuation", None, "tokens that are scored of it", **_own)
TOKENS = flags.DEFINE_integer("tokens", 65_536, "how many tokens of text to score", **_own)
UL2 = flags.DEFINE_enum(
    "ul2", "auto", ["auto", "yes", "no"], "put texts in UL2's sequential mode; auto: as trained",
    **_own,
)  # fmt: skip
PAIRS = flags.DEFINE_string("pairs", None, "JSONL of prompt and response to compare with", **_own)
PROMPT_FIELD = flags.DEFINE_string("prompt_field", "prompt", "field of the prompt", **_own)
RESPONSE_FIELD = flags.DEFINE_string("response_field", "response", "field of the response", **_own)
TEMPLATE = flags.DEFINE_enum(
    "template", None, ["none", "gemma"], "how prompts are put; default as the run was trained",
    **_own,
)  # fmt: skip
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "most tokens of an answer", **_own)
NUM_BEAMS = flags.DEFINE_integer("num_beams", 1, "hypotheses of the search; 1: greedy", **_own)
STEMMER = flags.DEFINE_bool("stemmer", False, "let ROUGE compare stems of English words", **_own)
TRAIN = flags.DEFINE_string("train", None, "JSONL to fine-tune a classifier on", **_own)
DEV = flags.DEFINE_string("dev", None, "JSONL that the classifier is scored on", **_own)
LEARNING_RATES = flags.DEFINE_list("learning_rates", ["1e-4"], "of fine-tuning, to try", **_own)
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["32"], "of fine-tuning, to try", **_own)
DROPOUTS = flags.DEFINE_list("dropouts", ["0.1"], "of fine-tuning, to try", **_own)
EPOCHS = flags.DEFINE_float("epochs", 3.0, "of fine-tuning", **_own)
POOLING = flags.DEFINE_enum("pooling", "last", ["last", "mean"], "of the encoder's states", **_own)
MAX_LENGTH = flags.DEFINE_integer("max_length", 512, "tokens of a text to classify", **_own)
BATCH = flags.DEFINE_integer("batch", 8, "rows computed at a time", **_own)
SEED = flags.DEFINE_integer("seed", 0, "of fine-tuning", **_own)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "compute dtype", **_own)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "a tokenizer, if not beside", **_own)
OUTPUT = flags.DEFINE_string(
    "output", None, "folder of the report; default <checkpoint>/report/evaluation for a run, else "
    "runs/t5gemma-evaluate-<checkpoint>", **_own,
)  # fmt: skip


def _main(run: Run) -> None:
    path = Path(CHECKPOINT.value)
    pairs, settings = _check_flags()
    trained = _run_config(path)
    # Fine-tuning moves by steps that bfloat16 parameters would round away.
    model = load(path, dtype=DTYPE.value, param_dtype="float32" if TRAIN.value else None)
    if TOKENIZER.value is not None:
        tokenizer = load_tokenizer(TOKENIZER.value)
        check_vocabulary(tokenizer, model.vocab_size)
        attach_tokenizer(model, tokenizer)
    if model.tokenizer is None:
        raise UserError(f"there is no tokenizer beside {path}: name one with --tokenizer")
    text = answers = classes = None
    encoder_bos = trained is None or trained.data.encoder_bos
    if CORPUS.value is not None or (pairs is None and TRAIN.value is None):
        text = _text(model, trained, encoder_bos)
        print(f"held-out text: {text.loss:.4f} nats per token, perplexity {text.perplexity:.2f}")
    if pairs is not None:
        answers = _answers(model, pairs, trained, encoder_bos)
        shown = ", ".join(f"{name} {value:.1f}" for name, value in answers.metrics.items())
        print(f"{len(pairs)} answers: {shown}")
    folder = _output(path)
    if TRAIN.value is not None:
        runs = folder / "classification"
        command = run.command
        classes = fine_tune(
            model,
            TRAIN.value,
            DEV.value,
            settings,
            runs,
            checkpoint=str(path.resolve()),
            resume_command=command,
        )
        if classes.preempted:
            return
        print(
            f"classification: {classes.accuracy:.1%} of {classes.dev_texts} texts right; "
            f"the most frequent label alone {classes.majority:.1%}"
        )
    _report(path, folder, text, pairs, answers, classes)


def _check_flags() -> tuple[list[Pair] | None, FineTuning]:
    """Reads what is small and refuses what does not go together, before anything is loaded."""
    for flag in (TOKENS, BATCH, MAX_NEW_TOKENS, NUM_BEAMS):
        if flag.value < 1:
            raise UserError(f"--{flag.name} must be at least 1, not {flag.value}")
    if (TRAIN.value is None) != (DEV.value is None):
        raise UserError("classification needs both --train and --dev")
    settings = FineTuning(
        learning_rates=_numbers(LEARNING_RATES, float),
        batch_sizes=_numbers(BATCH_SIZES, int),
        dropouts=_numbers(DROPOUTS, float),
        epochs=EPOCHS.value,
        pooling=POOLING.value,
        max_length=MAX_LENGTH.value,
        seed=SEED.value,
    )
    if PAIRS.value is None:
        return None, settings
    return read_pairs(PAIRS.value, PROMPT_FIELD.value, RESPONSE_FIELD.value), settings


def _numbers(flag: Any, kind: Any) -> tuple[Any, ...]:
    try:
        return tuple(kind(text) for text in flag.value)
    except ValueError as error:
        raise UserError(f"--{flag.name} takes numbers separated by commas") from error


def _run_config(path: Path) -> Config | None:
    """The configuration of the run that the checkpoint is, if it is one of this package's."""
    if not (path / "checkpoints").is_dir() or not (path / "config.json").is_file():
        return None
    where = f"{path}/config.json"
    try:
        data = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {where}: {error}") from error
    # An adaptation's has more fields; that of another launcher lacks some.
    own = {field.name for field in dataclasses.fields(Config)}
    if not isinstance(data, dict) or not own <= set(data):
        return None
    return configs.from_dict(Config, {name: data[name] for name in own}, where)


def _text(model: T5Gemma, trained: Config | None, encoder_bos: bool) -> TextScore:
    corpus = CorpusConfig(split="heldout")
    prefix, continuation = 256, 256
    if trained is not None:
        corpus = dataclasses.replace(trained.data.corpus, split="heldout")
        # Room for bos, the mode and a sentinel.
        prefix = max(1, trained.data.encoder_length - 3)
        continuation = max(1, trained.data.decoder_length - 1)
    if CORPUS.value is not None:
        corpus = CorpusConfig(kind="text", path=CORPUS.value, split="all")
    prefix = prefix if PREFIX.value is None else PREFIX.value
    continuation = continuation if CONTINUATION.value is None else CONTINUATION.value
    wanted = (prefix + continuation) * (1 + TOKENS.value // max(1, continuation))
    tokenizer: Tokenizer = model.tokenizer
    documents: list[list[int]] = []
    size = 0
    for text in HealthyDocuments(open_corpus(corpus), corpus.error_budget):
        documents.append(tokenizer.encode(text))
        size += len(documents[-1])
        if size > wanted:
            break
    return score_text(
        model,
        documents,
        prefix=prefix,
        continuation=continuation,
        tokens=TOKENS.value,
        batch=BATCH.value,
        encoder_bos=encoder_bos,
        special=_special(model, trained),
    )


def _special(model: T5Gemma, trained: Config | None) -> UL2Tokens | None:
    """UL2's ids, if texts are to be put as UL2 puts them."""
    by_ul2 = trained is not None and trained.objective.kind == "ul2"
    if UL2.value == "no" or (UL2.value == "auto" and not by_ul2):
        return None
    config = (trained or Config(model.config)).objective.ul2
    return ul2_tokens(config, model.tokenizer, model.vocab_size)


def _answers(
    model: T5Gemma, pairs: list[Pair], trained: Config | None, encoder_bos: bool
) -> AnswerScores:
    template = TEMPLATE.value
    if template is None:
        template = "none" if trained is None else trained.objective.pairs.template
    return score_answers(
        model,
        pairs,
        Instruction(model.tokenizer, template=template, encoder_bos=encoder_bos),
        max_new_tokens=MAX_NEW_TOKENS.value,
        num_beams=NUM_BEAMS.value,
        batch=BATCH.value,
        stemmer=STEMMER.value,
    )


def _output(path: Path) -> Path:
    if OUTPUT.value is not None:
        return Path(OUTPUT.value)
    if (path / "checkpoints").is_dir():
        return path / "report" / "evaluation"
    return Path("runs") / f"t5gemma-evaluate-{path.resolve().name}"


def _report(
    path: Path,
    folder: Path,
    text: TextScore | None,
    pairs: list[Pair] | None,
    answers: AnswerScores | None,
    classes: Scores | None,
) -> None:
    """Writes a page, `scores.json`, and the answers beside their references."""
    tables, scores = [], dict[str, Any]()
    if text is not None:
        scores["text"] = dataclasses.asdict(text)
        columns = [name.replace("_", " ") for name in scores["text"]]
        tables.append(Table("Held-out text", columns, [list(scores["text"].values())]))
    if answers is not None and pairs is not None:
        found = {"loss": answers.loss, "perplexity": answers.perplexity, **answers.metrics}
        scores["answers"] = {"pairs": len(pairs), "num_beams": NUM_BEAMS.value, **found}
        note = "Loss in nats per token of the references; the other scores from 0 to 100."
        rows = [list(row) for row in found.items()]
        tables.append(Table(f"{len(pairs)} answers", ("measure", "value"), rows, note))
    if classes is not None:
        scores["classification"] = {
            "accuracy": classes.accuracy,
            "majority": classes.majority,
            "labels": list(classes.labels),
            "train_texts": classes.train_texts,
            "dev_texts": classes.dev_texts,
            "trials": [dataclasses.asdict(trial) for trial in classes.trials],
        }
        columns = [field.name.replace("_", " ") for field in dataclasses.fields(classes.trials[0])]
        rows = [list(dataclasses.astuple(trial)) for trial in classes.trials]
        note = f"Share of {classes.dev_texts} texts, best of each training; the most frequent "
        note += f"label alone: {classes.majority:.4f}."
        tables.append(Table("Classification", columns, rows, note))
    write_report(folder, "Evaluation", text=f"Checkpoint {path}.", tables=tables)
    write_atomically(folder / "scores.json", json.dumps(scores, indent=2) + "\n")
    if answers is not None and pairs is not None:
        lines = [
            json.dumps({"prompt": p.prompt, "response": p.response, "answer": a})
            for p, a in zip(pairs, answers.answers, strict=True)
        ]
        write_atomically(folder / "answers.jsonl", "\n".join(lines) + "\n")
    print(f"report: {folder / 'README.md'}")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="t5gemma",
        verb="evaluate",
        description="Measures a T5Gemma: perplexity of held-out text, exact match, ROUGE and BLEU "
        "of its answers, accuracy of a classifier fine-tuned on its encoder.",
        examples=EXAMPLES,
        flags=OPTIONS,
        argv=argv,
    )


if __name__ == "__main__":
    main()
