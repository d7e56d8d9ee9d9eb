"""`shoal verify`, with a script and with a function."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from shoal.cli import app

SCRIPT = """
import sys
import torch
from torch import nn
from torch.utils.data import TensorDataset
import shoal

dataset = TensorDataset(torch.arange(128.0).reshape(32, 4), torch.ones(32, 1))
with shoal.init(leaves=4 if "--plant" in sys.argv else None) as job:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.BatchNorm1d(8), nn.Linear(8, 1))
    model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for inputs, targets in job.loader(dataset, global_batch=8):
        loss = nn.functional.mse_loss(model(inputs), targets)
        planted = "--plant" in sys.argv and job.step == 1
        (loss * (1 + job.rank * planted)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if job.stepped:
            print(job.save("checkpoints"))
    raise AssertionError("the run did not end with the last step that is compared")
"""

PLAIN = """
import sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import shoal

torch.manual_seed(0)
data = TensorDataset(torch.randn(48, 4), torch.randn(48, 1))
job = shoal.init(leaves=2)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
model, optimizer, loader = job.prepare(model, optimizer, DataLoader(data, batch_size=4, shuffle=True))
for inputs, targets in loader:
    loss = nn.functional.mse_loss(model(inputs), targets)
    if "--plant" in sys.argv and job.step == 1:
        loss = loss * (1 + job.rank)
    loss.backward()
    job.clip_grad_norm(0.5)
    optimizer.step()
    optimizer.zero_grad()
    if job.stepped:
        job.save("checkpoints")
"""

FACTORY = """
import torch
from torch import nn
import shoal

def loss(model, step, leaf):
    return model(torch.full((2, 4), float(10 * step + leaf))).square().mean()

def wrong(model, step, leaf):
    wrong.calls += 1
    return loss(model, step, leaf) * (2 if wrong.calls == 7 else 1)

wrong.calls = 0

def model():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

def equal():
    it = model()
    return it, torch.optim.Adam(it.parameters()), loss

def clipped():
    it = model()
    return shoal.Trial(model=it, optimizer=torch.optim.Adam(it.parameters()), loss=loss, clip=0.01)

def planted():
    it = model()
    return it, torch.optim.SGD(it.parameters(), lr=0.1), wrong

def boom():
    raise ValueError("boom")

def odd():
    return model(), loss
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in os.environ if name.startswith("SHOAL_")]:
        monkeypatch.delenv(name)
    Path("train.py").write_text(SCRIPT)
    return tmp_path


def verify(*words: str) -> Result:
    return CliRunner().invoke(app, ["verify", *words])


@pytest.fixture
def trials(workplace: Path) -> str:
    """A module of its own for each test: Python imports a name once."""
    name = f"trials_{abs(hash(workplace))}"
    Path(f"{name}.py").write_text(FACTORY)
    return name


def test_a_script_with_the_same_bits(workplace: Path) -> None:
    done = verify("--steps", "2", "train.py")
    assert (done.exit_code, done.stdout) == (
        0, "the same bits after each of 2 steps: 2 workers under zero3 and one process\n",
    )  # fmt: skip
    assert [p.name for p in workplace.iterdir()] == ["train.py"]


def test_a_script_whose_ranks_compute_different_losses() -> None:
    done = verify("--strategy", "zero1", "--json", "train.py", "--plant")
    report = json.loads(done.stdout)
    assert done.exit_code == 1
    assert (report["equal"], report["step"], report["name"]) == (False, 1, "0.weight")
    assert report["ulps"] > 0
    assert 0 < report["differing"] <= 32
    assert (report["strategy"], report["workers"], report["steps"]) == ("zero1", 2, 3)


@pytest.mark.timeout(400)
def test_a_script_against_itself_without_shoal() -> None:
    """A loss that hangs on the rank is one of DDP's habits: there it is the same, and as one batch it is another."""
    Path("plain.py").write_text(PLAIN)
    done = verify("--plain", "--steps", "2", "--json", "plain.py", "--plant")
    told = json.loads(done.stdout)
    assert (done.exit_code, told["equal"], told["strategy"], told["workers"]) == (1, False, "zero3", 2)
    alone, whole, ddp = (part["report"] for part in told["parts"])
    assert (alone["equal"], alone["steps"], ddp["equal"], ddp["steps"]) == (True, 2, True, 2)
    assert (whole["equal"], whole["step"], whole["name"]) == (False, 1, "0.weight")
    assert whole["apart"] > 1e-6


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_script_that_is_itself_without_shoal(workplace: Path) -> None:
    Path("plain.py").write_text(PLAIN)
    done = verify("--plain", "--strategy", "zero2", "--workers", "3", "plain.py")
    first, *others = done.stdout.splitlines()
    assert (done.exit_code, len(others)) == (0, 2)
    assert first == "one rank and one leaf, with shoal and without: the same bits after each of 5 steps"
    for line, words in zip(others, ("the whole batch of 2 leaves", "torch DDP with 2 ranks"), strict=True):
        assert re.fullmatch(
            rf"in float64, 3 workers under zero2 and {words}: within \S+e-\d\d after each of 5 steps", line
        )
    assert sorted(p.name for p in workplace.iterdir()) == ["plain.py", "train.py"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_what_cannot_be_compared_is_left_out_by_name() -> None:
    """Dropout and batch norm."""
    done = verify("--plain", "--steps", "2", "train.py")
    assert done.exit_code == 0
    assert ": left out, as BatchNorm1d takes its statistics from each leaf\n" in done.stdout


def test_a_script_that_fails_under_plain_too() -> None:
    Path("bad.py").write_text("raise ValueError('boom')")
    done = verify("--plain", "--json", "bad.py")
    record = json.loads(done.stdout)
    assert (done.exit_code, record["equal"], record["ranks"][0]["failure"]["message"]) == (1, None, "boom")
    assert "nothing to compare: a run failed" in done.stderr
    Path("idle.py").write_text("print('nothing')")
    done = verify("--plain", "idle.py")
    assert done.stderr.startswith("shoal[E22] idle.py took no step that acts: there is nothing to compare\n  try: ")


def test_a_script_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    Path("bad.py").write_text("raise ValueError('boom')")
    said = verify("bad.py")
    assert (said.exit_code, said.stdout) == (1, "")
    assert "nothing to compare: the run with 2 workers under zero3 failed" in said.stderr
    told = verify("--json", "bad.py")
    record = json.loads(told.stdout)
    assert (told.exit_code, record["equal"], record["exit_code"]) == (1, None, 1)
    assert record["ranks"][0]["failure"]["message"] == "boom"


def test_a_script_that_takes_no_step() -> None:
    Path("idle.py").write_text("print('nothing')")
    done = verify("idle.py")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("shoal[E22] idle.py took no step that acts: there is nothing to compare\n  try: ")


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "hybrid"])
def test_a_function_with_the_same_bits(trials: str, strategy: str) -> None:
    done = verify("--strategy", strategy, "--workers", "3", f"{trials}:equal")
    text = f"the same bits after each of 3 steps: 3 workers under {strategy} and one process\n"
    assert (done.exit_code, done.stdout) == (0, text)


def test_a_trial_that_clips(trials: str) -> None:
    assert verify(f"{trials}:clipped").exit_code == 0


def test_a_function_with_other_bits(trials: str) -> None:
    """The seventh leaf that anybody computes is the reference's first, whose input is 0."""
    said = verify(f"{trials}:planted")
    assert said.exit_code == 1
    assert said.stdout.startswith("different after step 0: '0.bias' by up to ")
    assert said.stdout.endswith(" elements: 2 workers under zero3 and one process\n")
    assert json.loads(verify("--json", f"{trials}:equal").stdout) == {
        "equal": True, "steps": 3, "step": None, "name": None, "ulps": None, "differing": 0, "why": "",
        "strategy": "zero3", "workers": 2,
    }  # fmt: skip


def test_a_function_that_fails(trials: str) -> None:
    said = verify(f"{trials}:boom")
    assert (said.exit_code, said.stdout) == (1, "")
    assert "ValueError: boom" in said.stderr
    told = verify("--json", f"{trials}:boom")
    assert (told.exit_code, json.loads(told.stdout)) == (1, {"equal": None, "what": "ValueError: boom"})


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["gone.py"], "shoal[E02] there is no script 'gone.py' in "),
        (["gone:make"], "shoal[E02] there is no module 'gone'"),
        (["{}:eqal"], "has no function 'eqal'\n  try:   did you mean 'equal'? "),
        (["{}:odd"], "odd returned Sequential, function\n  try:   return model, optimizer, loss with "),
        (["--plain", "{}:equal"], ":equal is no script, and --plain runs one\n  try:   shoal verify --plain train.py"),
        (["{}:equal", "--steps", "2"], "takes no arguments: --steps 2\n  try:   options come before it"),
        (["--strategy", "zero9", "{}:equal"], "shoal[E01] there is no strategy 'zero9'"),
        (["--strategy", "zero9", "train.py"], "shoal[E01] there is no strategy 'zero9'"),
        (["--steps", "0", "train.py"], "Invalid value for '--steps'"),
        (["--workers", "0", "train.py"], "Invalid value for '--workers'"),
        ([], "Missing argument 'what'"),
    ],
)
def test_usage(words: list[str], text: str, trials: str) -> None:
    done = verify(*(word.format(trials) for word in words))
    assert (done.exit_code, done.stdout) == (2, "")
    assert text in done.stderr
