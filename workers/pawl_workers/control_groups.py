"""What a Linux control group lets this process still take of memory; versions 1 and 2, nested or in a container.

psutil sees the machine, not the limit of a container or of a systemd slice. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

__all__ = ["host_memory_left", "memory_left"]

_MEMBERSHIP = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")
# Of each version: limit, use, and the line of memory.stat that counts file pages which the kernel drops when asked.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")


def host_memory_left() -> int:
    """Bytes of host memory that this process could still take: what machine and control groups both allow."""
    available, left = int(psutil.virtual_memory().available), memory_left()
    return available if left is None else min(available, left)


def memory_left(membership: Path = _MEMBERSHIP, mount: Path = _MOUNT) -> int | None:
    """Bytes that the tightest group around this process still allows.

    A file that was read lies in the page cache and counts as used by the group; what of it the kernel would drop
    first (its inactive part) is free for us.

    Args:
        membership: the file that names this process's groups (proc(5)).
        mount: where the groups are mounted.

    Returns:
        None where no group sets a limit.
    """
    left: list[int] = []
    for folder, (limit_name, used_name, droppable_name) in _groups(membership, mount):
        try:
            limit = (folder / limit_name).read_text().strip()
            used = int((folder / used_name).read_text())
            statistics = (folder / "memory.stat").read_text().split("\n")
        except (OSError, ValueError):  # a root group has no limit
            continue
        if limit.isdecimal():  # else `max`
            droppable = next((int(line.split()[1]) for line in statistics if line.startswith(f"{droppable_name} ")), 0)
            left.append(max(0, int(limit) - used + droppable))
    return min(left, default=None)


def _groups(membership: Path, mount: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """This process's groups and all around them, with the names of their files."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield from ((folder, _VERSION_2) for folder in _upwards(mount, path))
        elif "memory" in controllers.split(","):
            yield from ((folder, _VERSION_1) for folder in _upwards(mount / "memory", path))


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """From a group up to the root of its tree; in a container the path may be the host's, and only the root is ours."""
    parts = [part for part in path.split("/") if part and part != ".."]
    for length in range(len(parts), -1, -1):
        yield root.joinpath(*parts[:length])
