"""The prompt format of instruction-tuned Gemma models (RecurrentGemma, section 4)."""

from collections.abc import Sequence
from typing import Literal

from common.data.tokenizers import Special, Tokenizer, encode_parts
from common.errors import UserError

START, END = Special("<start_of_turn>"), Special("<end_of_turn>")
Turn = tuple[Literal["user", "model"], str]


def chat_prompt(turns: str | Sequence[Turn]) -> str:
    """The text after which an instruction-tuned model answers.

    Args:
      turns: the user's message, or the conversation so far as ("user" | "model", text) pairs that
        alternate and end with the user's.
    """
    return "".join(_parts(turns))


def chat_tokens(turns: str | Sequence[Turn], tokenizer: Tokenizer) -> list[int]:
    """`chat_prompt` as tokens, after that of a text's beginning if the tokenizer has one.

    The turns' borders are tokens of their own, and what stands between them is text alone: a
    message cannot end its turn by spelling the token that would.
    """
    beginning = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    return [*beginning, *encode_parts(tokenizer, _parts(turns))]


def _parts(turns: str | Sequence[Turn]) -> list[str | Special]:
    if isinstance(turns, str):
        turns = [("user", turns)]
    for n, (who, _) in enumerate(turns):
        if who != ("user", "model")[n % 2]:
            raise UserError("the turns of a conversation alternate between 'user' and 'model'")
    if len(turns) % 2 == 0:
        raise UserError("a conversation to be continued ends with a turn of the user")
    said = [part for who, text in turns for part in (START, f"{who}\n{text}", END, "\n")]
    return [*said, START, "model\n"]
