"""`t5gemma.train` as two processes: distillation from a checkpoint, stopped and gone on with."""

import dataclasses
import signal

import numpy as np
from flax import nnx
from process_group import ProcessGroup

import t5gemma
from common.data.tokenizers import ByteTokenizer
from common.models import Decoder, DecoderConfig, save_decoder
from common.train import read_metrics
from t5gemma import train

STACK = DecoderConfig(260, 16, 32, 2, 1, 8, 1, max_length=128)


def test_two_processes_distil_stop_and_go_on_as_one(tmp_path):
    """SIGTERM to one of two; one process goes on. The losses are those of one process alone."""
    teacher = Decoder(dataclasses.replace(STACK, width=24), rngs=nnx.Rngs(0))
    student = t5gemma.T5Gemma(t5gemma.T5GemmaConfig(STACK, STACK), rngs=nnx.Rngs(1))
    for model in (teacher, student):
        model.tokenizer = ByteTokenizer()
    save_decoder(teacher, tmp_path / "teacher", "workspace")
    t5gemma.save(student, tmp_path / "student")
    options = [
        "--config=smoke",
        f"--set=checkpoint={tmp_path}/student",
        "--set=objective.kind=distillation",
        f"--set=objective.teacher.checkpoint={tmp_path}/teacher",
        "--set=data.corpus.max_documents=20",
        "--set=data.encoder_length=32",
        "--set=data.decoder_length=32",
        "--set=loss_chunk=8",
        "--set=train.steps=16",
        "--set=train.mesh.data=2",
        "--set=train.mesh.fsdp=4",
        "--set=train.eval_every=0",
        "--set=train.eval_batches=2",
    ]

    def losses(name):
        return [line["loss"] for line in read_metrics(tmp_path / name)]

    train.main([*options, f"--workdir={tmp_path}/whole"])
    arguments = [*options, f"--workdir={tmp_path}/run", "--set=train.checkpoint_every=1"]
    with ProcessGroup(["-m", "t5gemma.train", *arguments], tmp_path / "logs") as group:
        # JAX looks for a signal once a second; saving after every step makes the steps long enough.
        group.wait_for(lambda: len(read_metrics(tmp_path / "run")) >= 2)
        group.signal(1, signal.SIGTERM)
        assert group.ended(120) == [0, 0], str(group)
    assert 2 <= len(losses("run")) < 16
    train.main([*options, f"--workdir={tmp_path}/run"])
    np.testing.assert_allclose(losses("run"), losses("whole"), rtol=1e-5)
