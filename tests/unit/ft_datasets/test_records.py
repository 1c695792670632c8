"""Each kind of data file, with good and bad rows, against hand-written records and words."""

import gzip
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import get_args, get_type_hints

import pyarrow
import pyarrow.parquet
import pytest
from helpers.environment import ENVIRONMENT, ROOT
from helpers.records import alpaca_encoder, load_records, record

from configs.errors import UserError
from configs.training import TrainingConfig
from ft_datasets import records as records_module
from ft_datasets.kinds import KINDS
from ft_datasets.loading import load_data
from ft_datasets.prompt import AlpacaWords
from ft_datasets.records import DataFiles, read_entries

ROWS = [
    {"instruction": " 问  题 ", "input": "", "output": "答\n案 "},
    {"instruction": "a", "input": None, "output": 'b,"c"'},
    {"instruction": "007", "input": "NA", "output": "😀 null"},
]
RECORDS = [record(1, " 问  题 ", "", "答\n案 "), record(2, "a", "", 'b,"c"'), record(3, "007", "NA", "😀 null")]
GOOD = b'{"instruction": "a", "output": "b"}\n'


def csv_of(rows: list[dict]) -> str:
    def cell(value: str | None) -> str:
        return "" if value is None else '"' + value.replace('"', '""') + '"'

    return "\n".join(["instruction,input,output", *(",".join(map(cell, row.values())) for row in rows)]) + "\n"


def write(path: Path, rows: list[dict]) -> Path:
    """A file of the kind that its name tells."""
    kind = "".join(path.suffixes)
    if kind in (".parquet", ".arrow"):
        table = pyarrow.Table.from_pylist(rows)
        if kind == ".parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pyarrow.ipc.new_stream(path, table.schema) as stream:
                stream.write_table(table)
        return path
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = {
        ".json": json.dumps(rows, ensure_ascii=False, indent=1),
        ".jsonl": "\n".join(lines),
        ".csv": csv_of(rows),
    }[kind.removesuffix(".gz")].encode()
    path.write_bytes(gzip.compress(text) if kind.endswith(".gz") else text)
    return path


def complaint(path: Path, content: bytes | None = None) -> str:
    """What is said about a file that can't be used."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_records(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


FILES = ["data.json", "data.jsonl", "data.json.gz", "data.JSONL.gz", "data.csv", "data.parquet", "data.arrow", "data"]


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_records(tmp_path, name):
    file = write(tmp_path / (name.lower() if "." in name else "data.json"), ROWS).rename(tmp_path / name)
    assert load_records(file) == RECORDS


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.csv", "data.parquet", "data.arrow"])
def test_bad_rows_of_every_kind_are_told_by_number(tmp_path, name):
    bad = {"instruction": "x", "input": "", "output": "  "}
    message = complaint(write(tmp_path / name, [ROWS[0], bad, ROWS[1], bad]))
    assert '  "output" is empty: 2, 4' in message.split("\n")


@pytest.mark.parametrize("name", ["data.parquet", "data.arrow"])
def test_what_is_no_text_in_a_table_is_told(tmp_path, name):
    numbers = [{"instruction": "a", "output": 1}, {"instruction": "b", "output": 2}]
    assert '  "output" is not text: 1, 2' in complaint(write(tmp_path / name, numbers)).split("\n")
    gaps = [{"instruction": "a", "input": float("nan"), "output": None}]
    assert '  without "output": 1' in complaint(write(tmp_path / name, gaps)).split("\n")
    gaps[0]["output"] = "b"
    assert load_records(write(tmp_path / name, gaps)) == [record(1, "a", "", "b")]


def test_a_table_written_as_a_file_of_arrow_is_read_too(tmp_path):
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(tmp_path / "data.arrow", table.schema) as file:
        file.write_table(table)
    assert load_records(tmp_path / "data.arrow") == RECORDS


def test_a_column_of_pictures_is_not_looked_at(tmp_path):
    """The library would decode it, with another library that is not here."""
    import datasets

    picture = {"bytes": b"no picture", "path": None}
    features = datasets.Features(
        {"instruction": datasets.Value("string"), "output": datasets.Value("string"), "image": datasets.Image()}
    )
    table = pyarrow.table({"instruction": ["a"], "output": ["b"], "image": [picture]}, schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    assert load_records(tmp_path / "data.parquet", "image") == [record(1, "a", "", "b")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (GOOD + b"\n  \n" + b'{"instruction": "a",}\n', ["line 4, column 21", "not valid JSON"]),
        (GOOD + b'{"instruction": "a"', ["line 2, column 20"]),
        (GOOD + GOOD.strip() + GOOD, ["line 2, column 36", "Extra data"]),
        (b"[\n" + GOOD + b"]", ["line 1, column 2", "looks like a JSON list", ".json"]),
        (GOOD + '{"instruction": "你好"'.encode("gb18030"), ["line 2", "not UTF-8", "iconv"]),
        (GOOD.decode().encode("utf-16"), ["line 1", "not UTF-8"]),
        (GOOD + b"[" * 100_000 + b"\n", ["line 2", "nested too deep"]),
        (GOOD + b'{"instruction": ' + b"1" * 10_000 + b"}", ["line 2", "too long a number"]),
        (b"", ["no records"]),
        (b"\n \n", ["no records"]),
        (b"\n" + GOOD + b'{"output": NaN, "instruction": "a"}\n5\n', ["not text: 2 (line 3)", "fields: 3 (line 4)"]),
        (GOOD + b'{"output": 1e999, "instruction": "a"}', ['"output" is not text: 2']),
        (GOOD + b'{"output": "\\ud83d", "instruction": "a"}', ['"output" holds half a character']),
    ],
)  # fmt: skip
def test_bad_json_lines_are_told_by_line(tmp_path, content, words):
    message = complaint(tmp_path / "data.jsonl", content)
    assert all(word in message for word in words), message
    if b"\xff" not in content:
        message = complaint(tmp_path / "data.jsonl.gz", gzip.compress(content))
        assert all(word in message for word in words), message


def test_json_lines_may_have_a_mark_blank_lines_and_the_ends_of_windows(tmp_path):
    path = tmp_path / "data.jsonl"
    last = '{"instruction": "x\u2028y", "output": "c"}'  # a line's end to Unicode, not to JSON
    path.write_bytes(b"\xef\xbb\xbf\r\n" + GOOD.replace(b"\n", b"\r\n") + b"\r\n" + last.encode())
    assert load_records(path) == [record(1, "a", "", "b"), record(2, "x\u2028y", "", "c")]
    assert [(entry.number, entry.line) for entry in read_entries(DataFiles((path,)))] == [(1, 2), (2, 4)]


@pytest.mark.parametrize("name", ["data.json.gz", "data.jsonl.gz"])
def test_damaged_gzip_files_are_told(tmp_path, name):
    whole = gzip.compress(b"[" + b",".join([GOOD] * 500) + b"]" if ".json." in name else GOOD * 500)
    for content in (whole[:-20], whole[:20] + b"\xff" * 8 + whole[28:], GOOD, whole[:30]):
        assert "not a whole gzip file" in complaint(tmp_path / name, content)


def test_a_small_file_that_unpacks_to_a_huge_line_is_refused_in_little_memory(tmp_path, monkeypatch):
    path = tmp_path / "data.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(GOOD)
        for _block in range(48):
            file.write(b" " * 2**20)
    monkeypatch.setattr(records_module, "LONGEST_LINE", 2**20)
    monkeypatch.setattr(records_module, "LARGEST_UNPACKED", 2**20)
    tracemalloc.start()
    try:
        assert "line 2" in complaint(path)
        assert "JSON lines" in complaint(path.rename(tmp_path / "data.json.gz"))
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_json_lines_pass_through_memory_one_by_one(tmp_path, name):
    row = json.dumps({"instruction": "a" * 500, "output": "b" * 500}).encode() + b"\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(row * 30_000, 1) if name.endswith(".gz") else row * 30_000)  # 30 MB
    tracemalloc.start()
    try:
        assert sum(1 for _entry in read_entries(DataFiles((path,)))) == 30_000
        assert tracemalloc.get_traced_memory()[1] < 3 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"instruction,input,output\na,b,c,d\n", ["more cells than its header"]),
        (b"instruction,input,output\na,b,c\na,b,c,d,e\n", ["Expected 3 fields in line 3, saw 5"]),
        (b'instruction,input,output\na,b,"c\n', ["EOF inside string"]),
        ("instruction,output\na,b\n你,c\n".encode("gbk"), ["line 3", "not UTF-8", "iconv"]),
        ("指令,output\na,b\n".encode("gbk"), ["line 1", "not UTF-8"]),
        (b"question,answer\na,b\nc,d\n", ['without "instruction": 1, 2']),
        (b"instruction;output\na;b\n", ['without "instruction": 1']),
        (b"instruction,input,output\na,b\n", ['"output" is empty: 1']),
        (b"instruction,output\n", ["no records"]),
        (b"", ["can't be read as CSV"]),
    ],
)
def test_bad_csv_files_are_told(tmp_path, content, words):
    message = complaint(tmp_path / "data.csv", content)
    assert all(word in message for word in words), message
    assert "table.csv" not in message


def test_csv_files_as_excel_and_pandas_write_them(tmp_path):
    path = tmp_path / "data [1]*, old :: 表.csv"
    path.write_bytes('\ufeff,instruction,output\r\n0,"a\nb",5.10\r\n1,c,TRUE\r\n'.encode())
    assert load_records(path) == [record(1, "a\nb", "", "5.10"), record(2, "c", "", "TRUE")]


@pytest.mark.parametrize("name", ["data.parquet", "data.arrow"])
def test_damaged_tables_are_told(tmp_path, name):
    whole = write(tmp_path / name, ROWS * 200).read_bytes()
    kind = name.partition(".")[2].upper()
    for content in (b"", b"hello", whole[: len(whole) // 2], whole[:60] + b"\xff" * 400 + whole[460:]):
        assert f"can't be read as {kind}" in complaint(tmp_path / name, content)


def test_a_kind_that_is_not_read_names_those_that_are(tmp_path):
    message = complaint(tmp_path / "data.xlsx", b"PK")
    assert all(kind in message for kind in (".json,", ".jsonl,", ".csv", ".parquet", ".arrow"))
    with pytest.raises(UserError, match=r"missing\.xlsx is not there"):
        load_records(tmp_path / "missing.xlsx")


@pytest.mark.parametrize("name", ["data.txt", "data.v2"])
def test_json_under_any_other_name_is_read(tmp_path, name):
    (tmp_path / name).write_text("\ufeff " + json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    assert load_records(tmp_path / name) == load_records(write(tmp_path / "data.json", ROWS))


def test_two_columns_of_one_name_are_told(tmp_path):
    assert "two of its columns have the same name" in complaint(
        tmp_path / "data.csv", b"instruction,output,output\na,b,c\n"
    )


def test_a_table_may_begin_with_an_empty_line(tmp_path):
    (tmp_path / "data.csv").write_text("\ninstruction,output\na,b\n", encoding="utf-8")
    assert load_records(tmp_path / "data.csv") == [record(1, "a", "", "b")]


def test_several_files_are_numbered_through_and_named(tmp_path):
    first = write(tmp_path / "a.jsonl", ROWS[:2])
    second = tmp_path / "b.jsonl"
    second.write_bytes(b"\n" + GOOD + b"{}\n")
    third = write(tmp_path / "c.csv", [dict.fromkeys(("instruction", "input", "output"), "")])
    with pytest.raises(UserError) as caught:
        load_records(
            DataFiles((first, second, write(tmp_path / "c.csv", [{"instruction": "", "input": "", "output": ""}])))
        )
    message = str(caught.value)
    assert f"{first} and 2 more" in message
    assert '  without "instruction": 4 (b.jsonl, line 3)' in message.split("\n")
    assert '  "instruction" is empty: 5 (c.csv)' in message.split("\n")
    write(third, ROWS[2:])
    second.write_bytes(GOOD)
    records = load_records(DataFiles((first, second, third)))
    assert records == [*RECORDS[:2], record(3, "a", "", "b"), record(4, "007", "NA", "😀 null")]


def test_a_hub_s_json_file_of_lines_is_read_as_such(tmp_path):
    """Its name is not the user's to change."""
    path = tmp_path / "train.json"
    path.write_bytes(b"\xef\xbb\xbf \n" + GOOD * 2)
    assert "looks like JSON lines" in complaint(path)
    assert len(load_records(DataFiles((path,), {"repository": "owner/name"}))) == 2
    write(path, ROWS)
    assert load_records(DataFiles((path,), {"repository": "owner/name"})) == RECORDS


LOAD = (
    "from pathlib import Path; from configs.datasets import AlpacaDataset; from ft_datasets.records import DataFiles; "
    "from ft_datasets.kinds import load_conversations; "
    "load_records = lambda file: load_conversations(AlpacaDataset(), DataFiles((Path(file),)))"
)


def test_tables_need_no_network_and_leave_nothing_behind(tmp_path):
    file, home = write(tmp_path / "data.parquet", ROWS), tmp_path / "home"
    (tmp_path / "bad.parquet").write_bytes(b"bad")
    home.mkdir()
    (tmp_path / "temporary").mkdir()
    code = (
        f"import socket; from configs.errors import UserError; {LOAD}\n"
        "def refuse(*_arguments): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from datasets.utils.logging import get_verbosity; before = get_verbosity()\n"
        f"assert len(load_records({str(file)!r})) == 3\n"
        f"try: load_records({str(tmp_path / 'bad.parquet')!r})\n"
        "except UserError: assert get_verbosity() == before\n"
    )
    places = {"HOME": str(home), "TMPDIR": str(tmp_path / "temporary"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**ENVIRONMENT, **places}, capture_output=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert [*home.rglob("*"), *(tmp_path / "temporary").rglob("*")] == []


@pytest.mark.parametrize("name", ["data.json", "data.jsonl.gz"])
def test_json_needs_no_library(tmp_path, name):
    file = write(tmp_path / name, ROWS)
    code = (
        f"import sys; {LOAD}; "
        f"load_records({str(file)!r}); print([n for n in ('datasets', 'pyarrow', 'pandas') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


def test_every_kind_of_data_that_can_be_chosen_has_its_settings_and_its_reader():
    choices = get_args(get_type_hints(TrainingConfig)["dataset"])
    assert set(choices) == {*KINDS, "custom_dataset"}
    for choice in choices:
        config = TrainingConfig(dataset=choice)
        assert config.data is getattr(config, choice)
        assert choice == config.data.NAME
        assert set(getattr(config.data, "NAMES", ())) >= set(KINDS[choice].fields if choice in KINDS else ()) - {
            "conversations"
        }


def test_the_reader_is_the_one_that_dataset_names(tiny_model, tmp_path):
    path = tmp_path / "some.json"
    path.write_text(
        json.dumps([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    )
    config = TrainingConfig(run_validation=False, dataset="chat_dataset")
    config.chat_dataset.data_path = str(path)
    (example,) = load_data(config, alpaca_encoder(tiny_model), print).training
    assert example.text == AlpacaWords().prompt("a") + "b"


def test_the_column_in_a_json_line_is_that_of_the_file(tmp_path):
    """Blank lines and spaces before the record count as they do in an editor."""
    file = tmp_path / "data.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n\n    {"instruction" "a"}\n')
    with pytest.raises(UserError, match=r"data.jsonl, line 3, column 20: not valid JSON"):
        list(read_entries(DataFiles((file,))))
