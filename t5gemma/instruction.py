"""Instruction tuning (section 3.7): the prompt in the encoder, the response in the decoder."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import grain
import numpy as np

from common.data.chat import END, START
from common.data.tokenizers import Tokenizer, encode_parts
from common.errors import UserError
from t5gemma.examples import Example
from t5gemma.json_lines import Record, read_json_lines

_BATCH = 1000


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt and the response to it.

    Attributes:
      prompt, response: texts.
      where: file and line, for messages.
    """

    prompt: str
    response: str
    where: str


def read_pairs(
    path: str | Path, prompt_field: str = "prompt", response_field: str = "response"
) -> list[Pair]:
    """Reads a JSONL file with a prompt and a response a line.

    Raises:
      UserError: see `read_json_lines`; a field is missing, not a text, or empty. The message has
        the file and the line.
    """
    return [
        Pair(
            _filled(record, prompt_field),
            _filled(record, response_field),
            f"{record.path}, line {record.line}",
        )
        for record in read_json_lines(path)
    ]


def _filled(record: Record, field: str) -> str:
    text = record.text(field)
    if not text:
        raise record.error(f"field '{field}' is empty")
    return text


class Instruction(grain.transforms.Map):
    """Makes an example of a `Pair`.

    Args:
      tokenizer: of both sides.
      template: "none" takes the texts as they are; "gemma" puts the prompt in Gemma's turns and
        ends the response with its end-of-turn token.
      encoder_bos: begin the encoder's tokens with bos, as the transformers library does, where the
        tokenizer has one.

    Raises:
      UserError: the tokenizer lacks a token that is needed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        template: Literal["none", "gemma"] = "none",
        encoder_bos: bool = True,
    ):
        if template not in ("none", "gemma"):
            raise UserError(f"template is '{template}'; use none or gemma")
        if tokenizer.eos_id < 0:
            raise UserError(
                "instruction tuning needs a tokenizer with an eos token: it ends answers"
            )
        self._tokenizer = tokenizer
        self._head = [tokenizer.bos_id] if encoder_bos and tokenizer.bos_id >= 0 else []
        # What stands around a prompt; "user\n" as text, for it may share a token with the prompt.
        self._opening, self._before = list[int](), ""
        self._closing, self._tail = list[int](), [tokenizer.eos_id]
        if template == "gemma":
            self._opening, self._before = encode_parts(tokenizer, [START]), "user\n"
            answer = (END, "\n", START, "model\n")
            self._closing = encode_parts(tokenizer, answer)
            self._tail = encode_parts(tokenizer, [END])

    def map(self, element: Pair) -> Example:
        return self.of_all([element])[0]

    def of_all(self, pairs: Sequence[Pair]) -> list[Example]:
        """The examples of many pairs, tokenised together."""
        prompts = self._tokenizer.encode_batch([self._before + p.prompt for p in pairs])
        responses = self._tokenizer.encode_batch([p.response for p in pairs])
        return [
            Example(
                _ids(self._head + self._opening + prompt + self._closing),
                _ids(response + self._tail),
            )
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    def shortened(self, example: Example, encoder_length: int, decoder_length: int) -> Example:
        """The example without what is too much: the prompt's beginning, the response's end."""
        encoder, targets = example
        if len(encoder) > encoder_length:
            first = len(self._head) + len(self._opening)
            kept = max(0, encoder_length - first)
            encoder = np.concatenate([encoder[:first], encoder[len(encoder) - kept :]])
        return Example(encoder, targets[:decoder_length])


class InstructionExamples:
    """The examples of all pairs that fit.

    Args:
      pairs: see `read_pairs`.
      transform: makes the examples.
      encoder_length, decoder_length: what they must fit.
      too_long: what becomes of a pair that does not: "error", "skip", or "cut" the prompt's
        beginning and the response's end, which then has no end token.

    Attributes:
      skipped: pairs left out.
      cut: pairs shortened.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        transform: Instruction,
        encoder_length: int,
        decoder_length: int,
        too_long: Literal["error", "skip", "cut"] = "error",
    ):
        if too_long not in ("error", "skip", "cut"):
            raise UserError(f"too_long is '{too_long}'; use error, skip or cut")
        self._examples: list[Example] = []
        self.skipped = self.cut = 0
        for start in range(0, len(pairs), _BATCH):
            part = pairs[start : start + _BATCH]
            for pair, example in zip(part, transform.of_all(part), strict=True):
                encoder, targets = example
                if len(encoder) > encoder_length or len(targets) > decoder_length:
                    if too_long == "error":
                        raise UserError(
                            f"{pair.where}: the prompt has {len(encoder)} tokens and the response "
                            f"{len(targets)}, but rows take {encoder_length} and {decoder_length}:"
                            " make them longer, or set too_long to skip or cut"
                        )
                    if too_long == "skip":
                        self.skipped += 1
                        continue
                    self.cut += 1
                    example = transform.shortened(example, encoder_length, decoder_length)
                self._examples.append(example)
        if not self._examples:
            raise UserError(
                f"none of the {len(pairs)} pairs of prompt and response fits rows of "
                f"{encoder_length} and {decoder_length} tokens"
            )

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        sizes = np.array([[len(e.encoder), len(e.targets)] for e in self._examples], np.int64)
        return sizes[:, 0], sizes[:, 1]


def _ids(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int32)
