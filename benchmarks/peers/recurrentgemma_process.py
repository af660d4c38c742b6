"""The public `recurrentgemma` package in a process and an environment of its own.

The process waits for commands, one JSON object a line, so that it takes turns with everybody else.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.contender import Run, Setting
from common.errors import UserError
from recurrentgemma import GriffinConfig

_SCRIPT = Path(__file__).parent / "recurrentgemma_model.py"


class PublicPackage:
    """See `Contender`."""

    def __init__(self, python: str | Path, config: GriffinConfig, weights: Path):
        self.vocab_size = config.vocab_size
        self.compile_seconds = 0.0
        self._resources = contextlib.ExitStack()
        self._folder = Path(self._resources.enter_context(tempfile.TemporaryDirectory()))
        shape = {
            "vocab_size": config.vocab_size,
            "width": config.width,
            "mlp_expanded_width": config.mlp_width,
            "num_heads": config.num_heads,
            "lru_width": config.lru_width,
            "block_types": config.mixers(),
            "embeddings_scale_by_sqrt_dim": config.scale_embedding,
            "attention_window_size": config.attention_window,
            "logits_soft_cap": config.logits_softcap or 0.0,
        }
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        try:
            self._process = subprocess.Popen(
                [str(python), "-P", str(_SCRIPT), str(weights), json.dumps(shape)],
                cwd=self._folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            raise UserError(f"cannot run {python}: {error}") from error
        self._description = self._ask({"command": "describe"})["description"]

    def describe(self) -> str:
        return self._description

    def last_logits(self, tokens: np.ndarray) -> np.ndarray:
        return np.load(self._ask({"command": "logits", "tokens": tokens.tolist()})["path"])

    def prepare(self, setting: Setting, tokens: np.ndarray) -> Run:
        path = self._folder / "tokens.npy"
        np.save(path, tokens)
        question = {"command": "prepare", "path": str(path), **dataclasses.asdict(setting)}
        self.compile_seconds += self._ask(question)["seconds"]
        return lambda: self._ask({"command": "run"})["seconds"]

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=60)
        self._resources.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words are on stderr; the empty answer below says so
        answer = self._process.stdout.readline()
        if not answer:
            raise UserError(f"{_SCRIPT.name} ended early; its messages are above")
        return json.loads(answer)
