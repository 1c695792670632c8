"""How much main memory there is, in and out of containers."""

import math

import pytest

from utils.machine.memory import free_main_memory

GB = 2**30


def write(system, files):
    for name, text in files.items():
        path = system / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MACHINE = {"proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {40 * 2**20} kB\n"}
VERSION_2 = {
    "sys/fs/cgroup/memory.max": f"{16 * GB}\n",
    "sys/fs/cgroup/memory.current": f"{10 * GB}\n",
    "sys/fs/cgroup/memory.stat": f"anon {3 * GB}\nfile {6 * GB}\ninactive_file {4 * GB}\n",
}
VERSION_1 = {
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{8 * GB}\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{5 * GB}\n",
    "sys/fs/cgroup/memory/memory.stat": f"cache 1\ntotal_inactive_file {2 * GB}\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        (MACHINE, 40 * GB),
        (MACHINE | VERSION_2, 10 * GB),
        (MACHINE | VERSION_1, 5 * GB),
        (MACHINE | VERSION_2 | {"sys/fs/cgroup/memory.max": "max\n"}, 40 * GB),
        (MACHINE | VERSION_2 | {"sys/fs/cgroup/memory.current": f"{30 * GB}\n"}, 0),
        (MACHINE | VERSION_1 | {"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"}, 40 * GB),
    ],
    ids=["unknown", "machine", "version 2", "version 1", "no limit", "over the limit", "no limit, version 1"],
)
def test_the_least_of_machine_and_container_counts(tmp_path, files, expected):
    write(tmp_path, files)
    assert free_main_memory(tmp_path) == expected
