"""Reports as text."""

from __future__ import annotations

from dataclasses import replace

from shoal.doctor.facts import Finding
from shoal.doctor.text import across_lines, report_lines
from shoal.doctor.ways import Across, Reach, Way
from tests.doctor.reports import REPORT
from tests.doctor.test_verdict import good, said

TEXT = """\
host            node1 (10.0.0.1)
shoal           0.1.0
python          3.11.7
torch           2.13.0+cpu (CPU only)
system          Linux 6.1 x86_64
processor       Zen (x86_64), AVX2
cores           8, 4 usable, no quota; torch takes 4 threads
accelerator     none
memory          16.0 GiB, 8.0 GiB available, no limit
swap            2.0 GiB, 0 B used
/dev/shm        8.0 GiB, 8.0 GiB free
limits          open files 65536, locked memory 8.0 MiB, virtual memory unlimited
clock           tsc
interface eth0  up, 10000 Mbit/s: 10.0.0.1, fe80::1
interface eth1  down: no address
interface lo    up: 127.0.0.1, ::1
gloo            yes: a group forms
gloo here       yes: a group forms
shared memory   yes: memfd
nccl            no: torch is built without it
fabric          no InfiniBand or RoCE device
meeting port    29500 free; ephemeral ports 32768 to 60999
environment
  RANK=0
nothing is wrong"""


def test_a_host() -> None:
    assert "\n".join(report_lines(REPORT)) == TEXT


def test_what_is_wrong_comes_last() -> None:
    findings = (Finding(what="no", remedy="yes", fatal=True), Finding(what="hm", remedy="well"))
    lines = list(report_lines(replace(REPORT, environment=(), findings=findings)))
    assert lines[-5:] == [
        "environment: nothing that matters is set", "unusable: no", "  try: yes", "warning: hm", "  try: well",
    ]  # fmt: skip


def test_what_is_not_known() -> None:
    report = replace(
        REPORT, host_address="", ephemeral=None, clock="",
        versions=replace(REPORT.versions, torch="", build=""),
        processor=replace(REPORT.processor, model="", capability="", quota=1.5),
        memory=replace(REPORT.memory, total=None, limit=512 << 20),
        shm=replace(REPORT.shm, size=None, free=None), limits=replace(REPORT.limits, open_files=None, virtual=1 << 10),
    )  # fmt: skip
    shown = {line[:14].rstrip(): line[16:] for line in report_lines(report)}
    assert shown["host"] == "node1 (no address)"
    assert shown["torch"] == "none"
    assert shown["processor"] == "unknown (x86_64), unknown"
    assert shown["cores"] == "8, 4 usable, a quota of 1.5; torch takes 4 threads"
    assert shown["memory"] == "unknown, 8.0 GiB available, a limit of 512.0 MiB"
    assert shown["/dev/shm"] == "missing"
    assert shown["limits"] == "open files unlimited, locked memory 8.0 MiB, virtual memory 1.0 KiB"
    assert (shown["clock"], shown["meeting port"]) == ("unknown", "29500 free")


ACROSS = Across(
    hosts=("a", "b", "c"),
    own="a",
    port=29500,
    reports=(
        said("a", replace(good("b"), rate=11.7e6, delay=2.14e-4), Way(to="c", meeting=Reach.SILENT)),
        said("b", replace(good("a"), rate=4.321e6), replace(good("c"), ephemeral=Reach.REFUSED)),
    ),
    findings=(Finding(what="c", remedy="start it", fatal=True),),
)
TABLE = """\
rate and delay of one TCP stream, from the host of a row to that of a column; port 29500
                      a                     b                         c
a                     -  93.6 Mbit/s, 0.21 ms                 no answer
b  34.6 Mbit/s, 1.00 ms                     -  ephemeral ports: refused
c             not known             not known                         -
clock of b: +10.00 ms, give or take 1.00 ms
a: python 3.11.7, torch 2.13.0+cpu, shoal 0.1.0
b: python 3.11.7, torch 2.13.0+cpu, shoal 0.1.0
unusable: c
  try: start it"""


def test_several_hosts() -> None:
    assert "\n".join(across_lines(ACROSS)) == TABLE
    assert list(across_lines(replace(ACROSS, own="b"))) == [
        "b: the table is printed on a", "unusable: c", "  try: start it",
    ]  # fmt: skip
