"""Free memory: the smallest of the machine's, the containers' and the process's limits."""

from pathlib import Path

import pytest

from muxjax.executor.free_memory import FreeMemory, host_free_memory

GB = 10**9


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    folder = tmp_path / "proc"
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text("MemTotal: 40000000 kB\nMemAvailable:   20000000 kB\n")
    return folder


def write_group(folder: Path, **files: int | str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_the_machine_limits_where_no_container_does(proc, tmp_path):
    (proc / "self" / "cgroup").write_text("0::/app\n")
    write_group(tmp_path / "cgroup" / "app", memory__max="max", memory__current=GB)
    free = host_free_memory(proc, tmp_path / "cgroup")
    assert free == FreeMemory(20000000 * 1024, "on this machine")


@pytest.mark.parametrize("path", ["/pod/app", "/pod/app/inner"])
def test_an_outer_container_of_version_2_limits(proc, tmp_path, path):
    (proc / "self" / "cgroup").write_text(f"0::{path}\n")
    pod = tmp_path / "cgroup" / "pod"
    write_group(pod / "app", memory__max=9 * GB, memory__current=GB)
    stat = f"anon 5\ninactive_file {GB}\nactive_file 7"
    write_group(pod, memory__max=4 * GB, memory__current=3 * GB, memory__stat=stat)
    free = host_free_memory(proc, tmp_path / "cgroup")
    assert free == FreeMemory(2 * GB + 7, "within the container's memory limit")


def test_a_container_of_version_1_limits_where_only_its_root_is_mounted(proc, tmp_path):
    (proc / "self" / "cgroup").write_text("4:memory:/docker/abc\n3:cpuset:/\n0::/\n")
    write_group(
        tmp_path / "cgroup" / "memory",
        memory__limit_in_bytes=2 * GB,
        memory__usage_in_bytes=3 * GB,
        memory__stat="total_inactive_file 5\ninactive_file 100",
    )
    free = host_free_memory(proc, tmp_path / "cgroup")
    assert free == FreeMemory(0, "within the container's memory limit")


def test_it_is_unknown_where_there_is_no_proc(tmp_path):
    assert host_free_memory(tmp_path / "none", tmp_path / "none") is None
