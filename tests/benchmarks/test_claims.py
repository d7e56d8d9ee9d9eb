"""The claims from their command line, small; the page against what they say; the hosts with models that mean nothing."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS, PAGE = ROOT / "benchmarks", ROOT / "docs" / "claims.md"
NAMES = ("claims", "claims_counted", "claims_hosts", "claims_timed", "claims_trained", "contenders", "finding",
         "formulas", "hosts_run", "measure", "models", "networks", "resnet50", "visit")  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    """The scripts' modules, which import each other by their plain names."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # torch's own, of its TorchScript
            yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in NAMES:
            sys.modules.pop(name, None)


def ran(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / "claims.py", "--quick", *options]
    return subprocess.run(
        command, env=os.environ | {"SHOAL_LEAVES": "nonsense"}, capture_output=True, text=True, timeout=110
    )


@pytest.mark.slow
def test_the_page_has_the_exact_numbers(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    """Of every claim but those about time, each of which is false."""
    file = tmp_path / "claims.json"
    claims = [*bench["claims_counted"].CLAIMS, *bench["claims_trained"].CLAIMS]
    done = ran("--json", str(file), "--only", *(claim.name for claim in claims))
    assert done.returncode == 0, done.stderr
    lines = json.loads(file.read_text())
    assert all(set(line) == {"bench", "case", "metric", "value", "unit"} for line in lines)
    verdicts = {line["case"]: line["value"] for line in lines if line["metric"] == "holds"}
    assert verdicts == {claim.name: 0 for claim in claims}

    text, finding = PAGE.read_text(), bench["finding"]
    exact = [line for line in lines if line["unit"] in finding.EXACT]
    assert len(exact) > 25
    for line in exact:
        name, _, case = line["case"].partition(": ")
        (claim,) = (c for c in claims if c.name == name)
        part = text.partition(f"\n{bench['claims'].found_under(claim)}\n")[2].partition("\n## ")[0]
        seen = finding.Seen(case=case, metric=line["metric"], value=line["value"], unit=line["unit"])
        assert str(seen) in part.splitlines(), f"docs/claims.md, {claim.words}: run benchmarks/claims.py --page"


@pytest.mark.slow
def test_claims_about_time_are_judged(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    file, page = tmp_path / "claims.json", tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    claims = bench["claims_timed"].CLAIMS
    done = ran("--json", str(file), "--page", str(page), "--only", *(claim.name for claim in claims))
    assert done.returncode == 0, done.stderr
    lines = json.loads(file.read_text())
    assert {line["case"] for line in lines if line["metric"] == "holds"} == {claim.name for claim in claims}
    assert all(line["value"] > 0 for line in lines if line["metric"] != "holds")
    headings = [[row for row in t.splitlines() if row[:4] == '## "'] for t in (PAGE.read_text(), page.read_text())]
    every = [bench["claims"].found_under(claim) for claim in bench["claims"].CLAIMS]
    assert headings == [every, every]


def test_a_part_of_the_page_is_rewritten_and_the_rest_stays(bench: dict[str, ModuleType]) -> None:
    claims = bench["claims"]
    first, second, third = (claims.found_under(claim) for claim in claims.CLAIMS[:3])
    page = f"Words.\n\n{claims.MARKER}\n\n{first}\n\nOld.\n\n{third}\n\nThird.\n"
    new = claims.rewrite(page, {second: f"{second}\n\nNew.\n"})
    assert new == f"Words.\n\n{claims.MARKER}\n\n{first}\n\nOld.\n\n{second}\n\nNew.\n\n{third}\n\nThird.\n"
    assert claims.rewrite(new, {first: f"{first}\n\nNew.\n"}) == new.replace("Old", "New")


def test_resnet_50_is_the_papers(bench: dict[str, ModuleType]) -> None:
    with torch.device("meta"):
        model = bench["resnet50"].ResNet50()
        scores = model(torch.empty(2, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    assert scores.shape == (2, 1000)


def test_recomputing_changes_no_gradient(bench: dict[str, ModuleType]) -> None:
    run, hosts = bench["hosts_run"], bench["claims_hosts"]
    work = hosts.QUICK[1].work
    found: list[list[torch.Tensor]] = []
    for recompute in (False, True):
        model, _ = run.made(work, run.Plan(strategy="plain", parts=1, recompute=recompute))
        inputs, targets = work.draw(0, 0, work.samples)
        work.loss(model(inputs), targets).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_who_draws_a_sample_does_not_matter(bench: dict[str, ModuleType]) -> None:
    for course in bench["claims_hosts"].QUICK:
        whole, part = course.work.draw(3, 0, 4), course.work.draw(3, 2, 2)
        assert all(torch.equal(a[2:], b) for a, b in zip(whole, part, strict=True))


def test_the_factors_are_those_of_the_best_plans_that_fit(bench: dict[str, ModuleType]) -> None:
    run, hosts = bench["hosts_run"], bench["claims_hosts"]

    def plan(strategy: str, parts: int, recompute: bool = False) -> object:
        return run.Plan(strategy=strategy, parts=parts, recompute=recompute)

    def ran(seconds: float, peak: int) -> object:
        return run.Ran(seconds=seconds, bits="", peak=peak)

    one = {plan("plain", 4): ran(8.0, 900), plan("plain", 32): ran(10.0, 500), plan("plain", 32, True): ran(15.0, 300)}
    four = {plan("zero3", 4): ran(2.5, 400), plan("zero3", 4, True): ran(3.0, 200)}
    assert hosts.best(one, 1000) == plan("plain", 4)
    assert hosts.best(one, 499) == plan("plain", 32, True)
    assert hosts.best(one, 299) is None
    report = hosts.Report()
    assert hosts.told("m", 400, one, four, (hosts.best(one, 400), hosts.best(four, 400)), report) == 6.0
    assert [seen.value for seen in report.seen] == [6.0, 4, 1.5, 1.25, 0.8]


def test_without_hosts_or_with_unknown_models_it_says_so(
    bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = bench["claims_hosts"].measured
    with pytest.raises(SystemExit, match=r"--models gpt-33n: there are resnet-50, gpt-33m"):
        measured(quick=False, names=["gpt-33n"])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match="hosts cannot be made here: network namespaces need root"):
        measured(quick=True, names=None)


@pytest.mark.system
def test_four_hosts_end_with_the_bits_of_one(tmp_path: Path) -> None:
    file = tmp_path / "hosts.json"
    done = ran("--hosts", "--models", "gpt-tiny", "--json", str(file))
    assert done.returncode == 0, done.stderr
    lines = json.loads(file.read_text())
    same = [line["value"] for line in lines if line["metric"] == "same final bits"]
    assert same == [1.0] * 6
    factors = [line["value"] for line in lines if "cap" in line["case"] and line["unit"] == "times"]
    assert factors
    for whole, *parts in (factors[i : i + 5] for i in range(0, len(factors), 5)):
        product = 1.0
        for part in parts:
            product *= part
        assert product == pytest.approx(whole)
    assert all(line["value"] > 0 for line in lines if line["metric"] in ("step", "needs", "least cap"))


@pytest.mark.system
def test_a_host_with_too_little_memory_is_told_from_a_failure(bench: dict[str, ModuleType]) -> None:
    run, hosts = bench["hosts_run"], bench["claims_hosts"]
    job = run.Job(work=hosts.QUICK[1].work, plan=run.Plan(strategy="zero3", parts=4), steps=1, patience=60.0)
    with hosts.opened(2, 1e9, 24 << 20) as made:
        assert run.ran(job, made) is None
    wrong = run.Job(work=job.work, plan=run.Plan(strategy="nonsense", parts=4), steps=1, patience=60.0)
    with (
        hosts.opened(1, 1e9, 1 << 30) as made,
        pytest.raises(run.Failed, match=r"nonsense, 4 micro-batches: rank 0 failed"),
    ):
        run.ran(wrong, made)
    silent = run.Job(work=job.work, plan=job.plan, steps=1, patience=0.01)
    with hosts.opened(1, 1e9, 1 << 30) as made, pytest.raises(run.Failed, match=r"ranks \[0\] said nothing for 0.01 s"):
        run.ran(silent, made)
