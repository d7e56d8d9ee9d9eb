"""Where groups are made, and which files they need: on directories that look like both versions' file systems."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import cgroups


def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounts: list[str], own: list[str]) -> Path:
    root = tmp_path / "cgroup"
    root.mkdir()
    (tmp_path / "mounts").write_text("".join(f"none {root}{line} 0 0\n" for line in mounts))
    (tmp_path / "own").write_text("".join(f"{line}\n" for line in own))
    monkeypatch.setattr(cgroups, "MOUNTS", tmp_path / "mounts")
    monkeypatch.setattr(cgroups, "OWN", tmp_path / "own")
    return root


def version_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handed_on: dict[str, str]) -> Path:
    root = pretend(tmp_path, monkeypatch, [" cgroup2 rw"], ["0::/user/session"])
    (root / "user/session").mkdir(parents=True)
    for path, controllers in handed_on.items():
        (root / path / "cgroup.subtree_control").write_text(f"{controllers}\n")
    return root


def test_version_1_has_a_tree_per_controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = ["/cpu,cpuacct cgroup rw,cpu,cpuacct", "/memory cgroup rw,memory", "/unified cgroup2 rw"]
    root = pretend(tmp_path, monkeypatch, mounts, ["4:memory:/job", "1:cpuacct,cpu:/", "0::/"])
    assert cgroups.home("cpu") == root / "cpu,cpuacct"
    (root / "memory/job").mkdir(parents=True)
    assert cgroups.home("memory") == root / "memory/job"
    assert cgroups.home("cpuset") is None


def test_another_containers_path_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = pretend(tmp_path, monkeypatch, ["/memory cgroup rw,memory"], ["4:memory:/docker/abc"])
    assert cgroups.home("memory") == root / "memory"


def test_version_2_takes_the_nearest_group_that_hands_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = version_2(tmp_path, monkeypatch, {".": "cpu io memory", "user": "memory"})
    assert cgroups.home("memory") == root / "user"
    assert cgroups.home("cpu") == root
    assert cgroups.home("cpuset") is None


def test_version_2_has_both_limits_in_one_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = version_2(tmp_path, monkeypatch, {".": "cpu memory"})
    group = root / "host-1"
    group.mkdir()
    for file in ("cpu.max", "memory.max", "memory.swap.max"):
        (group / file).touch()
    assert cgroups.make("host-1", cpus=0.05, memory=4096) == (group,)
    assert (group / "cpu.max").read_text() == "1000 20000"
    assert (group / "memory.max").read_text() == "4096"
    assert (group / "memory.swap.max").read_text() == "0"


@pytest.mark.parametrize(
    ("limits", "wish"), [({"cpus": 0.5, "memory": None}, "cpus=0.5"), ({"cpus": None, "memory": 4096}, "memory=4096")]
)
def test_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, None], wish: str
) -> None:
    root = version_2(tmp_path, monkeypatch, {".": "cpu memory"})
    with pytest.raises(RuntimeError, match=rf"{wish}: .*/g has no .* or .*\.max: this kernel lacks that limit"):
        cgroups.make("g", **limits)
    (root / "cgroup.subtree_control").write_text("io\n")
    with pytest.raises(RuntimeError, match=rf"{wish}: no cgroup here can limit .* or leave the limit out"):
        cgroups.make("g", **limits)


def test_no_cgroups_is_no_trouble_when_removing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "MOUNTS", tmp_path / "mounts")
    cgroups.remove("host-")
    assert cgroups.make("host-1", cpus=None, memory=None) == ()
