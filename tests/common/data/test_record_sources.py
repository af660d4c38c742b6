"""array_record, prepared tfds and Parquet as documents."""

import json

import pytest

from common.data.corpus import CorpusConfig, open_corpus
from common.data.sources import DamagedRecord, HealthyDocuments
from common.errors import UserError


def documents(source):
    return [source[i] for i in range(len(source))]


def write_array_record(path, records):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def field_bytes(number, data):
    """One length-delimited protocol buffer field; every length here is below 128."""
    assert len(data) < 128
    return bytes([number << 3 | 2, len(data)]) + data


def example(text):
    """A serialised tf.train.Example with the feature `text`."""
    value = field_bytes(1, field_bytes(1, text))
    return field_bytes(1, field_bytes(1, field_bytes(1, b"text") + field_bytes(2, value)))


def test_array_record_of_text_and_json(tmp_path):
    write_array_record(tmp_path / "x.array_record-00000-of-00002", ["é 0".encode(), b"1"])
    write_array_record(tmp_path / "x.array_record-00001-of-00002", [b"2", b"\xff"])
    source = open_corpus(CorpusConfig("array_record", str(tmp_path), field="", split="all"))
    assert [source[i] for i in (2, 0, 1)] == ["2", "é 0", "1"]
    with pytest.raises(DamagedRecord, match=r"00001-of-00002', record 1"):
        source[3]
    path = tmp_path / "y.json_records"
    write_array_record(path, [json.dumps({"text": "a"}).encode(), b"{", b'{"text": "b"}'])
    source = open_corpus(CorpusConfig("array_record", str(path), split="all"))
    assert list(HealthyDocuments(source, 1)) == ["a", "b"]


@pytest.mark.parametrize("damage", ["text", "cut", "tail"])
def test_array_record_that_is_none(tmp_path, damage):
    path = tmp_path / "x.array_record"
    write_array_record(path, [b"record %d" % i * 100 for i in range(3000)])
    data = path.read_bytes()
    cut = {"text": b"hello\n" * 9, "cut": data[: len(data) // 2], "tail": data[:-10]}[damage]
    path.write_bytes(cut)
    with pytest.raises(UserError, match="not a whole array_record"):
        open_corpus(CorpusConfig("array_record", str(path), field=""))


def test_array_record_with_flipped_bytes_is_damage(tmp_path):
    path = tmp_path / "x.array_record"
    write_array_record(path, [bytes([65 + i % 26]) * 5000 for i in range(20)])
    data = bytearray(path.read_bytes())
    data[70:90] = bytes(255 - byte for byte in data[70:90])
    path.write_bytes(data)
    source = open_corpus(CorpusConfig("array_record", str(path), field="", split="all"))
    reader = HealthyDocuments(source, 10)
    assert len(list(reader)) + reader.skipped == 20
    assert reader.skipped > 0


def test_prepared_tfds_without_tensorflow(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    folder = tmp_path / "my_text" / "1.0.0"
    folder.mkdir(parents=True)
    texts = [f"document {i} é" for i in range(5)]
    shards = {0: texts[:3], 1: texts[3:]}
    for number, part in shards.items():
        name = f"my_text-train.array_record-0000{number}-of-00002"
        write_array_record(folder / name, [example(text.encode()) for text in part])
    tfds.features.FeaturesDict({"text": tfds.features.Text()}).save_config(str(folder))
    split = {
        "name": "train",
        "numBytes": "500",
        "shardLengths": ["3", "2"],
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"name": "my_text", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    config = CorpusConfig("tfds", str(folder), split="all")
    assert documents(open_corpus(config)) == texts
    with pytest.raises(UserError, match="did you mean 'train'"):
        open_corpus(CorpusConfig("tfds", str(folder), subset="trian"))
    with pytest.raises(UserError, match="no feature 'label'; it has text"):
        open_corpus(CorpusConfig("tfds", str(folder), field="label"))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for number in range(2):
        texts = [f"{number} {i} é" for i in range(7)]
        texts[5] = None
        table = pyarrow.table({"text": texts, "label": list(range(7))})
        parquet.write_table(table, tmp_path / f"{number}.parquet", row_group_size=3)
    source = open_corpus(CorpusConfig("parquet", str(tmp_path), split="all"))
    assert len(source) == 14
    assert source[13] == "1 6 é"
    assert source[0] == "0 0 é"
    with pytest.raises(DamagedRecord, match=r"1\.parquet', row 5: column 'text' is NoneType"):
        source[12]
    with pytest.raises(UserError, match="no column 'txt'; did you mean 'text'"):
        open_corpus(CorpusConfig("parquet", str(tmp_path), field="txt"))
    (tmp_path / "0.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="not a whole Parquet"):
        open_corpus(CorpusConfig("parquet", str(tmp_path)))
