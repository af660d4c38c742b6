"""Donors of an adaptation: decoder-only models by path, or trained in the run itself."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from common.data.assets import ASSETS, asset
from common.data.packing import PackedRows
from common.data.pipeline import batches, evaluation_batches
from common.data.text import tokenize_corpus
from common.data.tokenizers import Tokenizer
from common.errors import UserError
from common.launch import RunFolder
from common.models import Decoder, DecoderConfig, load_decoder
from common.models.flops import decoder_flops
from common.sharding import first_process_first, local_rows, make_mesh
from common.train import TrainConfig, Trainer, TrainResult
from common.train.language import NextToken
from t5gemma.data import TOKENIZER_FILE, DataConfig

ROLES = ("encoder", "decoder")
# A donor's training that is resumed may log or save at other times, and run on other devices.
DONOR_MAY_CHANGE = (
    "train.accumulation",
    "train.mesh",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
)


@dataclasses.dataclass(frozen=True)
class DonorsConfig:
    """Where the decoder-only models come from.

    Attributes:
      encoder: becomes the encoder: anything that `common.models.load_decoder` takes, or the name
        of an optional asset (`common.data.assets`). None trains donors in the run, of the shapes
        `model.encoder` and `model.decoder`; one where these are equal.
      decoder: becomes the decoder; None: the same as the encoder.
      train: of donors that are trained in the run; their rows are as long as both sides together.
    """

    encoder: str | None = None
    decoder: str | None = None
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.decoder is not None and self.encoder is None:
            raise UserError("donors.decoder is set but donors.encoder is not: set both")


@dataclasses.dataclass(frozen=True)
class DonorRun:
    """A training of a donor, as its folder's config.json tells it.

    Attributes:
      model: its shape.
      train: steps, batch, optimizer.
      data: of the run that it is trained for.
      seed: of parameters and of the order of the data.
    """

    model: DecoderConfig
    train: TrainConfig
    data: DataConfig
    seed: int


class Stopped(Exception):
    """A signal stopped a donor's training, which is saved."""

    def __init__(self, result: TrainResult):
        super().__init__("a donor's training was stopped")
        self.result = result


def locate(name: str) -> Path:
    """The path of a donor, or of the asset of this name.

    Raises:
      UserError: the asset is not installed.
    """
    path = Path(name).expanduser()
    return asset(name) if name in ASSETS and not path.exists() else path


def load_donors(
    config: DonorsConfig, mesh: jax.sharding.Mesh, dtype: str
) -> tuple[Decoder, Decoder]:
    """The encoder's and the decoder's donor, with fp32 parameters; one and the same if so named."""
    assert config.encoder is not None

    def load(name: str) -> Decoder:
        return load_decoder(locate(name), dtype=dtype, param_dtype="float32", mesh=mesh)

    encoder = load(config.encoder)
    same = config.decoder is None or config.decoder == config.encoder
    return encoder, encoder if same else load(config.decoder)


def donor_folders(workdir: Path, shapes: tuple[DecoderConfig, DecoderConfig]) -> tuple[Path, Path]:
    """Where the run's own donors of the two shapes are trained; equal ones are one."""
    names = ROLES if shapes[0] != shapes[1] else ("both", "both")
    first, second = (Path(workdir) / "donors" / name for name in names)
    return first, second


def train_donor(
    run: DonorRun,
    tokenizer: Tokenizer,
    folder: Path,
    cache: Path,
    resume_command: str | None = None,
) -> TrainResult:
    """Trains a decoder on the corpus in `folder`, from where that stands.

    Args:
      run: what and how.
      tokenizer: of its text.
      folder: a run folder, which `load_decoder` reads then.
      cache: where the tokenised corpus lies, or is put.
      resume_command: the command line that resumes.

    Raises:
      Stopped: a signal came first.
      UserError: corpus, batch and devices do not fit, or the folder has another run.
    """
    train = run.train
    mesh = make_mesh(train.mesh)
    own = RunFolder(folder)
    own.open(run, DONOR_MAY_CHANGE)
    with first_process_first(f"donor in {folder.name}"):
        if not (folder / TOKENIZER_FILE).exists():
            tokenizer.save(folder / TOKENIZER_FILE)
        rows = {split: _rows(run.data, split, tokenizer, cache) for split in ("train", "heldout")}
    part: Any = {
        "global_batch": train.batch_size,
        "local_rows": local_rows(mesh, train.batch_size),
    }
    if jax.process_index() == 0:
        size = f"{run.model.num_parameters():,} parameters"
        print(f"training a donor of {size} in {folder}", flush=True)
    task = NextToken(
        lambda rngs: Decoder(run.model, rngs=rngs),
        forward_flops=lambda rows, length: decoder_flops(run.model, rows, length),
    )
    trainer = Trainer(
        task,
        train,
        folder,
        batches(rows["train"], seed=run.seed, **part),
        {"heldout": lambda: evaluation_batches(rows["heldout"], **part)},
        seed=run.seed,
        resume_command=resume_command,
    )
    result = trainer.run()
    own.close()
    if result.preempted:
        raise Stopped(result)
    return result


def _rows(data: DataConfig, split: str, tokenizer: Tokenizer, cache: Path) -> PackedRows:
    corpus = dataclasses.replace(data.corpus, split=split)
    store = tokenize_corpus(corpus, tokenizer, cache)
    return PackedRows(store, data.encoder_length + data.decoder_length)
