"""Thousands of downloads from a server that misbehaves, with kill -9 in between: none may end wrong.

    python tests/soak_download.py --runs 2000      # what `make soak` runs; prints tables in Markdown

Each run is given by its seed: files, faults, kills and damage to the disk. It has to end with every file right, or with
the message that the situation asks for. `hf download` (huggingface_hub's snapshot_download) then meets the same server.
"""

import argparse
import gettext
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import huggingface_hub
from helpers.fake_hub import BODY_FAULTS, LISTING_FAULTS, STATUS_FAULTS, FakeHub, content
from huggingface_hub import constants

import configs.messages
from configs.download import DownloadConfig
from configs.errors import NetworkGaveUpError, UserError
from model_download import download
from utils.download.display import Display
from utils.download.http import trusted_certificates
from utils.download.manifest import STATE_FOLDER, unfinished_files
from utils.download.options import TransferOptions

FILES = {
    "model-00001-of-00002.safetensors": {"size": 1_200_000},
    "model-00002-of-00002.safetensors": {"size": 400_000},
    "tokenizer.model": {"size": 30_000},
    "config.json": {"size": 700},
    "sub/empty.txt": {"size": 0},
}
LARGEST = "model-00001-of-00002.safetensors"
TOTAL = sum(file["size"] for file in FILES.values())
CHUNK = 512 * 1024
OPTIONS = TransferOptions(
    workers=4,
    chunk=CHUNK,
    longest_run=256 * 1024,
    read=64 * 1024,
    timeout=0.25,
    slowest=20_000,
    first_delay=0.002,
    longest_delay=0.02,
)
GIVE_UP_SECONDS = 20.0
HF_SECONDS = 60.0
"""After so long a run of hf is ended and counted as one that does not end."""

EXPECTED_MESSAGES = {
    "401": "wants a token",
    "403": "wants a token",
    "gated": "gated repository",
    "404": "has no model",
    "revision": "no such revision",
    "bad_source": "sends wrong bytes",
    "moved": "run the same command again",
}


class CountingDisplay(Display):
    """Counts received bytes in shared memory, so that they outlive a kill."""

    def __init__(self, counter: mmap.mmap) -> None:
        super().__init__()
        self.counter = counter

    def received(self, count: int) -> None:
        with self._lock:
            self.counter[:8] = struct.pack("<q", struct.unpack("<q", self.counter[:8])[0] + count)

    def show_note(self, text, event, values):
        pass

    def show_progress(self):
        pass


class Plan:
    """What happens in the run of one seed."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.seed = seed
        self.name = f"seed-{seed}"
        kinds = [*BODY_FAULTS, *STATUS_FAULTS, *LISTING_FAULTS]
        self.scenario = {
            "files": FILES,
            "seed": seed,
            "kinds": rng.sample(kinds, rng.randint(1, len(kinds))),
            "probability": rng.uniform(0.2, 0.8),
            "most_faults": rng.randint(1, 12),
            "stall_seconds": 0.6,
        }
        self.expected = ""
        kind = rng.random()
        if kind < 0.04:
            self.expected = rng.choice(["401", "403", "gated", "404", "revision"])
            self.scenario["deny"] = self.expected
        elif kind < 0.08:
            self.expected = "bad_source"
            self.scenario["always"] = {LARGEST: "always_wrong"}
        elif kind < 0.12:
            self.expected = "moved"
            self.scenario["moves_after"] = rng.randint(1, 12)
        kill = rng.random() < 0.4
        self.kills = [rng.random() for _number in range(rng.randint(1, 4))] if kill else []
        """When to kill, each time: ours after so large a share of the bytes, hf after so large a share of a second."""
        self.disk_damage = rng.choice(["part", "journal", "file"]) if rng.random() < 0.15 else ""
        if self.disk_damage and not self.kills:
            self.kills = [rng.random()]
        self.random = rng


def run_ours(hub: FakeHub, plan: Plan, folder: Path) -> dict:
    """Download with kills and damage in between; gives what came of it."""
    endpoint = hub.scenario(plan.name, **plan.scenario)
    config = DownloadConfig(
        repo_id="owner/model", local_dir=str(folder), endpoint=[endpoint], give_up_after=GIVE_UP_SECONDS / 60
    )
    counter = mmap.mmap(-1, 8)
    kills = damages = 0

    def work() -> None:
        download(config, CountingDisplay(counter), OPTIONS)

    def received() -> int:
        return struct.unpack("<q", counter[:8])[0]

    for share in plan.kills:
        limit = received() + share * TOTAL
        _status, _message, was_killed = in_child(work, lambda limit=limit: received() >= limit)
        kills += was_killed
        if was_killed and plan.disk_damage:
            damages += damage(folder, plan)
    status, message, _killed = in_child(work)
    if plan.expected == "moved" and status == 2 and EXPECTED_MESSAGES["moved"] in message:
        status, message, _killed = in_child(work)
        status = status or -1  # the second time it takes the new revision
    report = hub.report(endpoint)
    hub.forget(endpoint)
    outcome = judge(plan, folder, status, message)
    return {
        "seed": plan.seed,
        "outcome": outcome,
        "status": status,
        "message": message,
        "faults": report["faults"],
        "kills": kills,
        "damages": damages,
        "received": received(),
        "repeated": max(0, received() - TOTAL) if outcome == "right" and plan.expected != "moved" else 0,
        "sent": sum(report["sent"].values()),
    }


def judge(plan: Plan, folder: Path, status: int, message: str) -> str:
    """right: every byte is; message: it could not be, and the right thing was said; else what is wrong."""
    wrong = [path for path in FILES if is_wrong(folder / path, plan, path)]
    missing = [path for path in FILES if not (folder / path).exists()]
    if status in (0, -1):
        if wrong or missing or unfinished_files(folder):
            return f"success, but wrong {wrong}, missing {missing}, unfinished {unfinished_files(folder)}"
        if plan.expected not in ("", "moved"):
            return "success where there can be none"
        return "right"
    unproved = unfinished_files(folder)
    if not set(wrong) <= set(unproved):  # what the disk has damaged stays until its replacement is proved
        return f"a wrong file has its final name, and is not known to be wrong: {wrong}"
    if folder.exists() and (folder / "download_manifest.json").exists() and not unfinished_files(folder):
        return "the folder looks finished"
    if status == 2 and plan.expected and EXPECTED_MESSAGES[plan.expected] in message:
        return "message"
    return f"status {status}: {message}"


def is_wrong(path: Path, plan: Plan, name: str) -> bool:
    """Whether a file is there with other bytes than it should have (of either revision, where the branch moves)."""
    if not path.exists():
        return False
    ages = (0, 1) if plan.expected == "moved" else (0,)
    found = hashlib.sha256(path.read_bytes()).digest()
    return all(hashlib.sha256(content(name, FILES[name]["size"], plan.seed + age)).digest() != found for age in ages)


def damage(folder: Path, plan: Plan) -> int:
    """What a bad disk or a power cut does: flip a byte, lose what was not flushed, tear the journal's last line."""
    if plan.disk_damage == "file":
        victims = [folder / path for path in FILES if (folder / path).exists() and FILES[path]["size"]]
    else:
        victims = sorted((folder / STATE_FOLDER).glob(f"*.{plan.disk_damage}"))
    victims = [path for path in victims if path.stat().st_size]
    if not victims:
        return 0
    victim = plan.random.choice(victims)
    before = victim.stat()
    if plan.disk_damage == "journal":
        os.truncate(victim, before.st_size - 3)
        return 1
    with victim.open("r+b") as file:
        position = plan.random.randrange(before.st_size)
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0xFF]))
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))  # as silently as a disk does it
    return 1


def run_hf(hub: FakeHub, plan: Plan, folder: Path) -> dict:
    """The same for huggingface_hub."""
    endpoint = hub.scenario(plan.name, **plan.scenario)
    constants.HF_HUB_DOWNLOAD_TIMEOUT = constants.HF_HUB_ETAG_TIMEOUT = constants.DEFAULT_ETAG_TIMEOUT = 0.25

    def work() -> None:
        huggingface_hub.snapshot_download("owner/model", local_dir=folder, endpoint=endpoint, max_workers=4)

    def later(seconds: float):
        deadline = time.monotonic() + seconds
        return lambda: time.monotonic() > deadline

    for share in plan.kills:
        _status, _message, was_killed = in_child(work, later(share))
        if was_killed and plan.disk_damage == "file":
            damage(folder, plan)
    status, message, timed_out = in_child(work, later(HF_SECONDS))
    wrong = [path for path in FILES if is_wrong(folder / path, plan, path)]
    missing = [path for path in FILES if not (folder / path).exists()]
    if timed_out:
        outcome = "no end"
    elif status == 0:
        outcome = "claims success, but files are wrong or missing" if wrong or missing else "right"
    else:
        outcome = "an error, where there can be nothing else" if plan.expected else "an error, and files are missing"
        outcome = "an error, and a wrong file has its final name" if wrong else outcome
    sent = sum(hub.report(endpoint)["sent"].values())
    hub.forget(endpoint)
    return {"seed": plan.seed, "outcome": outcome, "message": message, "repeated": max(0, sent - TOTAL)}


def in_child(work, time_to_kill=lambda: False) -> tuple[int, str, bool]:
    """Run in a forked process (everything is imported already), and kill it when it is time; its status and message."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        status, message = 0, ""
        try:
            work()
        except UserError as error:
            status, message = 2, str(error)
        except NetworkGaveUpError as error:
            status, message = NetworkGaveUpError.exit_status, str(error)
        except BaseException as error:
            status, message = 1, f"{type(error).__name__}: {error}"
        os.write(writing, message.encode()[:4000])
        os._exit(status)
    os.close(writing)
    was_killed = False
    while not was_killed and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time_to_kill():
            os.kill(child, signal.SIGKILL)
            was_killed = True
        time.sleep(0.002)
    with os.fdopen(reading, "rb") as pipe:
        message = pipe.read().decode(errors="replace")
    _pid, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), message, was_killed


def run_all(hub: FakeHub, run, seeds, parallel: int = 4, until: float = float("inf")):
    """Run seeds in forked processes, a few at a time; gives each one's result as it comes."""
    trusted_certificates()  # read here once, and not in each child
    seeds = iter(seeds)
    under_way: dict[int, tuple[int, int, Path]] = {}
    while True:
        while len(under_way) < parallel and time.monotonic() < until and (seed := next(seeds, None)) is not None:
            folder = Path(tempfile.mkdtemp(prefix="soak-"))
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(reading)
                try:
                    result = run(hub, Plan(seed), folder / "model")
                except BaseException as error:
                    result = {"seed": seed, "outcome": f"the test itself failed: {type(error).__name__}: {error}"}
                os.write(writing, json.dumps(result).encode())
                os._exit(0)
            os.close(writing)
            under_way[child] = (seed, reading, folder)
        if not under_way:
            return
        child, _status = os.waitpid(-1, 0)
        if child in under_way:
            seed, reading, folder = under_way.pop(child)
            with os.fdopen(reading, "rb") as pipe:
                text = pipe.read()
            shutil.rmtree(folder, ignore_errors=True)
            yield json.loads(text) if text else {"seed": seed, "outcome": "the test itself died"}


def table_of_ours(results: list[dict]) -> list[str]:
    """The results in Markdown."""
    faults = Counter()
    for result in results:
        faults.update(result.get("faults", {}))
    kills = sum(result.get("kills", 0) for result in results)
    damages = sum(result.get("damages", 0) for result in results)
    wrong = [result for result in results if result["outcome"] not in ("right", "message")]
    repeating = {"wrong_byte", "always_wrong", "whole_answer"}
    only_kills = [r for r in results if r.get("kills") and not r["damages"] and not repeating & r["faults"].keys()]
    worst = max((result["repeated"] / result["kills"] for result in only_kills), default=0)
    rows = [
        ("runs", len(results)),
        ("ended with every hash right", sum(result["outcome"] == "right" for result in results)),
        ("ended with the message that the case asks for", sum(result["outcome"] == "message" for result in results)),
        ("**wrong outcomes**", f"**{len(wrong)}**"),
        ("files proved", len(FILES) * sum(result["outcome"] == "right" for result in results)),
        ("`kill -9`", kills),
        ("bytes flipped on the disk, journals torn", damages),
        *((f"fault: {kind}", count) for kind, count in sorted(faults.items())),
        ("bytes wanted", f"{TOTAL * sum(result['outcome'] == 'right' for result in results):,}"),
        ("bytes fetched twice, in all", f"{sum(result.get('repeated', 0) for result in results):,}"),
        (
            "most bytes fetched twice a kill (runs without wrong bytes or ignored ranges)",
            f"{worst:,.0f} (a chunk is {CHUNK:,})",
        ),
    ]
    return ["| model_download.py | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]


def table_of_hf(results: list[dict]) -> list[str]:
    """The results of huggingface_hub in Markdown."""
    outcomes = Counter(result["outcome"] for result in results)
    rows = [("runs", len(results)), *sorted(outcomes.items(), key=lambda item: -item[1])]
    finished = [result["repeated"] for result in results if result["outcome"] == "right"]
    rows.append(("bytes sent twice, in the runs that ended right", f"{sum(finished):,}"))
    return ["| hf download | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Soak test of model_download.py.")
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--hf_runs", type=int, default=300, help="how many of the seeds hf meets too")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=60, help="begin no further run after so long")
    options = parser.parse_args()
    configs.messages._translation = gettext.NullTranslations()  # messages are judged by their English text
    seeds = range(options.first_seed, options.first_seed + options.runs)
    until = time.monotonic() + options.minutes * 60
    ours: list[dict] = []
    with FakeHub() as hub:
        for result in run_all(hub, run_ours, seeds, options.parallel, until):
            ours.append(result)
            if result["outcome"] not in ("right", "message"):
                print(result, file=sys.stderr, flush=True)
            if len(ours) % 100 == 0:
                print(f"{len(ours)} of {len(seeds)} runs", file=sys.stderr, flush=True)
        seeds = range(options.first_seed, options.first_seed + options.hf_runs)
        hf = list(run_all(hub, run_hf, seeds, options.parallel, until))
    print(f"{date.today()}, Python {sys.version.split()[0]}, huggingface_hub {version('huggingface_hub')}\n")
    print("\n".join([*table_of_ours(ours), "", *table_of_hf(hf)]))
    return 0 if all(result["outcome"] in ("right", "message") for result in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
