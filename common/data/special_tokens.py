"""Special tokens: which they are by name, and text in which they may stand.

A special token says something about a text: that it ends, whose turn it is. What a user types never
becomes one unless the caller asks for it, however it is spelt.
"""

import re
from collections.abc import Iterator, Mapping

from common.errors import UserError

# Tokens that end an answer, whatever a model's files name as its end of sequence.
ENDS = (
    "<end_of_turn>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end_of_turn|>",
)
# Those of the public vocabularies that list them among what is found in any text. Others there,
# such as "<table>" or a run of line breaks, are ordinary text.
SPECIAL = re.compile(
    r"<(unused\d+|start_of_\w+|end_of_\w+|mask|2mass|pad|bos|eos|unk)>|\[@BOS@\]|<\|.*\|>"
)


def stop_tokens(eos_id: int, special: Mapping[str, int]) -> tuple[int, ...]:
    """Returns the tokens that end an answer, in order, from the special ones by their text."""
    found = {special[text] for text in ENDS if text in special}
    return tuple(sorted(found | ({eos_id} if eos_id >= 0 else set())))


def split_special(text: str, special: Mapping[str, int]) -> Iterator[str | int]:
    """Yields the ids of the special tokens that stand in `text`, and what is between them."""
    longest_first = sorted(filter(None, special), key=len, reverse=True)
    start = 0
    for match in re.finditer("|".join(map(re.escape, longest_first)) or r"(?!)", text):
        if match.start() > start:
            yield text[start : match.start()]
        yield special[match.group()]
        start = match.end()
    if start < len(text):
        yield text[start:]


def utf8(text: str) -> bytes:
    """Returns the bytes of `text`; UserError for half a surrogate pair, which has none."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        character = ascii(text[error.start])
        raise UserError(
            f"the text is not valid Unicode: {character} at character {error.start}"
        ) from error
