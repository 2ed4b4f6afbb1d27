"""Limits of control groups, as files in a made tree."""

from __future__ import annotations

from pathlib import Path

import pytest

from pawl_workers.control_groups import memory_left

MIB = 1 << 20


def group(folder: Path, limit: str | int, used: int, inactive: int, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    limit_name, used_name = ("memory.max", "memory.current") if version == 2 else (
        "memory.limit_in_bytes", "memory.usage_in_bytes",
    )  # fmt: skip
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / used_name).write_text(f"{used}\n")
    prefix = "" if version == 2 else "total_"
    # Version 1 has the group's own count, too, which leaves out the groups below it.
    own = "" if version == 2 else "inactive_file 1\n"
    (folder / "memory.stat").write_text(f"anon 5\n{own}{prefix}inactive_file {inactive}\n{prefix}active_file 7\n")


def member(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "cgroup"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_group_around_the_process_counts(version: int, tmp_path: Path) -> None:
    """A service without a limit inside a slice with one; file pages that can be dropped are free."""
    mount = tmp_path / "mount"
    root = mount if version == 2 else mount / "memory"
    group(root / "slice", 100 * MIB, 60 * MIB, 10 * MIB, version)
    group(root / "slice" / "service", "max" if version == 2 else (1 << 63) - 4096, 50 * MIB, 9 * MIB, version)
    line = "0::/slice/service" if version == 2 else "4:memory:/slice/service"
    assert memory_left(member(tmp_path, "3:cpuset:/elsewhere", line), mount) == 50 * MIB


def test_a_path_of_the_host_leads_to_the_containers_root(tmp_path: Path) -> None:
    """A container sees its own group at the mount, under whatever name the host has for it."""
    mount = tmp_path / "mount"
    group(mount / "memory", 30 * MIB, 10 * MIB, 0, 1)
    membership = member(tmp_path, "4:memory,hugetlb:/kubepods/pod7/abc", "0::/")
    assert memory_left(membership, mount) == 20 * MIB


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    """Never a negative number."""
    group(tmp_path / "mount", 10 * MIB, 12 * MIB, 0, 2)
    assert memory_left(member(tmp_path, "0::/../.."), tmp_path / "mount") == 0


def test_without_limits_there_is_none(tmp_path: Path) -> None:
    """No group files at all, groups without limits, and broken ones."""
    assert memory_left(tmp_path / "absent", tmp_path) is None
    membership = member(tmp_path, "0::/a")
    assert memory_left(membership, tmp_path / "mount") is None
    group(tmp_path / "mount" / "a", "max", 5, 0, 2)
    assert memory_left(membership, tmp_path / "mount") is None
    (tmp_path / "mount" / "a" / "memory.current").write_text("lots")
    assert memory_left(membership, tmp_path / "mount") is None


def test_this_machine_can_be_asked() -> None:
    """Whatever it answers, it is a size."""
    left = memory_left()
    assert left is None or left >= 0
