"""What a run trains on: text or pairs, their tokenizer, and packed rows of an objective."""

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from common.data.corpus import CorpusConfig, open_corpus
from common.data.sources import digest
from common.data.text import tokenize_corpus, tokenizer_for
from common.data.token_store import TokenStore
from common.data.tokenizers import Tokenizer, check_vocabulary, load_tokenizer
from common.errors import UserError
from t5gemma.config import T5GemmaConfig
from t5gemma.examples import CorpusExamples, Examples, Objective
from t5gemma.instruction import Instruction, InstructionExamples, Pair, read_pairs
from t5gemma.packing import PackedExamples
from t5gemma.prefix_lm import PrefixLM
from t5gemma.ul2 import T5GEMMA2_MIXTURE, UL2, UL2_MIXTURE, Denoiser, UL2Tokens

TOKENIZER_FILE = "tokenizer.model"
FEWEST_IDS = 8  # Three modes and five sentinels.
MOST_SENTINELS = 96
MOST_CHECKED = 1 << 28  # Tokens of the corpus that are looked through.
_UNUSED = re.compile(r"[<\[]unused_?\d+[>\]]")
_TURNS = re.compile(r"turn|im_|header|eot|unk", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class PrefixConfig:
    """PrefixLM: see `prefix_lm.PrefixLM`."""

    shortest: float = 0.5
    longest: float = 0.5


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """Distillation from a decoder-only model; see `objective.Distillation`.

    Attributes:
      checkpoint: anything that `common.models.load_decoder` takes.
      dtype: what the teacher computes in, and is kept in.
      top_k, ground_truth: see `Distillation`.
    """

    checkpoint: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    top_k: int | None = None
    ground_truth: float = 0.0


@dataclasses.dataclass(frozen=True)
class UL2Config:
    """UL2; see `ul2.UL2`.

    Attributes:
      recipe: the mixture of denoisers: "ul2", of that paper, or "t5gemma2", of the next T5Gemma.
      mixture: other denoisers, instead of the recipe's.
      special: mode and sentinel ids; None takes those that the tokenizer calls unused (Gemma), or
        the last ids of the model's vocabulary where the tokenizer leaves some, or else the
        tokenizer's own special tokens that end no text or turn.
    """

    recipe: Literal["ul2", "t5gemma2"] = "ul2"
    mixture: tuple[Denoiser, ...] | None = None
    special: UL2Tokens | None = None

    @property
    def denoisers(self) -> tuple[Denoiser, ...]:
        """The mixture that is meant."""
        recipes = {"ul2": UL2_MIXTURE, "t5gemma2": T5GEMMA2_MIXTURE}
        return recipes[self.recipe] if self.mixture is None else self.mixture


@dataclasses.dataclass(frozen=True)
class PairsConfig:
    """Instruction tuning; see `instruction`.

    Attributes:
      path: JSONL with a prompt and a response a line.
      heldout_path: another such file; None holds out a share of the first.
      heldout_fraction: that share.
      prompt_field, response_field: names of the fields.
      template, too_long: see `Instruction` and `InstructionExamples`.
    """

    path: str | None = None
    heldout_path: str | None = None
    heldout_fraction: float = 0.05
    prompt_field: str = "prompt"
    response_field: str = "response"
    template: Literal["none", "gemma"] = "none"
    too_long: Literal["error", "skip", "cut"] = "error"


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned.

    Attributes:
      kind: "prefix_lm", "distillation" (PrefixLM with a teacher), "ul2" or "instruction".
      prefix: of "prefix_lm" and "distillation".
      teacher: of "distillation".
      ul2: of "ul2".
      pairs: of "instruction".
    """

    kind: Literal["prefix_lm", "distillation", "ul2", "instruction"] = "prefix_lm"
    prefix: PrefixConfig = dataclasses.field(default_factory=PrefixConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    ul2: UL2Config = dataclasses.field(default_factory=UL2Config)
    pairs: PairsConfig = dataclasses.field(default_factory=PairsConfig)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to read and how to cut it.

    Attributes:
      corpus: where documents come from; its `split` is set by the launcher.
      tokenizer: a tokenizer's file or folder; None takes the one beside the checkpoint that
        training starts from, or trains one on the corpus.
      encoder_length, decoder_length: S and T, positions of a row. UL2's targets are on average
        less than half as long as its inputs.
      piece_length: most tokens of a document in one example; None: as many as always fit a row.
        Shorter pieces fill rows better.
      passes: how often the corpus goes by before UL2's spans and random splits repeat.
      encoder_bos: begin the encoder's tokens with bos, where the tokenizer has one.
      spare_tokens: ids at the vocabulary's end that a tokenizer trained here leaves to UL2.
      tokenizer_characters: how much text a tokenizer is trained on.
    """

    corpus: CorpusConfig = dataclasses.field(default_factory=CorpusConfig)
    tokenizer: str | None = None
    encoder_length: int = 512
    decoder_length: int = 512
    piece_length: int | None = None
    passes: int = 1
    encoder_bos: bool = True
    spare_tokens: int = 64
    tokenizer_characters: int = 6_000_000

    def __post_init__(self) -> None:
        if min(self.encoder_length, self.decoder_length) < 2:
            raise UserError("data.encoder_length and data.decoder_length must be at least 2")


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Packed rows.

    Attributes:
      tokenizer: of both sides.
      train, heldout: rows; no document or pair is in both.
      special: UL2's ids, None for another objective.
    """

    tokenizer: Tokenizer
    train: PackedExamples
    heldout: PackedExamples
    special: UL2Tokens | None = None

    def describe(self) -> str:
        """How much of what there is, as one line."""
        sizes = (f"{rows.examples:,}" for rows in (self.train, self.heldout))
        return "{} examples for training and {} held out".format(*sizes)


def check_data(data: DataConfig, objective: ObjectiveConfig, vocab_size: int) -> None:
    """Opens what the user named, writing nothing, so that mistakes show before a run begins."""
    if data.tokenizer is not None:
        check_vocabulary(load_tokenizer(data.tokenizer), vocab_size)
    if objective.kind == "instruction":
        _read_pairs(objective.pairs)
        return
    for split in ("train", "heldout"):
        open_corpus(dataclasses.replace(data.corpus, split=split))


def prepare_data(
    data: DataConfig,
    objective: ObjectiveConfig,
    model: T5GemmaConfig,
    folder: Path,
    *,
    seed: int,
    say: Callable[[str], None],
    tokenizer: Tokenizer | None = None,
) -> TrainingData:
    """Trains or copies the tokenizer into `folder` and tokenises what is read, once.

    Args:
      data: what to read.
      objective: what to make of it.
      model: who is to read it.
      folder: the run folder; holds the tokenizer and the token arrays.
      seed: of spans and splits.
      say: prints a line.
      tokenizer: of the checkpoint that training starts from, if there is one.

    Raises:
      UserError: something does not fit; the message names the field.
    """
    tokenizer = _tokenizer(data, objective, model, folder / TOKENIZER_FILE, say, tokenizer)
    special = None
    if objective.kind == "instruction":
        examples = _pair_examples(data, objective.pairs, tokenizer)
    else:
        stores = {
            split: tokenize_corpus(
                dataclasses.replace(data.corpus, split=split), tokenizer, folder / "data"
            )
            for split in ("train", "heldout")
        }
        if objective.kind == "ul2":
            special = ul2_tokens(objective.ul2, tokenizer, model.decoder.vocab_size)
            check_unused(special, stores["train"])
        maker = make_objective(data, objective, tokenizer, special)
        examples = _text_examples(data, maker, stores, tokenizer, seed)
    rows = {}
    for split, made in examples.items():
        rows[split] = PackedExamples(
            made,
            data.encoder_length,
            data.decoder_length,
            start_id=model.bos_token,
            pad_id=model.pad_token,
        )
        full = " and ".join(f"{share:.0%}" for share in rows[split].efficiency)
        say(f"{split}: {len(made):,} examples in {len(rows[split]):,} rows, {full} full")
    return TrainingData(tokenizer, rows["train"], rows["heldout"], special)


def discard_data(folder: Path) -> None:
    """Removes what `prepare_data` wrote, so that the folder is free for a corrected command."""
    shutil.rmtree(folder / "data", ignore_errors=True)
    (folder / TOKENIZER_FILE).unlink(missing_ok=True)


def make_objective(
    data: DataConfig, objective: ObjectiveConfig, tokenizer: Tokenizer, special: UL2Tokens | None
) -> Objective:
    """The transform of a text objective."""
    bos = tokenizer.bos_id if data.encoder_bos and tokenizer.bos_id >= 0 else None
    if objective.kind == "ul2":
        assert special is not None
        if tokenizer.eos_id < 0:
            raise UserError("UL2 needs a tokenizer with an eos token: it ends the targets")
        return UL2(bos, tokenizer.eos_id, mixture=objective.ul2.denoisers, special=special)
    if objective.kind == "distillation" and tokenizer.bos_id >= 0 and bos is None:
        raise UserError(
            "distillation needs data.encoder_bos: the teacher's texts begin with a bos token"
        )
    prefix = objective.prefix
    return PrefixLM(bos, shortest=prefix.shortest, longest=prefix.longest)


def ul2_tokens(config: UL2Config, tokenizer: Tokenizer, vocab_size: int) -> UL2Tokens:
    """UL2's ids for a tokenizer; see `UL2Config`."""
    special = config.special or _free_ids(tokenizer, vocab_size)
    if max(special.ids()) >= vocab_size:
        raise UserError(
            f"objective.ul2.special has id {max(special.ids())}, but the model's vocabulary is "
            f"0..{vocab_size - 1}"
        )
    return special


def _free_ids(tokenizer: Tokenizer, vocab_size: int) -> UL2Tokens:
    """Ids that no text has; see `UL2Config`."""
    spare = vocab_size - tokenizer.vocab_size
    roles = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *tokenizer.stop_tokens}
    named = {
        name: token
        for name, token in tokenizer.special_tokens.items()
        if token not in roles and not _TURNS.search(name)
    }
    unused = [token for name, token in named.items() if _UNUSED.fullmatch(name)]
    for run in (_longest_run(unused), range(vocab_size - spare, vocab_size), _longest_run(named)):
        if len(run) >= FEWEST_IDS:
            modes = (run[0], run[1], run[2])
            return UL2Tokens(modes, run[-1], min(len(run) - 3, MOST_SENTINELS))
    raise UserError(
        f"the tokenizer uses all but {spare} of the model's {vocab_size} ids, so that none are "
        "left for UL2: set objective.ul2.special to ids that no text has"
    )


def _longest_run(tokens: Iterable[int] | Mapping[str, int]) -> range:
    """The longest run of ids without a gap."""
    ids = sorted(tokens.values() if isinstance(tokens, Mapping) else tokens)
    best = range(0)
    start = 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or ids[stop] != ids[stop - 1] + 1:
            if stop - start > len(best):
                best = range(ids[start], ids[stop - 1] + 1)
            start = stop
    return best


def check_unused(special: UL2Tokens, store: TokenStore) -> None:
    """Raises if a mode or sentinel is a token of the corpus, where it would be mistaken."""
    wanted = np.array(special.ids())
    for start in range(0, min(len(store.tokens), MOST_CHECKED), 1 << 24):
        part = store.tokens[start : start + (1 << 24)]
        found = np.isin(wanted, part)
        if found.any():
            raise UserError(
                f"UL2's id {wanted[found][0]} is a token that texts of the corpus have: set "
                "objective.ul2.special to ids that no text has"
            )


def _tokenizer(
    data: DataConfig,
    objective: ObjectiveConfig,
    model: T5GemmaConfig,
    path: Path,
    say: Callable[[str], None],
    given: Tokenizer | None,
) -> Tokenizer:
    """The run's tokenizer, which from the first time on lies at `path`."""
    vocabulary = model.decoder.vocab_size
    if not path.exists():
        if data.tokenizer is not None:
            given = load_tokenizer(data.tokenizer)
        if given is not None:
            given.save(path)
        elif objective.kind == "instruction":
            raise UserError("instruction tuning needs data.tokenizer, or a checkpoint with one")
    if path.exists():
        tokenizer = load_tokenizer(path)
    else:
        train = dataclasses.replace(data.corpus, split="train")
        pieces = vocabulary - data.spare_tokens
        say(f"training a tokenizer of {pieces} pieces on the {train.kind} corpus")
        tokenizer = tokenizer_for(train, pieces, path, max_characters=data.tokenizer_characters)
    check_vocabulary(tokenizer, vocabulary)
    return tokenizer


def _text_examples(
    data: DataConfig,
    maker: Objective,
    stores: dict[str, TokenStore],
    tokenizer: Tokenizer,
    seed: int,
) -> dict[str, Examples]:
    longest = maker.longest_piece(data.encoder_length, data.decoder_length)
    length = longest if data.piece_length is None else data.piece_length
    if length > longest:
        raise UserError(
            f"data.piece_length is {length}, but a piece of more than {longest} tokens does not "
            f"always fit rows of {data.encoder_length} and {data.decoder_length}"
        )
    return {
        split: CorpusExamples(
            store,
            maker,
            piece_length=length,
            seed=seed,
            passes=data.passes if split == "train" else 1,
            has_bos=tokenizer.bos_id >= 0,
            has_eos=tokenizer.eos_id >= 0,
        )
        for split, store in stores.items()
    }


def _pair_examples(
    data: DataConfig, config: PairsConfig, tokenizer: Tokenizer
) -> dict[str, Examples]:
    transform = Instruction(tokenizer, template=config.template, encoder_bos=data.encoder_bos)
    sizes = data.encoder_length, data.decoder_length
    return {
        split: InstructionExamples(pairs, transform, *sizes, too_long=config.too_long)
        for split, pairs in _read_pairs(config).items()
    }


def _read_pairs(config: PairsConfig) -> dict[str, list[Pair]]:
    """The pairs of both splits; a pair's side of the division depends on its text alone."""
    if config.path is None:
        raise UserError("instruction tuning needs objective.pairs.path, a JSONL file")
    fields = config.prompt_field, config.response_field
    pairs = read_pairs(config.path, *fields)
    if config.heldout_path is not None:
        return {"train": pairs, "heldout": read_pairs(config.heldout_path, *fields)}
    keys = np.array([int(digest(p.prompt, p.response)[:16], 16) for p in pairs], np.uint64)
    heldout = keys.astype(np.float64) / 2.0**64 < config.heldout_fraction
    split = {
        "train": [pair for pair, out in zip(pairs, heldout) if not out],
        "heldout": [pair for pair, out in zip(pairs, heldout) if out],
    }
    for name, part in split.items():
        if not part:
            raise UserError(
                f"{config.path} has {len(pairs)} pairs, none of them in the {name} part: change "
                "objective.pairs.heldout_fraction, or set objective.pairs.heldout_path"
            )
    return split
