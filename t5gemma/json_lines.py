"""JSONL files of records, read strictly: whatever is wrong is told with its file and line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError

MOST_LINE_BYTES = 64 << 20


@dataclass(frozen=True)
class Record:
    """One line.

    Attributes:
      path: of the file.
      line: its number, from 1; blank lines count.
      values: the JSON object.
    """

    path: Path
    line: int
    values: dict[str, Any]

    def error(self, reason: str) -> UserError:
        return UserError(f"{self.path}, line {self.line}: {reason}")

    def text(self, field: str) -> str:
        """The string under `field`.

        Raises:
          UserError: there is none, or it is not a text.
        """
        if field not in self.values:
            names = ", ".join(map(str, self.values)) or "none"
            raise self.error(f"no field '{field}' (it has {names})")
        value = self.values[field]
        if not isinstance(value, str):
            raise self.error(f"field '{field}' must be a text, not {_kind(value)}")
        try:
            value.encode()  # JSON can spell half of a surrogate pair, which no UTF-8 text holds.
        except UnicodeEncodeError:
            raise self.error(f"field '{field}' is not valid Unicode") from None
        return value


def read_json_lines(path: str | Path) -> Iterator[Record]:
    """Yields every line of a JSONL file that is not blank.

    Raises:
      UserError: the file is missing, empty, not UTF-8, or a line is not a JSON object.
    """
    path = Path(path)
    found = False
    try:
        with open(path, "rb") as stream:
            number = 0
            while line := stream.readline(MOST_LINE_BYTES + 1):
                number += 1
                if len(line) > MOST_LINE_BYTES:
                    raise UserError(f"{path}, line {number}: longer than {MOST_LINE_BYTES} bytes")
                if line.strip():
                    found = True
                    yield Record(path, number, _object(line, path, number))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # A null character in the path.
        raise UserError(f"cannot read {str(path)!r}: {error}") from error
    if not found:
        raise UserError(f"{path} is empty: one JSON object a line was expected")


def _object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    where = f"{path}, line {number}"
    try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # A number of too many digits; deep nesting.
        raise UserError(f"{where}: not JSON that can be read ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: a JSON object was expected, this is {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    """A JSON value's type in JSON's words."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text"}
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value), "null")
