"""model_download.py: which files it takes, what it leaves in the folder, what it says."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import huggingface_hub
import pytest
from helpers.command_runs import call_main
from helpers.downloads import assert_right, fetch
from helpers.environment import ROOT
from helpers.fake_hub import content
from soak_download import FILES, LARGEST, OPTIONS, TOTAL

import model_download
from configs.command_line import parse
from configs.download import DownloadConfig
from configs.errors import UserError
from utils.download.display import Display, JsonDisplay, TerminalDisplay, readable_size, readable_time
from utils.download.listing import Listing, check_paths, select
from utils.download.manifest import MANIFEST_NAME, STATE_FOLDER, Manifest, unfinished_files
from utils.download.part import PartFile
from utils.download.runs import Throttle
from utils.files import safetensors_problem

pytestmark = pytest.mark.usefixtures("english")


# --- what is fetched -------------------------------------------------------------------------------------------------


def test_pickles_are_left_out_beside_safetensors(endpoint, tmp_path):
    pickles = {"pytorch_model.bin": {"size": 50}, "original/consolidated.00.pth": {"size": 50}}
    display = fetch(tmp_path / "a", endpoint(files=FILES | pickles))
    assert_right(tmp_path / "a")
    assert not (tmp_path / "a" / "pytorch_model.bin").exists()
    assert display.events["left_out"] == 1
    fetch(tmp_path / "b", endpoint(files=FILES | pickles), include=["*.bin", "config.json"])
    assert sorted(path.name for path in (tmp_path / "b").glob("[!.]*")) == [
        "config.json",
        MANIFEST_NAME,
        "pytorch_model.bin",
    ]


def test_only_pickles_come_with_a_warning(endpoint, tmp_path):
    display = fetch(tmp_path, endpoint(files={"pytorch_model.bin": {"size": 50}}))
    assert "pickle" in display.notes[0][1]


def test_include_and_exclude(endpoint, tmp_path):
    fetch(tmp_path, endpoint(), include=["*.json", "sub/"])
    assert_right(tmp_path, ["config.json", "sub/empty.txt"])
    fetch(tmp_path, endpoint(), exclude=["*.safetensors"])
    assert_right(tmp_path, ["config.json", "sub/empty.txt", "tokenizer.model"])
    assert set(Manifest.read(tmp_path).files) == {"config.json", "sub/empty.txt", "tokenizer.model"}
    with pytest.raises(UserError, match=r"config\.json"):
        fetch(tmp_path, endpoint(), include=["konfig.json"])


def test_dry_run_writes_nothing(endpoint, tmp_path):
    display = fetch(tmp_path / "model", endpoint(), dry_run=True)
    assert not (tmp_path / "model").exists()
    assert display.events["plan"] == len(FILES)
    assert readable_size(TOTAL) in display.notes[-1][1]


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/evil", "a/../../evil", "C:evil", "..\\evil", "\\\\host\\share", "a//b", "a/./b", "", "a\nb",
     MANIFEST_NAME, f"{STATE_FOLDER}/lock", "config.json/x"],
)  # fmt: skip
def test_dangerous_names_are_refused(endpoint, tmp_path, name):
    (tmp_path / "work").mkdir()
    with pytest.raises(UserError, match="must not be written"):
        fetch(tmp_path / "work" / "model", endpoint(listed_names={"tokenizer.model": name}))
    assert list(tmp_path.rglob("*")) == [tmp_path / "work"]


def test_harmless_names_are_not_refused():
    names = ["a", "a.b/c d", "模型.json", "...", "a..b", ".gitattributes", "con fig"]
    check_paths(Listing("", {name: None for name in names}))


def test_links_in_the_folder_are_refused(endpoint, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        fetch(tmp_path / "model", endpoint())
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_small_disk_is_noticed_before_the_start(endpoint, hub, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9, 1000))
    address = endpoint()
    with pytest.raises(UserError, match="Make room"):
        fetch(tmp_path, address)
    assert hub.report(address)["requests"] == 1  # the list


def test_a_full_disk_is_a_message(endpoint, tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PartFile, "write", full)
    with pytest.raises(UserError, match="No space left"):
        call_main(
            model_download.main, "--repo_id", "owner/model", "--endpoint", endpoint(), "--local_dir", str(tmp_path)
        )


def test_a_repository_that_is_broken_itself_is_said_so(endpoint, tmp_path):
    files = {"model.safetensors": {"file": str(ROOT / "tests" / "helpers" / "fake_hub.py"), "lfs": True}}
    with pytest.raises(UserError, match="damaged safetensors file: its header is longer than the file"):
        fetch(tmp_path, endpoint(files=files))


def test_safetensors_problems(tmp_path):
    path = tmp_path / "x.safetensors"
    good = content(path.name, 1000, 0)
    for data, problem in (
        (good, None),
        (good[:-1], "do not fill"),
        (good + b"x", "do not fill"),
        (good[:8] + b"?" + good[9:], "not readable"),
        (good.replace(b"[0,", b"[4,"), "gaps"),
        (b"", "not readable"),
    ):
        path.write_bytes(data)
        found = safetensors_problem(path)
        assert (found is None) if problem is None else problem in found


# --- what users have -------------------------------------------------------------------------------------------------


def test_an_hf_folder_is_recognised(endpoint, tmp_path):
    address = endpoint()
    huggingface_hub.snapshot_download("owner/model", local_dir=tmp_path, endpoint=address)
    assert unfinished_files(tmp_path) == []
    display = fetch(tmp_path, address)
    assert display.fetched == 0
    assert_right(tmp_path)


def test_verify_only(endpoint, tmp_path, capsys):
    address = endpoint()
    verify = ["--local_dir", str(tmp_path), "--verify_only"]
    with pytest.raises(UserError, match="Give --repo_id"):
        call_main(model_download.main, *verify)
    fetch(tmp_path, address)
    call_main(model_download.main, *verify)
    assert f"All {len(FILES)} files" in capsys.readouterr().out
    before = (tmp_path / LARGEST).stat()
    data = bytearray((tmp_path / LARGEST).read_bytes())
    data[-1] ^= 1
    (tmp_path / LARGEST).write_bytes(data)
    os.utime(tmp_path / LARGEST, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match=f"1 of {len(FILES)} files .* {LARGEST}"):
        call_main(model_download.main, *verify)
    assert unfinished_files(tmp_path) == [LARGEST]
    call_main(model_download.main, *verify, "--exclude", "*.safetensors")
    display = fetch(tmp_path, address)
    assert display.fetched == FILES[LARGEST]["size"]
    assert_right(tmp_path)


def test_verify_only_against_the_hub(endpoint, tmp_path):
    address = endpoint()
    huggingface_hub.snapshot_download("owner/model", local_dir=tmp_path, endpoint=address)
    verify = ["--local_dir", str(tmp_path), "--verify_only", "--repo_id", "owner/model", "--endpoint", address]
    call_main(model_download.main, *verify)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        call_main(model_download.main, *verify)


def test_unfinished_files(tmp_path):
    assert unfinished_files(tmp_path) == []
    assert unfinished_files(tmp_path / "nothing") == []
    leftover = tmp_path / ".cache" / "huggingface" / "download" / "x.incomplete"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    assert unfinished_files(tmp_path) == [".cache/huggingface/download/x.incomplete"]
    (tmp_path / MANIFEST_NAME).write_text("{")
    assert unfinished_files(tmp_path) == [MANIFEST_NAME]


def test_the_trainers_check_is_cheap():
    code = (
        "import sys; import utils.download.manifest; print('huggingface_hub' in sys.modules, 'httpx2' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.split() == ["False", "False"]


def test_a_finished_folder_loads_offline(endpoint, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    )
    model.save_pretrained(tmp_path / "source")
    files = {path.name: {"file": str(path)} for path in (tmp_path / "source").iterdir()}
    fetch(tmp_path / "copy", endpoint(files=files))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "copy", local_files_only=True)
    assert loaded.lm_head.weight.equal(model.lm_head.weight)


# --- the command line and the display --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--repo_id"),
        (["--repo_id", "a/b/c"], "owner/name"),
        (["--repo_id", "a/b", "--endpoint", "mirror"], "hf-mirror"),
        (["--repo_id", "a/b", "--max_rate", "fast"], "500K"),
        (["--repo_id", "a/b", "--workers", "0"], "1 to 64"),
        (["--repo_id", "a/b", "--timeout", "0"], "above 0"),
        (["--repo_id", "a/b", "--give_up_after", "-1"], "0 or more"),
        (["--repo_id", "a/b", "--token", "hf_x\n"], "no token has"),
        (["--repo_id", "a/b", "--dry_run", "--verify_only"], "exclude each other"),
    ],
)
def test_bad_flags(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(DownloadConfig, arguments)


def test_good_flags():
    config = parse(DownloadConfig, ["--repo_id", "a/b", "--endpoint", "hf-mirror", "--endpoint", "https://x.example"])
    assert config.folder == Path("models/a/b")
    assert config.endpoint == ["hf-mirror", "https://x.example"]
    rates = {"500K": 500 * 1024, "2M": 2 * 1024**2, "1.5MB/s": 1.5 * 1024**2, "10": 10, "": None}
    assert {rate: DownloadConfig(max_rate=rate).bytes_per_second for rate in rates} == rates


def test_max_rate_holds_all_connections_together():
    throttle = Throttle(1000_000)
    began = time.monotonic()
    threads = [
        threading.Thread(target=lambda: [throttle.spend(10_000) for _number in range(5)]) for _worker in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.19 < time.monotonic() - began < 0.6


def test_json_lines(endpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(JsonDisplay, "seconds_between_lines", 0.0)
    arguments = ["--repo_id", "owner/model", "--local_dir", tmp_path, "--json"]
    call_main(model_download.main, *arguments, "--endpoint", endpoint(rate=2_000_000))
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[-1]["event"] == "done"
    assert events[-1]["bytes_received"] == TOTAL
    progress = [event for event in events if event["event"] == "progress"]
    assert progress[-1]["total"] == TOTAL
    assert progress[-1]["stage"] == "fetch"


def test_a_log_gets_a_plain_line_now_and_then(endpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Display, "seconds_between_lines", 0.1)
    arguments = ["--repo_id", "owner/model", "--local_dir", tmp_path]
    call_main(model_download.main, *arguments, "--endpoint", endpoint(rate=1_000_000))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Fetching")]
    assert lines
    assert "time left" in lines[0]
    assert LARGEST in lines[0]


def test_readable_numbers():
    assert [readable_size(count) for count in (0, 1023, 1536, 5 * 1024**3)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]
    assert [readable_time(seconds) for seconds in (5, 90, 3725)] == ["5 s", "2 min", "1 h 02 min"]


def test_select_keeps_the_formats_that_safetensors_do_not_cover():
    def listing(*paths):
        return Listing("", {path: None for path in paths})

    wanted, left_out = select(listing("unet/a.safetensors", "unet/a.bin", "vae/b.bin"), [], [], safe_formats=True)
    assert sorted(wanted.files) == ["unet/a.safetensors", "vae/b.bin"]
    assert left_out == ["unet/a.bin"]


def test_a_slow_line_is_recorded_in_time(endpoint, tmp_path, monkeypatch):
    recorded = []
    original = PartFile.record

    def record(part, start, end, crc):
        recorded.append(end - start)
        original(part, start, end, crc)

    monkeypatch.setattr(PartFile, "record", record)
    options = dataclasses.replace(OPTIONS, flush_seconds=0.05, slowest=1, workers=1, chunk=10**6)
    fetch(tmp_path, endpoint(rate=100_000), options=options, include=["tokenizer.model"])
    assert len(recorded) >= 2


def test_bars_for_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(TerminalDisplay, "seconds_between_lines", 0.0)
    display = TerminalDisplay()
    display.begin("fetch", "Fetching", 300)
    for path in ("a.bin", "b.bin"):
        display.start_file(path, 150)
        display.advance(path, 75)
    display.tick()
    display.note("something happened")
    display.finish_file("a.bin")
    display.advance("b.bin", 75)
    display.tick()
    display.end()
    output = capsys.readouterr()
    assert "something happened" in output.out
    assert "Fetching:  50%" in output.err
    assert "b.bin: 100%" in output.err
