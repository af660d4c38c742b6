"""The instruction-tuned models' prompt format (RecurrentGemma, section 4)."""

from collections.abc import Sequence
from typing import Literal

from common.errors import UserError

START, END = "<start_of_turn>", "<end_of_turn>"
Turn = tuple[Literal["user", "model"], str]


def chat_prompt(turns: str | Sequence[Turn]) -> str:
    """The text after which an instruction-tuned model answers.

    Args:
      turns: the user's message, or the conversation so far as ("user" | "model", text) pairs that
        alternate and end with the user's.
    """
    if isinstance(turns, str):
        turns = [("user", turns)]
    for n, (who, _) in enumerate(turns):
        if who != ("user", "model")[n % 2]:
            raise UserError("the turns of a conversation alternate between 'user' and 'model'")
    if len(turns) % 2 == 0:
        raise UserError("a conversation to be continued ends with a turn of the user")
    said = "".join(f"{START}{who}\n{text}{END}\n" for who, text in turns)
    return f"{said}{START}model\n"
