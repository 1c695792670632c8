"""model_download.py against a local hub that misbehaves: how the bytes come, from where, and again after a stop."""

import dataclasses
import hashlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from helpers.command_runs import call_main
from helpers.downloads import SEED, assert_right, fetch
from helpers.environment import ROOT
from helpers.fake_hub import BODY_FAULTS, content
from soak_download import CHUNK, FILES, LARGEST, OPTIONS, TOTAL, run_all, run_ours

import model_download
from configs.command_line import run_command
from configs.download import DownloadConfig
from configs.errors import Interrupted, NetworkGaveUpError, UserError
from utils.download import part as part_module
from utils.download import sources as sources_module
from utils.download import transfer as transfer_module
from utils.download.http import _retry_after, make_client, origin
from utils.download.listing import RemoteFile
from utils.download.manifest import MANIFEST_NAME, STATE_FOLDER, Manifest, unfinished_files
from utils.download.part import PartFile, missing_ranges

pytestmark = pytest.mark.usefixtures("english")
SEEDED_RUNS = 300


# --- the seeded runs -------------------------------------------------------------------------------------------------


def test_seeded_runs_end_right_or_with_the_right_message(hub):
    results = list(run_all(hub, run_ours, range(SEEDED_RUNS)))
    assert len(results) == SEEDED_RUNS
    assert [result for result in results if result["outcome"] not in ("right", "message")] == []
    assert sum(result["kills"] for result in results) > SEEDED_RUNS / 4
    assert sum(result["damages"] for result in results) > SEEDED_RUNS / 20
    for result in results:
        if not result["damages"] and not result["faults"].get("wrong_byte"):
            # A server that ignores a range forces us to read what comes before it.
            forced = result["faults"].get("whole_answer", 0) * FILES[LARGEST]["size"]
            assert result["repeated"] <= CHUNK * result["kills"] + forced, result


# --- one fault at a time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*BODY_FAULTS, "500", "503", "429", "416", "expired"])
def test_a_fault_passes_and_costs_no_byte_twice(hub, endpoint, tmp_path, kind):
    address = endpoint(kinds=[kind], probability=0.4, most_faults=6)
    display = fetch(tmp_path, address)
    assert_right(tmp_path)
    assert hub.report(address)["faults"][kind] >= 2
    if kind == "wrong_byte":
        assert display.events["mismatch"] >= 1
    elif kind == "whole_answer":
        assert display.fetched <= TOTAL + 6 * 2 * FILES[LARGEST]["size"]  # a server without ranges forces it
    else:
        assert display.fetched == TOTAL


def test_a_server_without_ranges_is_put_up_with(endpoint, tmp_path):
    fetch(tmp_path, endpoint(always=dict.fromkeys(FILES, "whole_answer")))
    assert_right(tmp_path)


def test_a_dribbling_server_is_left(endpoint, tmp_path):
    options = dataclasses.replace(OPTIONS, timeout=0.1, slowest=50_000)
    display = fetch(tmp_path, endpoint(rate=20_000), endpoint(), options=options)
    assert_right(tmp_path)
    assert any("sends almost nothing" in text for _event, text in display.notes)
    assert display.events["source"] == 1


def test_wrong_bytes_again_and_again_name_the_source(endpoint, tmp_path):
    with pytest.raises(UserError, match="127.0.0.1 sends wrong bytes for " + LARGEST):
        fetch(tmp_path, endpoint(always={LARGEST: "always_wrong"}))
    assert not (tmp_path / LARGEST).exists()
    assert LARGEST in unfinished_files(tmp_path)


def test_bytes_that_differ_each_time_name_the_source(endpoint, tmp_path):
    with pytest.raises(UserError, match=r"other bytes of tokenizer\.model each time"):
        fetch(tmp_path, endpoint(always={"tokenizer.model": "wrong_byte"}))
    assert not (tmp_path / "tokenizer.model").exists()


@pytest.mark.parametrize(
    ("deny", "message"),
    [
        ("401", "wants a token"),
        ("gated", "accept the terms"),
        ("404", "Did you mean: owner/model"),
        ("revision", "no such revision of owner/model. It has: main"),
    ],
)
def test_what_will_not_pass_stops_at_once(hub, endpoint, tmp_path, deny, message):
    address = endpoint(deny=deny)
    with pytest.raises(UserError, match=message):
        fetch(tmp_path / "model", address)
    assert not (tmp_path / "model").exists()
    assert hub.report(address)["requests"] == 0


def test_a_dead_network_ends_with_its_own_status(tmp_path, capsys, monkeypatch):
    arguments = ["--repo_id", "owner/model", "--local_dir", str(tmp_path), "--give_up_after", "0.005"]
    monkeypatch.setattr("sys.argv", ["model_download.py", *arguments, "--endpoint", "http://127.0.0.1:1", "--json"])
    with pytest.raises(SystemExit) as end:
        run_command(model_download.main, DownloadConfig)
    assert end.value.code == 3
    output = capsys.readouterr()
    assert "run the same command again" in output.err
    assert json.loads(output.out.splitlines()[-1])["status"] == 3


def test_a_name_that_does_not_resolve_is_said_so(tmp_path):
    with pytest.raises(NetworkGaveUpError, match=r"nowhere.invalid can't be resolved"):
        fetch(tmp_path, "http://nowhere.invalid", give_up_after=0.002)


def test_retry_after_is_heard(endpoint, tmp_path):
    began = time.monotonic()
    fetch(tmp_path, endpoint(kinds=["429"], probability=1.0, most_faults=1, retry_after="1"))
    assert time.monotonic() - began >= 1.0


def test_retry_after_in_its_forms():
    def answer(**headers):
        return httpx2.Response(429, headers={name.replace("_", "-"): text for name, text in headers.items()})

    assert _retry_after(answer(Retry_After="7")) == 7
    assert _retry_after(answer(Retry_After="Wed, 21 Oct 2099 07:28:00 GMT")) > 0
    assert _retry_after(answer(RateLimit='"api";r=0;t=55')) == 55
    assert _retry_after(answer(Retry_After="soon")) is None
    assert _retry_after(answer()) is None


# --- going on --------------------------------------------------------------------------------------------------------


def test_only_flushed_bytes_are_recorded(tmp_path, monkeypatch):
    """The order that a power cut asks for: data written, data flushed, journal written, journal flushed."""
    file = RemoteFile("a.bin", 100, "sha256", hashlib.sha256(bytes(100)).hexdigest(), "c")
    part = PartFile(tmp_path, file)
    on_disk = {}

    def flush(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        name = path.suffix
        on_disk[name] = path.read_bytes()
        if name == ".journal":  # whatever the journal promises was on the disk before
            for line in on_disk[".journal"].decode().splitlines():
                start, end, _crc = line.split()
                assert len(on_disk[".part"]) >= int(end) > int(start)

    monkeypatch.setattr(part_module, "flush_to_disk", flush)
    for start in (0, 50):
        part.write(start, bytes(50))
        part.record(start, start + 50, 0)
    part.close()
    assert on_disk[".journal"].count(b"\n") == 2


def test_what_was_not_recorded_is_fetched_again(endpoint, tmp_path, monkeypatch):
    """As after a power cut: all that the journal does not promise is lost."""
    broken = endpoint(always={LARGEST: "cut"})

    def stop_soon(transfer, source, file):
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer_module.SourcePool, "failed", stop_soon)
    with pytest.raises(KeyboardInterrupt):
        fetch(tmp_path, broken)
    monkeypatch.undo()
    here = sum((tmp_path / path).stat().st_size for path in FILES if (tmp_path / path).exists())
    for part in (tmp_path / STATE_FOLDER).glob("*.part"):
        recorded = part_module.read_journal(part)
        here += sum(end - start for start, (end, _crc) in recorded.items())
        with part.open("r+b") as data:
            for start, end in missing_ranges(recorded, part.stat().st_size):
                data.seek(start)
                data.write(bytes(end - start))
    assert here > 0
    display = fetch(tmp_path, endpoint())
    assert_right(tmp_path)
    assert display.fetched == TOTAL - here


def test_a_torn_journal_promises_nothing_false(tmp_path):
    part = tmp_path / "x.part"
    part.write_bytes(bytes(100))
    part.with_suffix(".journal").write_text("0 10 00000000\n10 20 00000000\n5 15 00000000\n20 900 00000000\n30 40 0000")
    assert part_module.read_journal(part) == {0: (10, 0), 10: (20, 0)}
    assert missing_ranges({10: (20, 0)}, 40) == [(0, 10), (20, 40)]


def test_a_damaged_range_on_the_disk_is_fetched_again_alone(endpoint, tmp_path):
    file = RemoteFile(LARGEST, FILES[LARGEST]["size"], "sha256", "", "")
    data = content(LARGEST, file.size, SEED)
    file = dataclasses.replace(file, digest=hashlib.sha256(data).hexdigest())
    part = PartFile(tmp_path / STATE_FOLDER, file)
    piece = 100_000
    for start in range(0, file.size, piece):
        part.write(start, data[start : start + piece])
        part.record(start, start + piece, part_module.zlib.crc32(data[start : start + piece]))
    part.write(5 * piece + 7, b"\0\1\2\3")
    part.close()
    display = fetch(tmp_path, endpoint())
    assert_right(tmp_path)
    assert display.fetched == TOTAL - file.size + piece


def test_a_new_revision_keeps_the_files_that_did_not_change(endpoint, tmp_path):
    fetch(tmp_path, endpoint())
    changed = {**FILES, "config.json": {"size": 701}}
    display = fetch(tmp_path, endpoint(files=changed))
    assert display.fetched == 701
    assert (tmp_path / "config.json").stat().st_size == 701


def test_an_outdated_file_stays_until_its_replacement_is_proved(endpoint, tmp_path):
    (tmp_path / LARGEST).write_bytes(b"the old one")
    with pytest.raises(NetworkGaveUpError):
        fetch(tmp_path, endpoint(always={LARGEST: "503"}), give_up_after=0.005)
    assert (tmp_path / LARGEST).read_bytes() == b"the old one"
    assert LARGEST in unfinished_files(tmp_path)


def test_two_downloads_at_once_share_the_work(endpoint, tmp_path):
    address = endpoint(rate=1_000_000)
    second = []
    thread = threading.Thread(target=lambda: second.append(fetch(tmp_path, address)))
    first_began = subprocess.Popen(
        [
            sys.executable,
            "model_download.py",
            "--repo_id",
            "owner/model",
            "--endpoint",
            address,
            "--local_dir",
            tmp_path,
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    while not (tmp_path / MANIFEST_NAME).exists():
        assert first_began.poll() is None
        time.sleep(0.01)
    thread.start()
    assert first_began.wait() == 0
    thread.join()
    assert second[0].events["waiting"] == 1
    assert second[0].fetched == 0
    assert_right(tmp_path)


def test_ctrl_c_says_how_to_go_on(endpoint, tmp_path, monkeypatch):
    def interrupted(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer_module.Downloader, "run", interrupted)
    with pytest.raises(Interrupted, match="run the same command again"):
        call_main(
            model_download.main, "--repo_id", "owner/model", "--endpoint", endpoint(), "--local_dir", str(tmp_path)
        )


# --- sources and tokens ----------------------------------------------------------------------------------------------


def test_another_source_takes_over_in_mid_file(endpoint, tmp_path):
    first = endpoint(kinds=["cut"], probability=0.5, most_faults=100, always={LARGEST: "503"})
    display = fetch(tmp_path, first, endpoint())
    assert_right(tmp_path)
    assert display.events["source"] >= 1
    assert display.fetched == TOTAL


def test_a_bad_source_is_replaced(endpoint, tmp_path):
    fetch(tmp_path, endpoint(always={LARGEST: "always_wrong"}), endpoint())
    assert_right(tmp_path)


def test_a_source_with_another_revision_is_not_used(hub, endpoint, tmp_path):
    other = endpoint(seed=SEED + 1)
    with pytest.raises(NetworkGaveUpError):
        fetch(tmp_path, endpoint(always={LARGEST: "503"}), other, give_up_after=0.01)
    assert hub.report(other)["sent"] == {}


def test_a_source_that_is_down_at_the_start_is_passed_over(endpoint, tmp_path):
    fetch(tmp_path, "http://127.0.0.1:1", endpoint())
    assert_right(tmp_path)


def test_modelscope(endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "MODELSCOPE_HOSTS", ("localhost",))
    address = endpoint(kinds=["cut"], probability=0.3, most_faults=3)
    fetch(tmp_path, address.replace("127.0.0.1", "localhost"))
    assert_right(tmp_path)
    manifest = Manifest.read(tmp_path)
    assert {entry.algorithm for entry in manifest.files.values()} == {"sha256"}


def test_modelscope_takes_over_where_the_hash_agrees(hub, endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "MODELSCOPE_HOSTS", ("localhost",))
    other = endpoint()
    fetch(tmp_path, endpoint(always={LARGEST: "503"}), other.replace("127.0.0.1", "localhost"))
    assert_right(tmp_path)
    assert hub.report(other)["sent"][LARGEST] > 0


def test_a_token_opens_and_stays_at_home(hub, endpoint, tmp_path):
    with pytest.raises(UserError, match="wants a token"):
        fetch(tmp_path, endpoint(token="hf_secret"))
    with pytest.raises(UserError, match="does not let this token"):
        fetch(tmp_path, endpoint(token="hf_secret"), token="hf_other")
    address = endpoint(token="hf_secret")
    fetch(tmp_path, address, token="hf_secret")
    assert_right(tmp_path)
    assert hub.report(address)["strayed_tokens"] == 0


def test_a_token_is_for_the_first_source_and_a_saved_one_for_huggingface(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_saved")
    addresses = ["https://a.example", "https://hf-mirror.com", "https://huggingface.co/"]
    for given, expected in (("hf_given", ["hf_given", None, "hf_saved"]), ("", [None, None, "hf_saved"])):
        sources = sources_module.make_sources(addresses, "owner/model", "model", given, 1.0)
        assert [source.token for source in sources] == expected
        for source in sources:
            source.close()


def test_the_client_strikes_a_token_that_strays():
    home = origin("https://a.example/x")
    seen = []

    def transport(request):
        seen.append(request.headers.get("authorization"))
        return httpx2.Response(200)

    with make_client({home: "hf_secret"}, 1.0) as client:
        client._transport = httpx2.MockTransport(transport)
        client._mounts = {}
        for url in ("https://a.example/y", "https://a.example:444/y", "http://a.example/y", "https://b.example/y"):
            client.get(url, headers={"Authorization": "Bearer hf_secret"})
    assert seen == ["Bearer hf_secret", None, None, None]


def test_hf_endpoint_is_read(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", endpoint())
    fetch(tmp_path)
    assert_right(tmp_path)


def test_offline_mode_is_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        fetch(tmp_path)


def test_a_socks_proxy_without_its_library_is_a_message(tmp_path, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    with pytest.raises(UserError, match="pip install"):
        fetch(tmp_path)


def test_xet_brings_bytes_and_the_proof_stays(endpoint, tmp_path, monkeypatch):
    from utils.download import xet

    calls = []

    def fake_xet_get(*, incomplete_path, expected_size, displayed_filename, **_rest):
        calls.append(displayed_filename)
        data = content(displayed_filename, expected_size, SEED)
        wrong = b"\xff" if displayed_filename == LARGEST else data[:1]
        incomplete_path.write_bytes(wrong + data[1:])

    metadata = huggingface_hub.HfFileMetadata("c", "e", "l", 1, object())
    monkeypatch.setattr(xet, "get_hf_file_metadata", lambda *_a, **_k: metadata)
    monkeypatch.setattr(xet, "xet_get", fake_xet_get)
    display = fetch(tmp_path, endpoint(), options=dataclasses.replace(OPTIONS, use_xet=True))
    assert_right(tmp_path)
    assert LARGEST in calls
    assert display.events["mismatch"] == 1
    assert display.fetched == 2 * FILES[LARGEST]["size"]  # until two fetches agree
