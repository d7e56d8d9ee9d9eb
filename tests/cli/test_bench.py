"""`shoal bench`: real runs of a tiny script, and the arithmetic of a card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from shoal.bench.card import Card, make_card, pace, qualities, skew
from shoal.bench.record import Bytes, Heard, Record, Step, Value
from shoal.bench.text import show
from shoal.bench.traffic import formula
from shoal.cli import app
from shoal.strategy import Shard

SCRIPT = """
import sys, time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import shoal

dataset = TensorDataset(torch.arange(192.0).reshape(48, 4) / 192, torch.ones(48, 1))
with shoal.init("zero3", seed=3) as job:
    model = nn.Sequential(nn.Linear(4, 512), nn.Dropout(0.1), nn.BatchNorm1d(512), nn.Linear(512, 1))
    model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.001))
    for epoch in range(2):
        for inputs, targets in job.loader(dataset, global_batch=8):
            if "--sleep" in sys.argv and job.rank == 1:
                time.sleep(0.2)
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            job.log(loss=job.mean(loss.detach()), tokens=64)
        found = job.evaluate(model, DataLoader(dataset, batch_size=12), {"error": nn.functional.mse_loss})
        job.print(f"epoch {epoch}: {found['error']}")
    job.save("checkpoints")
"""
SHORT = SCRIPT.replace("192", "64").replace("48", "16")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SHOAL_")]:
        monkeypatch.delenv(name)
    Path("train.py").write_text(SCRIPT)
    return tmp_path


def bench(*words: str) -> Result:
    return CliRunner().invoke(app, ["bench", *words])


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The card of a whole run whose rank 1 sleeps."""
    place = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("SHOAL_CARRIER", "gloo")
        Path("train.py").write_text(SCRIPT)
        done = bench("--json", "train.py", "--sleep")
        assert done.exit_code == 0, done.stderr
        assert [p.name for p in place.iterdir()] == ["train.py"]
    return json.loads(done.stdout)


@pytest.mark.timeout(300)
def test_a_rank_that_sleeps_is_the_slowest_and_the_other_one_waits(told: dict[str, Any]) -> None:
    alone, first, second = told["ranks"]
    assert (told["slowest"], told["strategy"], told["workers"], told["leaves"]) == (1, "zero3", 2, 2)
    assert 0.2 <= second["computing"] < told["many"]["p90"]
    assert told["apart"] > 0.1
    assert first["waiting"] > 0.1
    assert 0.1 < first["longest"] < 60
    assert alone["waiting"] == 0
    assert told["speed_up"] == pytest.approx(told["one"]["median"] / told["many"]["median"])
    assert told["efficiency"] == pytest.approx(told["speed_up"] / 2)
    assert told["many"]["median"] >= 0.2


@pytest.mark.timeout(300)
def test_both_runs_have_seen_the_same_samples_and_measured_the_same(told: dict[str, Any]) -> None:
    assert (told["steps_one"], told["steps_many"], told["one"]["steps"], told["one"]["aside"]) == (12, 12, 8, 1)
    assert (told["same_bits"], len(told["sha256"][0])) == (True, 64)
    error, loss = told["quality"]
    assert (error["origin"], error["name"], error["step_one"], error["same"]) == ("job.evaluate", "error", 12, True)
    assert (loss["origin"], loss["name"], loss["step_many"], loss["same"]) == ("job.log", "loss", 12, True)
    assert error["one"] == error["many"] > 0
    assert told["printed"] == f"epoch 1: {error['one']}"
    for run in (told["one"], told["many"]):
        assert run["samples"] == pytest.approx(8 / run["median"])
        assert run["tokens"] > 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_numbers_are_those_of_a_run_without_a_card(told: dict[str, Any]) -> None:
    environ = {**os.environ, "SHOAL_LEAVES": "2", "SHOAL_RUN_DIR": "none"}
    done = subprocess.run([sys.executable, "train.py"], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == told["printed"]


@pytest.mark.timeout(300)
def test_memory_and_traffic_are_those_of_the_job(told: dict[str, Any]) -> None:
    parameters = 4 * (4 * 512 + 512 + 2 * 512 + 512 + 1)
    alone, *several = told["ranks"]
    assert [rank["rank"] for rank in several] == [0, 1]
    assert (alone["sent"], alone["formula"]) == (0, 0)
    for rank in several:
        assert rank["formula"] == 1.5 * parameters
        assert 0.8 * rank["formula"] < rank["sent"] <= rank["formula"]  # the unit stays from forward to backward
        memory = rank["memory"]
        assert 0 <= rank["starved"] < 1
        assert 0 <= memory["exchange"] < memory["rest"] <= memory["most"]
        assert 50 * 2**20 < memory["before"] <= memory["peak"] < 2**33
        assert 0 < memory["share"] <= memory["peak"]


@pytest.mark.timeout(300)
def test_a_run_ends_after_the_steps_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CARRIER", "gloo")
    done = bench("--steps", "5", "--strategy", "zero1", "--leaves", "4", "train.py")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "train.py: 2 workers under zero1 against one; 4 leaves a step, cpu"
    assert "  of 2 steps; the first 3 are left out" in lines
    assert any(line.startswith("quality after 5 steps") for line in lines)
    sums = next(line.split() for line in lines if line.startswith("sha256"))
    assert sums[4] == sums[5]
    assert sums[-2:] == ["same", "bits"]
    assert "  no held-out metric: job.evaluate was not called before the runs ended" in lines
    assert "  failures: none; restarts: none" in lines
    for rank in range(2):
        assert [line.split()[-4:] for line in lines if line.startswith(f"rank {rank} of 2")][1] == ["0.02", "MiB"] * 2


def test_a_script_that_fails() -> None:
    Path("bad.py").write_text("import os\nif os.environ['RANK'] == '1':\n    raise ValueError('boom')")
    said = bench("bad.py")
    assert (said.exit_code, said.stdout) == (1, "")
    assert said.stderr.endswith("no card: the run with 2 workers failed\n")
    record = json.loads(bench("--json", "bad.py").stdout)
    assert (record["failed"], record["exit_code"]) == ("2 workers", 1)
    assert record["ranks"][1]["failure"]["message"] == "boom"


@pytest.mark.slow
def test_a_script_that_fails_with_one_worker_only() -> None:
    Path("bad.py").write_text(f"import os\nif os.environ['WORLD_SIZE'] == '1':\n    raise ValueError('boom')\n{SCRIPT}")
    said = bench("--steps", "5", "bad.py")
    assert (said.exit_code, said.stdout) == (1, "")
    assert said.stderr.endswith("no card: the run with one worker failed\n")


def test_a_script_that_takes_no_step() -> None:
    Path("idle.py").write_text("print('nothing')")
    done = bench("idle.py")
    assert (done.exit_code, done.stdout) == (1, "")
    text = "shoal[E22] idle.py with 2 workers took no step that acts: there is nothing to measure\n  try: "
    assert text in done.stderr


def test_a_script_that_ends_too_early() -> None:
    Path("short.py").write_text(SHORT)
    done = bench("--steps", "50", "short.py")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "shoal[E22] short.py with 2 workers ended after 4 steps of 50\n  try:   fewer --steps" in done.stderr


@pytest.mark.slow
def test_a_script_that_is_too_short() -> None:
    Path("short.py").write_text(SHORT)
    done = bench("short.py")
    assert "shoal[E22] short.py with 2 workers ended after 4 steps and 5 are the least\n" in done.stderr


@pytest.mark.slow
def test_a_second_job() -> None:
    Path("two.py").write_text(SHORT + SHORT)
    done = bench("two.py")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "shoal[E22] a second job of one script\n  try:   shoal bench follows one job per script" in done.stderr


@pytest.mark.slow
def test_a_rank_without_a_job() -> None:
    leave = "for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE'):\n        del os.environ[name]"
    alone = f"import os\nif os.environ['RANK'] == '0':\n    {leave}\n    exec({SHORT!r})"
    Path("one.py").write_text(alone)
    done = bench("one.py")
    assert done.exit_code == 1
    assert "shoal[E22] one.py with 2 workers: only ranks 0 have left a record\n" in done.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["gone.py"], "shoal[E02] there is no script 'gone.py' in "),
        (
            ["--workers", "1", "train.py"],
            "shoal[E02] workers=1: shoal bench holds several workers against one\n  try: ",
        ),
        (
            ["--steps", "4", "train.py"],
            "shoal[E02] steps=4: the first 3 are left out, and two must remain\n  try:   --steps 5",
        ),
        (["--strategy", "zero9", "train.py"], "shoal[E01] there is no strategy 'zero9'"),
        (["--leaves", "0", "train.py"], "shoal[E02] leaves="),
        ([], "Missing argument 'script'"),
    ],
)
def test_usage(words: list[str], text: str) -> None:
    done = bench(*words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert text in done.stderr


# ---------------------------------------------------------------- the arithmetic


def step(seconds: float, waited: float = 0.0, *, aside: bool = False, wait: float = 0.0) -> Step:
    return Step(seconds, waited, 100, 4.0, aside, wait, "gather shard #1")


def record(
    rank: int, world: int, *steps: Step, values: tuple[Value, ...] = (), sha256: str = "ab", first: int = 0
) -> Record:
    warm = [step(9.0)] * 3
    return Record(
        rank=rank, world=world, strategy="ddp", leaves=2, device="cpu", first=first, steps=[*warm, *steps],
        values=list(values), tokens_per_second=[], formula=200.0, starved=0.2 * world - 0.1 * rank,
        sha256="" if rank else sha256, printed=["a 1", "b 2"],
        memory=Bytes(rest=2**20, exchange=2**19, most=2**21, before=2**28, peak=2**29, share=2**27, device=0),
    )  # fmt: skip


def told_by(card: Card) -> str:
    console = Console(file=StringIO(), width=110)
    for part in show(card):
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_first_steps_and_those_with_an_evaluation_do_not_count() -> None:
    found = pace([record(0, 1, *(step(s) for s in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)), step(99, aside=True))])
    assert (found.steps, found.aside, found.median, found.p90) == (10, 1, 5.5, 9)
    assert found.samples == pytest.approx(4 / 5.5)
    assert pace([record(0, 1, step(1, aside=True), step(3, aside=True))]).median == 2


def test_a_step_lasts_until_its_last_rank_is_through() -> None:
    assert pace([record(0, 2, step(1), step(4)), record(1, 2, step(2), step(3))]).median == 3


@pytest.mark.parametrize(("late", "slowest"), [(0.0, None), (0.04, None), (0.06, 1), (0.5, 1)])
def test_a_rank_is_slow_if_it_computes_longer(late: float, slowest: int | None) -> None:
    even, slow = step(1.0, 0.5), step(1.0, 0.5 - late)
    apart, found = skew([record(0, 2, even, even), record(1, 2, slow, slow)])
    assert (found, apart) == (slowest, pytest.approx(late))


def test_what_was_measured() -> None:
    mean, loss = Value("job.mean", "", 4, 0.5), Value("job.log", "loss", 4, 0.5)
    early, late, again = (Value("job.evaluate", "accuracy", n, v) for n, v in ((2, 0.1), (4, 0.2), (4, 0.9)))
    found = list(qualities([mean, early, loss, late, again], [mean, early, loss, late._replace(value=0.3), again]))
    assert [(q.name, q.one, q.many, q.same) for q in found] == [
        ("accuracy", 0.2, 0.3, False), ("accuracy (call 2)", 0.9, 0.9, True), ("loss", 0.5, 0.5, True),
    ]  # fmt: skip
    nan = mean._replace(value=float("nan"))
    assert [(q.origin, q.same) for q in qualities([nan], [nan])] == [("job.mean", True)]
    (lost,) = qualities([late], [])
    assert (lost.one, lost.many, lost.step_many, lost.same) == (0.2, None, None, False)


def test_a_record_survives_its_file() -> None:
    before = record(0, 1, step(1), values=(Value("job.mean", "", 1, float("inf")),))
    assert Record.model_validate_json(before.model_dump_json()) == before


def test_a_card_says_what_is_wrong() -> None:
    one = [record(0, 1, step(1), step(1), step(1), first=7)]
    many = [record(r, 2, step(2, r, wait=1.5), step(2, r), sha256="cd", first=7) for r in range(2)]
    text = told_by(make_card("train.py", one, many, processors=1))
    assert "not at equal samples: 6 steps with one worker, 5 with several" in text
    assert "  2 workers share 1 processors here" in text
    assert "  skew: rank 0 is the slowest; ranks' computing is 1,000 ms apart in a step (median)" in text
    assert "  the longest wait: 1,500 ms, rank 0 in step 11 ('gather shard #1')" in text
    assert "both went on from step 7 of a checkpoint" in text
    assert "  processors are busy: rank 0 waited for one 40 % of its time in the run with 2 workers" in text
    assert next(line.split()[-3:] for line in text.splitlines() if line.startswith("sha256")) == [
        "ab...",
        "cd...",
        "differs",
    ]
    assert "  the last line that both printed: b 2" in text
    assert "less than by formula" in text


def test_the_last_lines_with_a_number() -> None:
    out = StringIO()
    heard = Heard(out)
    print("epoch 1", "done", file=heard)  # type: ignore[call-overload]
    print("no number", file=heard)  # type: ignore[call-overload]
    heard.write("half 2")
    assert (list(heard.lines), out.getvalue()) == (["epoch 1 done"], "epoch 1 done\nno number\nhalf 2")
    heard.write(" whole\n")
    assert heard.lines[-1] == "half 2 whole"


@pytest.mark.parametrize(
    ("shard", "copies", "per_copy", "turns", "bytes_"),
    [
        (Shard.NOTHING, 4, 1, 2, 1.5), (Shard.OPTIMIZER, 1, 4, 2, 1.5), (Shard.GRADIENTS, 1, 4, 1, 1.5),
        (Shard.GRADIENTS, 1, 4, 2, 2.25), (Shard.PARAMETERS, 1, 4, 1, 2.25), (Shard.PARAMETERS, 2, 2, 1, 2.0), (Shard.PARAMETERS, 1, 4, 2, 4.5),
        (Shard.PARAMETERS, 1, 1, 4, 0.0),
    ],
)  # fmt: skip
def test_formulas(shard: Shard, copies: int, per_copy: int, turns: int, bytes_: float) -> None:
    sent = formula(shard, copies=copies, per_copy=per_copy, turns=turns, parameters=1000, gradients=1000)
    assert sent == pytest.approx(1000 * bytes_)
