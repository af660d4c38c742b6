"""Instruction tuning's data: JSONL pairs to examples, and what wrong files are told."""

import json

import grain
import numpy as np
import pytest

from common.data.tokenizers import ByteTokenizer
from common.errors import UserError
from t5gemma.instruction import Instruction, InstructionExamples, Pair, read_pairs
from t5gemma.packing import PackedExamples

TOKENIZER = ByteTokenizer()


class TurnTokenizer(ByteTokenizer):
    """Bytes, and Gemma's two tokens of a turn."""

    vocab_size = 262
    special_tokens = ByteTokenizer.special_tokens | {"<start_of_turn>": 260, "<end_of_turn>": 261}


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_pairs_become_rows_that_hold_each_once(tmp_path):
    pairs = [{"prompt": f"What is {n} + {n}?", "response": str(2 * n)} for n in range(40)]
    path = write(tmp_path / "pairs.jsonl", "", *map(json.dumps, pairs))
    read = read_pairs(path)
    assert read[0] == Pair("What is 0 + 0?", "0", f"{path}, line 2")
    examples = InstructionExamples(read, Instruction(TOKENIZER), 64, 16)
    rows = PackedExamples(examples, 64, 16, start_id=TOKENIZER.bos_id)
    found = []
    for index in range(len(rows)):
        row = rows[index]
        assert row["weights"].sum() == (row["targets"] > 0).sum()
        for segment in range(1, row["encoder_segments"].max() + 1):
            encoder = row["encoder_tokens"][row["encoder_segments"] == segment]
            targets = row["targets"][row["decoder_segments"] == segment]
            assert encoder[0] == TOKENIZER.bos_id
            assert targets[-1] == TOKENIZER.eos_id
            texts = TOKENIZER.decode(encoder), TOKENIZER.decode(targets)
            found.append(dict(zip(("prompt", "response"), texts)))
    assert sorted(found, key=str) == sorted(pairs, key=str)


def test_gemmas_turns():
    transform = Instruction(TurnTokenizer(), template="gemma", encoder_bos=False)
    example = transform.map(Pair("Say {this}.", "{this}", "here"))
    encoder = example.encoder.tolist()
    assert encoder[0] == encoder[-7] == 260
    assert encoder.count(261) == 1
    assert "user\nSay {this}.\nmodel\n" in TOKENIZER.decode([t for t in encoder if t < 260])
    assert example.targets.tolist() == [*TOKENIZER.encode("{this}"), 261]
    forged = transform.map(Pair("<end_of_turn>", "<end_of_turn>", "here"))
    assert forged.encoder.tolist().count(261) == forged.targets.tolist().count(261) == 1
    with pytest.raises(UserError, match="no <start_of_turn>"):
        Instruction(TOKENIZER, template="gemma")
    with pytest.raises(UserError, match="none or gemma"):
        Instruction(TOKENIZER, template="llama")


def test_it_is_a_step_of_any_grain_pipeline():
    pairs = [Pair("a", "b", "1"), Pair("c", "d", "2")]
    dataset = grain.MapDataset.source(pairs).map(Instruction(TOKENIZER))
    assert dataset[1].targets.tolist() == [*TOKENIZER.encode("d"), TOKENIZER.eos_id]


def test_what_is_too_long():
    pairs = [Pair("short", "yes", "f, line 1"), Pair("x" * 30 + "end", "y" * 20, "f, line 2")]
    transform = Instruction(TOKENIZER)
    with pytest.raises(UserError, match=r"f, line 2: the prompt has 34 tokens .* 21, .* 16 and 8"):
        InstructionExamples(pairs, transform, 16, 8)
    skipping = InstructionExamples(pairs, transform, 16, 8, too_long="skip")
    assert (len(skipping), skipping.skipped) == (1, 1)
    cutting = InstructionExamples(pairs, transform, 16, 8, too_long="cut")
    assert (len(cutting), cutting.cut) == (2, 1)
    encoder, targets = cutting[1]
    assert TOKENIZER.decode(encoder) == "x" * 12 + "end"
    assert encoder[0] == TOKENIZER.bos_id
    assert targets.tolist() == TOKENIZER.encode("y" * 8)
    assert [sizes.tolist() for sizes in cutting.sizes()] == [[6, 16], [4, 8]]
    with pytest.raises(UserError, match="none of the 1 pairs"):
        InstructionExamples(pairs[1:], transform, 16, 8, too_long="skip")
    with pytest.raises(UserError, match="error, skip or cut"):
        InstructionExamples(pairs, transform, 16, 8, too_long="wrap")


GOOD = '{"prompt": "p", "response": "r"}'


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "is empty"),
        (["", "  "], "is empty"),
        ([GOOD, "not json"], "line 2: not JSON (Expecting value at column 1)"),
        (["", GOOD, '{"prompt": "p"'], "line 3: not JSON"),
        ([GOOD, '["p", "r"]'], "line 2: a JSON object was expected, this is a list"),
        ([GOOD, "null"], "line 2: a JSON object was expected, this is null"),
        (['{"prompt": "p", "answer": "r"}'], "line 1: no field 'response' (it has prompt, answer)"),
        (
            [GOOD, '{"prompt": "p", "response": 3}'],
            "line 2: field 'response' must be a text, not a",
        ),
        ([GOOD, '{"prompt": ["p"], "response": ""}'], "'prompt' must be a text, not a list"),
        ([GOOD, '{"prompt": "p", "response": ""}'], "line 2: field 'response' is empty"),
        ([GOOD, '{"prompt": "\\ud800", "response": "r"}'], "line 2: field 'prompt' is not valid"),
        ([GOOD, "[" * 200_000], "line 2: not JSON"),
        (['{"prompt": ' + "9" * 5000 + "}"], "line 1: not JSON that can be read"),
    ],
)
def test_wrong_files_are_told_by_line(tmp_path, lines, says):
    path = write(tmp_path / "pairs.jsonl", *lines)
    with pytest.raises(UserError) as error:
        read_pairs(path)
    assert says in str(error.value)
    assert str(path) in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.jsonl"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="cannot read"):
        read_pairs(tmp_path)
    path = tmp_path / "latin.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + '{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        read_pairs(path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert read_pairs(path)[0].prompt == "p"


def test_other_field_names(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"q": "why", "a": "so", "prompt": 3}')
    assert read_pairs(path, "q", "a")[0].response == "so"


def test_one_by_one_is_all_together():
    pairs = [Pair("p" * n, "r" * (n + 1), str(n)) for n in range(1, 6)]
    transform = Instruction(TOKENIZER)
    for pair, example in zip(pairs, transform.of_all(pairs), strict=True):
        for one, other in zip(transform.map(pair), example, strict=True):
            np.testing.assert_array_equal(one, other)
