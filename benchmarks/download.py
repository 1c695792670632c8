"""Speed of model_download.py against `hf download`, from the same local server.

    python benchmarks/download.py                        # a table in Markdown
    python benchmarks/download.py --folder /mnt/disk     # on another disk
    python benchmarks/download.py --large 5 --rounds 1   # also one file of 5 GiB, for the memory

Three lines: a server as fast as it can be; one that is 200 ms away and gives each connection 2 MiB/s, as storage hosts
do; and the memory that a large file takes. The two programs take turns, each into an empty folder; the median counts.
"""

import argparse
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers.fake_hub import FakeHub

ROOT = Path(__file__).resolve().parent.parent
MIB = 1024**2


def commands(endpoint: str, folder: Path) -> dict[str, list[str]]:
    """The two programs' command lines, each with its own folder."""
    download = [sys.executable, str(ROOT / "model_download.py"), "--repo_id", "owner/model", "--endpoint", endpoint]
    hf = [str(Path(sys.executable).with_name("hf")), "download", "owner/model"]
    return {
        "model_download.py": [*download, "--local_dir", str(folder / "ours")],
        "hf download": [*hf, "--local-dir", str(folder / "hf")],
    }


def measure(command: list[str], endpoint: str, folder: Path) -> tuple[float, float]:
    """Seconds, and peak memory in MiB, of one download into an empty folder."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    os.sync()
    began = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read()
    _pid, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    if process.returncode:
        raise RuntimeError(f"{command}: {errors.decode()[-2000:]}")
    shutil.rmtree(folder / ("ours" if "--repo_id" in command else "hf"))
    return seconds, usage.ru_maxrss / 1024


def compare(hub: FakeHub, name: str, file: Path, copies: int, rounds: int, folder: Path, **behaviour: float) -> str:
    """One line of the table."""
    files = {f"shard-{number}.bin": {"file": str(file)} for number in range(copies)}
    endpoint = hub.scenario(f"s{time.monotonic_ns()}", files=files, **behaviour)
    size = file.stat().st_size * copies / MIB
    results = {program: [] for program in commands(endpoint, folder)}
    for _round in range(rounds):
        for program, command in commands(endpoint, folder).items():
            results[program].append(measure(command, endpoint, folder))
    ours, hf = (statistics.median(seconds for seconds, _memory in runs) for runs in results.values())
    memory = [max(memory for _seconds, memory in runs) for runs in results.values()]
    rates = f"{size:.0f} | {size / ours:.1f} | {size / hf:.1f} | {hf / ours:.2f}"
    return f"| {name} | {rates} | {memory[0]:.0f} | {memory[1]:.0f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Download speed against `hf download` from a local server.")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of each of the two files without faults")
    parser.add_argument("--large", type=float, default=0.0, help="also one file of so many GiB, for the memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where to download to")
    options = parser.parse_args()
    with FakeHub() as hub, tempfile.TemporaryDirectory(dir=options.folder) as folder:
        place = Path(folder)
        print(f"{platform.machine()}, {os.cpu_count()} cores, huggingface_hub {version('huggingface_hub')}\n")
        print("| server | MiB | model_download.py MiB/s | hf download MiB/s | ratio | peak MiB, ours | peak MiB, hf |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name, size, copies, behaviour in (
            ("local, without faults", options.gigabytes * 1024, 2, {}),
            ("200 ms away, 2 MiB/s a connection", 64, 2, {"latency": 0.2, "rate": 2 * MIB}),
            ("local, one large file", options.large * 1024, 1, {}),
        ):
            if size:
                file = place / "served"
                write_random(file, int(size * MIB))
                print(compare(hub, name, file, copies, options.rounds, place, **behaviour), flush=True)
    print(f"\n(this process and its server: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB)")


def write_random(path: Path, size: int) -> None:
    """A file that no file system can compress."""
    with path.open("wb") as file:
        for position in range(0, size, 16 * MIB):
            file.write(os.urandom(min(16 * MIB, size - position)))


if __name__ == "__main__":
    main()
