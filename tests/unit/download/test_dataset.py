"""Data sets from a hub: which files belong to a split, and how they come here, against the hub of the tests."""

import functools
import json
import uuid
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from helpers.records import load_records, record
from soak_download import OPTIONS

from configs.command_line import find_problems
from configs.datasets import AlpacaDataset
from configs.download import DownloadConfig
from configs.errors import NetworkGaveUpError, UserError
from ft_datasets.records import DataFiles
from utils.download import dataset
from utils.download.dataset import fetch_data
from utils.download.dataset_layout import HubData, as_regex, choose_files, split_of
from utils.download.manifest import Manifest

pytestmark = pytest.mark.usefixtures("english")

ROWS = [{"instruction": f"问{number}", "input": "", "output": f"答{number}"} for number in range(6)]
RECORDS = [record(number + 1, row["instruction"], "", row["output"]) for number, row in enumerate(ROWS)]
CONFIGS = """---
language: zh
configs:
- config_name: zh
  data_files:
  - split: train
    path: ["zh/a*.jsonl", "zh/b.jsonl"]
  - split: test
    path: zh/held-out.jsonl
- config_name: en
  data_files: en/*.jsonl
---
# A data set
"""


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def shard(path: Path, rows: list[dict]) -> bytes:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path.read_bytes()


@pytest.fixture
def data_set(hub, tmp_path, monkeypatch):
    """Puts files into a repository on the hub, gives its address, and makes it the hub that is asked."""
    (tmp_path / "remote").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def put(files: dict[str, bytes], **scenario) -> str:
        listed = {}
        for path, content in files.items():
            stored = tmp_path / "remote" / uuid.uuid4().hex
            stored.write_bytes(content)
            listed[path] = {"file": str(stored), "lfs": not path.endswith(".md")}
        address = hub.scenario(uuid.uuid4().hex, files=listed, repo_id="owner/set", repo_type="dataset", **scenario)
        monkeypatch.setenv("HF_ENDPOINT", address)
        return address

    return put


def fetched(data_path: str = "hub:owner/set", said: list[str] | None = None) -> DataFiles:
    files = fetch_data(AlpacaDataset(data_path), (said if said is not None else []).append, OPTIONS)
    assert files is not None
    return files


def refused(data_path: str) -> str:
    with pytest.raises(UserError) as caught:
        fetched(data_path)
    return str(caught.value)


# --- which files belong to a split -----------------------------------------------------------------------------------


def chosen(data_path: str, *paths: str, **card) -> list[str]:
    return choose_files(HubData.named(data_path), paths, card)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("train.csv", ("", "train")),
        ("data/train-00001-of-00002-abc.parquet", ("", "train")),
        ("data/train_sft-00000-of-00001.parquet", ("", "train_sft")),
        ("alpaca_train_zh.json", ("", "train")),
        ("dev.jsonl", ("", "validation")),
        ("zh/train/part-1.jsonl", ("zh", "train")),
        ("default/train/0000.parquet", ("default", "train")),
        ("data/en/eval.jsonl", ("en", "test")),
        ("latest.json", ("", "")),
        ("zh/contrain.json", ("zh", "")),
        ("database/train.csv", ("database", "train")),
    ],
)
def test_a_name_tells_the_split(path, expected):
    assert split_of(path) == expected


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("data/*.csv", "data/a.csv", "data/b/a.csv"),
        ("**/train.json", "a/b/train.json", "a/b/xtrain.json"),
        ("**/train.json", "train.json", "train.jsonl"),
        ("zh/", "zh/a/b.json", "zhx/a.json"),
        ("./a-?[0-9].json", "a-x1.json", "a-xx.json"),
        ("a[!b].json", "ac.json", "ab.json"),
        ("a+(b).json", "a+(b).json", "aa(b).json"),
    ],
)
def test_patterns_of_a_card(pattern, matching, other):
    assert as_regex(pattern).fullmatch(matching)
    assert not as_regex(pattern).fullmatch(other)


def test_files_of_a_split_by_their_names():
    shards = [f"data/train-0000{number}-of-00003.parquet" for number in (2, 0, 1)]
    assert chosen("hub:o/n", "README.md", *shards, "data/test-00000-of-00001.parquet") == sorted(shards)
    assert chosen("hub:o/n:test", *shards, "data/test-00000-of-00001.parquet") == ["data/test-00000-of-00001.parquet"]
    assert chosen("hub:o/n:validation", "train.csv", "dev.csv") == ["dev.csv"]
    # Without names all is for training; what is no data is none.
    names = ["b.json", "a.json", "dataset_infos.json", ".hidden/x.json", "picture.png", "n.py"]
    assert chosen("hub:o/n", *names) == ["a.json", "b.json"]
    # The same in two formats is not taken twice.
    assert chosen("hub:o/n", "train.csv", "train.json") == ["train.json"]
    shards = ["train-1.parquet", "train-2.parquet"]
    assert chosen("hub:o/n", "train.json", *shards) == shards


def test_files_of_a_configuration():
    folders = ["zh/train.json", "en/train.json", "en/test.json"]
    assert chosen("hub:o/n/en", *folders) == ["en/train.json"]
    assert chosen("hub:o/n/default@refs/convert/parquet:test", "default/train/0.parquet", "default/test/0.parquet") == [
        "default/test/0.parquet"
    ]
    card = {
        "configs": [
            {"config_name": "a", "data_files": [{"split": "train", "path": "x/*"}], "default": True},
            {"config_name": "b", "data_dir": "./y"},
            {"config_name": "c", "data_files": {"train": "z/1.json", "test": ["z/2.json"]}},
        ]
    }
    paths = ["x/2.json", "x/1.json", "y/deep/train.json", "y/test.json", "z/1.json", "z/2.json", "train.json"]
    assert chosen("hub:o/n", *paths, **card) == ["x/1.json", "x/2.json"]
    assert chosen("hub:o/n/b", *paths, **card) == ["y/deep/train.json"]
    assert chosen("hub:o/n/c:test", *paths, **card) == ["z/2.json"]
    assert chosen("hub:o/n", "a.json", configs=[{"data_files": "a.json"}]) == ["a.json"]
    assert chosen("hub:o/n", "a.json", configs="what is this") == ["a.json"]


@pytest.mark.parametrize(
    ("data_path", "paths", "card", "words"),
    [
        (
            "hub:o/n:valid",
            ["train.json", "dev.json"],
            {},
            ["split valid.", "validation, train (say hub:o/n:validation)"],
        ),
        ("hub:o/n", ["zh/train.json", "en/train.json"], {}, ["(en, zh)", "hub:o/n/en"]),
        ("hub:o/n/fr", ["zh/train.json", "en/train.json"], {}, ["(en, zh)", "hub:o/n/en"]),
        ("hub:o/n/fr", ["train.json"], {}, ["but one configuration"]),
        ("hub:o/n", ["a.json"], {"configs": [{"config_name": "x"}, {"config_name": "y"}]}, ["x, y", "hub:o/n/x"]),
        ("hub:o/n", ["a.json"], {"configs": [{"data_files": "b.txt"}]}, ["split train", ".jsonl"]),
        ("hub:o/n", ["n.py", "README.md"], {}, ["n.py", "no program", "hub:o/n@refs/convert/parquet"]),
        ("hub:o/n", ["pictures.zip", "README.md"], {}, [".parquet", "pictures.zip"]),
    ],
)
def test_what_a_repository_does_not_have_is_told(data_path, paths, card, words):
    with pytest.raises(UserError) as caught:
        chosen(data_path, *paths, **card)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("rest", ["", "name", "../..", "o/n:", "o/n:a b", "o/n@", "o/n/", "o/n:train@main"])
def test_names_that_name_nothing_are_told_with_the_flag(rest):
    data_path = "hub:" + rest
    (problem,) = find_problems(AlpacaDataset(data_path))
    assert f"--alpaca_dataset.data_path {data_path}: expected hub:OWNER/NAME" in problem


def test_names_are_read():
    assert not [*find_problems(AlpacaDataset("hub:o/n/zh@v1.0:test")), *find_problems(AlpacaDataset("hub.json"))]
    assert HubData.named("hub:o/n") == HubData("o/n", "", "", "train")
    assert HubData.named("hub:o-1/n.x/zh@refs/convert/parquet:test") == HubData(
        "o-1/n.x", "zh", "refs/convert/parquet", "test"
    )
    assert fetch_data(AlpacaDataset("ft_datasets/alpaca_data.json"), print) is None


# --- how they come here ----------------------------------------------------------------------------------------------


def test_shards_come_proved_and_in_order_and_are_not_fetched_again(hub, data_set, tmp_path):
    table = tmp_path / "t.parquet"
    address = data_set(
        {
            "data/train-00000-of-00002.parquet": shard(table, ROWS[:4]),
            "data/train-00001-of-00002.parquet": shard(table, ROWS[4:]),
            "data/test-00000-of-00001.parquet": shard(table, ROWS[:1]),
        }
    )
    said = []
    files = fetched(said=said)
    commit = hub.report(address)["commit"]
    assert load_records(files) == RECORDS
    assert [path.as_posix() for path in files.paths] == [
        f"data/owner/set/data/train-0000{number}-of-00002.parquet" for number in (0, 1)
    ]
    assert files.origin == {"repository": "owner/set", "split": "train", "revision": commit}
    assert f"commit {commit}" in said[-1]
    assert not Path("data/owner/set/data/test-00000-of-00001.parquet").exists()

    requests = hub.report(address)["requests"]
    assert fetched(said=said) == files
    assert "remove it" in said[-1]
    assert fetched(f"hub:owner/set@{commit}").paths == files.paths
    assert hub.report(address)["requests"] == requests
    assert len(load_records(fetched("hub:owner/set:test"))) == 1
    assert hub.report(address)["requests"] > requests
    assert all(entry.proved for entry in Manifest.read(Path("data/owner/set")).files.values())
    assert "no split validation" in refused("hub:owner/set:validation")


def test_the_card_names_configurations(hub, data_set):
    address = data_set(
        {
            "README.md": CONFIGS.encode(),
            "zh/b.jsonl": lines(ROWS[4:]),
            "zh/a2.jsonl": lines(ROWS[2:4]),
            "zh/a1.jsonl": lines(ROWS[:2]),
            "zh/held-out.jsonl": lines(ROWS[:1]),
            "en/x.jsonl": lines(ROWS[:3]),
        }
    )
    assert "zh, en" in refused("hub:owner/set")
    files = fetched("hub:owner/set/zh")
    assert load_records(files) == RECORDS
    assert files.origin["configuration"] == "zh"
    assert len(load_records(fetched("hub:owner/set/zh:test"))) == 1
    assert len(load_records(fetched("hub:owner/set/en"))) == 3
    assert "no split dev" in refused("hub:owner/set/en:dev")
    requests = hub.report(address)["requests"]
    assert load_records(fetched("hub:owner/set/zh")) == RECORDS
    assert hub.report(address)["requests"] == requests


def test_a_configuration_that_was_named_is_not_taken_for_the_only_one(data_set):
    data_set({"zh/train.jsonl": lines(ROWS), "en/train.jsonl": lines(ROWS[:1])})
    assert load_records(fetched("hub:owner/set/zh")) == RECORDS
    assert "en, zh" in refused("hub:owner/set")


def test_a_repository_with_a_program_alone_is_refused_and_nothing_of_it_fetched(hub, data_set):
    data_set({"set.py": b"raise SystemExit", "README.md": b"# A set\n"})
    assert "no program of a repository is run" in refused("hub:owner/set")
    assert not [*Path("data").rglob("*.py")]


def test_the_commit_stays_when_the_branch_moves(hub, data_set):
    files = {"train.jsonl": lines(ROWS), "test.jsonl": lines(ROWS)}
    address = data_set(files, moves_after=2)  # the list and the file
    files = fetched()
    before = hub.report(address)["commit"]
    assert fetched() == files
    assert "no such revision" in refused("hub:owner/set:test")  # of the commit that is here; this hub keeps no old ones
    assert files.origin["revision"] == before
    moved = fetched("hub:owner/set@main").origin["revision"]
    assert moved != before
    assert fetched().origin["revision"] == moved
    assert "no such revision" in refused(f"hub:owner/set@{before}")


@pytest.mark.parametrize("kind", ["cut", "reset", "wrong_byte", "503"])
def test_a_line_that_breaks_costs_nothing(hub, data_set, kind):
    rows = [{"instruction": f"问{number}" * 50, "output": "答"} for number in range(5000)]
    address = data_set({"train.jsonl": lines(rows)}, kinds=[kind], probability=0.5, most_faults=4, seed=3)
    assert len(load_records(fetched())) == 5000
    assert hub.report(address)["faults"][kind] >= 1


def test_a_download_that_gave_up_goes_on_where_it_was(hub, data_set, monkeypatch):
    files = {"train-1.jsonl": lines(ROWS[:3]), "train-2.jsonl": lines(ROWS[3:])}
    impatient = functools.partial(DownloadConfig, give_up_after=0.002)
    with monkeypatch.context() as patched:
        patched.setattr(dataset, "DownloadConfig", impatient)
        data_set(files, always={"train-2.jsonl": "503"})
        with pytest.raises(NetworkGaveUpError) as gave_up:
            fetched()
        message = str(gave_up.value)
        assert "Gave up" in message
        assert "python model_download.py --repo_type dataset --repo_id owner/set --local_dir data/owner/set" in message
    address = data_set(files, always={"train-1.jsonl": "503"})  # which is here
    assert load_records(fetched()) == RECORDS
    assert hub.report(address)["sent"] == {"train-2.jsonl": len(files["train-2.jsonl"])}


def test_wrong_bytes_are_never_read(data_set):
    data_set({"train.jsonl": lines(ROWS)}, always={"train.jsonl": "always_wrong"})
    assert "wrong bytes" in refused("hub:owner/set")
    assert not Path("data/owner/set/train.jsonl").exists()
    data_set({"train.jsonl": lines(ROWS)})
    assert load_records(fetched()) == RECORDS


def test_bad_records_are_told_by_the_file_that_lies_here(data_set):
    data_set({"train.json": lines(ROWS[:2]) + b"{}\n"})
    with pytest.raises(UserError, match=r"data/owner/set/train\.json.*\n.*: 3"):
        load_records(fetched())


@pytest.mark.parametrize(("deny", "words"), [("gated", "huggingface.co/datasets/owner/set"), ("404", "no dataset")])
def test_a_closed_door_is_told(data_set, deny, words):
    data_set({"train.json": lines(ROWS)}, deny=deny)
    assert words in refused("hub:owner/set")
