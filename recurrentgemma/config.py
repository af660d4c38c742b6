"""Presets of RecurrentGemma: tiny ones for a laptop, and every public size."""

import dataclasses

from common.data.corpus import CorpusConfig
from common.sharding import MeshConfig
from common.train import OptimizerConfig, TrainConfig
from recurrentgemma.data import DataConfig
from recurrentgemma.model import GriffinConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run.

    Attributes:
      model: shape of the network.
      data: what it reads.
      train: steps, batch, optimizer, mesh, checkpoints.
      loss_chunk: positions of a row whose logits exist at a time; None for all.
      seed: of parameters and of the order of the data.
    """

    model: GriffinConfig
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    loss_chunk: int | None = None
    seed: int = 0


def smoke() -> Config:
    """Shows that everything runs: 60 k parameters, 30 steps of the Python corpus.

    `python -m recurrentgemma.train --config=smoke --workdir=runs/smoke`; 2 CPU cores, half a
    minute; the loss falls from 6.2 to about 5.
    """
    return Config(
        model=GriffinConfig(
            vocab_size=512,
            width=32,
            mlp_width=96,
            num_heads=2,
            lru_width=32,
            num_layers=5,
            attention_window=32,
        ),
        data=DataConfig(
            corpus=CorpusConfig(parts=("documentation",), max_documents=120),
            sequence_length=64,
            tokenizer_characters=300_000,
        ),
        train=TrainConfig(
            steps=30,
            batch_size=8,
            log_every=1,
            eval_every=15,
            eval_batches=4,
            checkpoint_every=10,
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        ),
    )


def demo() -> Config:
    """What `make demo` trains: 1.3 M parameters on Python's own sources and documentation."""
    return Config(
        model=GriffinConfig(
            vocab_size=2048,
            width=128,
            mlp_width=384,
            num_heads=4,
            lru_width=128,
            num_layers=5,
            attention_window=128,
        ),
        data=DataConfig(sequence_length=256, tokenizer_characters=3_000_000),
        train=TrainConfig(
            steps=240,
            batch_size=8,
            log_every=5,
            eval_every=80,
            eval_batches=8,
            checkpoint_every=80,
            optimizer=OptimizerConfig(learning_rate=6e-3, warmup_steps=30),
        ),
    )


def cpu() -> Config:
    """About 10 M parameters, the size to try things on without an accelerator."""
    return Config(
        model=GriffinConfig(
            vocab_size=4096,
            width=256,
            mlp_width=768,
            num_heads=4,
            lru_width=256,
            num_layers=11,
            attention_window=256,
        ),
        data=DataConfig(sequence_length=512),
        train=TrainConfig(
            steps=1000,
            batch_size=8,
            log_every=10,
            eval_every=250,
            eval_batches=16,
            checkpoint_every=250,
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
        ),
    )


def recurrentgemma_2b() -> Config:
    """RecurrentGemma-2B (2.68 B parameters) as pretrained: 8192 tokens a row, 18 + 8 blocks.

    Reads array_record shards: `--set data.corpus.path=/data/*.array_record --set
    data.tokenizer=/data/tokenizer.model`. For 64 v5p chips or more; learning rate and batch of the
    paper are unpublished, those here are proposals.
    """
    return Config(
        model=GriffinConfig(
            vocab_size=256_000,
            width=2560,
            mlp_width=7680,
            num_heads=10,
            lru_width=2560,
            num_layers=26,
            attention_window=2048,
            dtype="bfloat16",
            remat="full",
        ),
        **_pretraining(batch_size=256, learning_rate=4e-4),
    )


def recurrentgemma_9b() -> Config:
    """RecurrentGemma-9B (8.58 B parameters) as pretrained: 8192 tokens a row, 26 + 12 blocks.

    As `2b`, for 128 v5p chips or more.
    """
    return Config(
        model=GriffinConfig(
            vocab_size=256_000,
            width=4096,
            mlp_width=12_288,
            num_heads=16,
            lru_width=4096,
            num_layers=38,
            attention_window=2048,
            dtype="bfloat16",
            remat="full",
        ),
        **_pretraining(batch_size=512, learning_rate=3e-4),
    )


def _pretraining(*, batch_size: int, learning_rate: float) -> dict:
    """What the public sizes share (RecurrentGemma, section 3): 2 T tokens, T = 8192."""
    length = 8192
    return {
        "data": DataConfig(
            corpus=CorpusConfig(kind="array_record", path="data/*.array_record"),
            tokenizer="data/tokenizer.model",
            sequence_length=length,
        ),
        "train": TrainConfig(
            steps=2_000_000_000_000 // (batch_size * length),
            batch_size=batch_size,
            log_every=20,
            eval_every=5000,
            eval_batches=64,
            checkpoint_every=1000,
            optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_steps=2000),
            mesh=MeshConfig(data=1, fsdp=-1, most_fsdp=16),
        ),
        "loss_chunk": 1024,
    }


PRESETS = {
    "smoke": smoke,
    "demo": demo,
    "cpu": cpu,
    "2b": recurrentgemma_2b,
    "9b": recurrentgemma_9b,
}
