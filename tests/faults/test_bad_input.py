"""What the user sees for each mistake: the class, its code, the words, and the exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import shoal
from shoal import errors
from shoal.comm.threads import run
from shoal.engine.setup import one_device
from shoal.strategy import Shard, Strategy


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Bare(nn.Module):
    """On the meta device, and nobody knows what values it should have."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(2, device="meta"))


class Bench:
    """A job that trains `net` in a world of one or more, and the mistakes one can make with it."""

    def __init__(self, strategy: object = "zero3", **settings: object) -> None:
        self.job = shoal.init(strategy, run_dir="none", device="cpu", **settings)
        self.model = nn.Sequential(nn.Linear(8, 80), nn.Tanh(), nn.Linear(80, 8))
        self.optimizer = Adam(self.model.parameters(), lr=0.1)

    def prepare(self, *others: object, **settings: object) -> Bench:
        self.job.prepare(self.model, self.optimizer, *others, **settings)
        return self

    def forward(self) -> Tensor:
        return self.model(torch.ones(2, 8)).sum()

    def step(self) -> Bench:
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self


def prepared(strategy: object = "zero3", **settings: object) -> Bench:
    return Bench(strategy, **settings).prepare()


def with_model(model: nn.Module) -> None:
    Bench().job.prepare(model, SGD(model.parameters(), lr=0.1))


def with_optimizer(optimizer: torch.optim.Optimizer) -> None:
    bench = Bench()
    bench.job.prepare(bench.model, optimizer)


def with_lbfgs() -> None:
    bench = Bench()
    bench.optimizer = LBFGS(bench.model.parameters())
    bench.prepare()


class Stream(IterableDataset[int]):
    def __iter__(self):
        yield 1


def loader(**settings: object) -> DataLoader[object]:
    return DataLoader(TensorDataset(torch.ones(8, 8)), **settings)


def saved(**settings: object) -> Path:
    return prepared(**settings).step().job.save("here")


def go_on(change: Callable[[Path], object], bench: Callable[[], Bench] = prepared) -> None:
    change(saved())
    bench().job.load("here")


def other_model() -> Bench:
    bench = Bench()
    bench.model = nn.Sequential(nn.Linear(8, 81), nn.Tanh(), nn.Linear(81, 8))
    bench.optimizer = Adam(bench.model.parameters())
    return bench.prepare()


def other_groups() -> Bench:
    bench = Bench()
    bench.optimizer = Adam([{"params": [p]} for p in bench.model.parameters()])
    return bench.prepare()


def other_optimizer() -> Bench:
    bench = Bench()
    bench.optimizer = SGD(bench.model.parameters(), lr=0.1)
    return bench.prepare()


def flip(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def truncate(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4])


def in_mid_step(what: Callable[[Bench], object]) -> None:
    bench = prepared(leaves=2)
    bench.step()
    what(bench)


Mistake = tuple[Callable[[], object], type[errors.ShoalError], str]

CONFIGURATION: dict[str, Mistake] = {
    "strategy name": (lambda: Bench("zero4"), errors.StrategyError, "no strategy 'zero4'|did you mean 'zero"),
    "strategy shape": (
        lambda: Strategy(shard=Shard.NOTHING, ranks_per_copy=2),
        errors.StrategyError,
        "ranks_per_copy=2 but nothing is sharded|shard=Shard.OPTIMIZER or more, or ranks_per_copy=1",
    ),
    "no ranks": (lambda: Strategy(ranks_per_copy=0), errors.StrategyError, "ranks_per_copy=0|at least 1"),
    "no leaves": (lambda: Strategy(leaves=0), errors.StrategyError, "leaves=0: a step has at least one leaf"),
    "precision": (lambda: Strategy(precision="fp16"), errors.StrategyError, "precision='fp16'|bfloat16"),
    "grid": (
        lambda: Bench("zero3", ranks_per_copy=3),
        errors.StrategyError,
        "a world of 1 ranks does not divide into copies of 3|ranks_per_copy=1, or a world that is a multiple of 3",
    ),
    "setting's value": (lambda: Bench(leaves=0), errors.SettingError, "leaves=0|at least 1"),
    "timeout": (lambda: Bench(timeout=-1.0), errors.SettingError, "timeout=-1.0|more than 0"),
    "global batch": (
        lambda: Bench(leaves=4).job.loader(TensorDataset(torch.ones(8)), global_batch=10),
        errors.BatchError,
        "global_batch=10 does not divide into leaves=4 equal micro-batches|global_batch=8 or 12",
    ),
    "iterable data": (
        lambda: Bench().job.loader(Stream(), global_batch=4),
        errors.BatchError,
        "IterableDataset, whose samples have no numbers|map-style",
    ),
    "no batches": (lambda: Bench().prepare(loader(batch_size=None)), errors.BatchError, "batch_size=None|batch_size"),
    "SyncBatchNorm": (
        lambda: with_model(nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2))),
        errors.ModelError,
        "'1' is a SyncBatchNorm, which mixes samples of several ranks|BatchNorm",
    ),
    "sparse gradients": (
        lambda: with_model(nn.Sequential(nn.Embedding(4, 2, sparse=True))),
        errors.ModelError,
        "'0' makes sparse gradients|sparse=False",
    ),
    "meta": (
        lambda: with_model(Bare()),
        errors.ModelError,
        "is on the meta device and has no reset_parameters()|prepare(..., fill=function)",
    ),
    "several devices": (
        lambda: one_device({"a": "cuda:0", "b": "cuda:0", "c": "cuda:1"}, 1),
        errors.ModelError,
        "the model lies on 2 devices: 'a' on cuda:0, 'c' on cuda:1|pipeline|torch.distributed.pipelining",
    ),
    "device of many ranks": (
        lambda: one_device({"a": "cuda:0"}, 2),
        errors.ModelError,
        "the model is on cuda:0, and ranks exchange through host memory only|model.to('cpu'), or a world of one",
    ),
    "units": (lambda: Bench().prepare(units=["2x"]), errors.ModelError, "'2x', which is no module"),
    "another model's optimizer": (
        lambda: with_optimizer(Adam(nn.Linear(3, 5).parameters())),
        errors.OptimizerError,
        "2 parameters that the model does not have; the first has shape (5, 3)|model.parameters()",
    ),
    "no optimizer": (
        lambda: (bench := Bench()).job.prepare(bench.model),
        errors.OptimizerError,
        "given a model and no optimizer|job.prepare(model, optimizer); to evaluate a checkpoint",
    ),
    "LBFGS": (with_lbfgs, errors.OptimizerError, "LBFGS evaluates its closure several times a step|torch.optim.AdamW"),
    "closure": (
        lambda: prepared().optimizer.step(lambda: 1.0),
        errors.OptimizerError,
        "optimizer.step(closure)|loss.backward() first, then optimizer.step()",
    ),
}

PROGRAM: dict[str, Mistake] = {
    "prepare twice": (lambda: prepared().prepare(), errors.OrderError, "prepare was called twice|name="),
    "clip before prepare": (lambda: Bench().job.clip_grad_norm(1.0), errors.OrderError, "no model yet|job.prepare("),
    "save before prepare": (lambda: Bench().job.save("x"), errors.OrderError, "no model yet|job.prepare("),
    "load before prepare": (lambda: Bench().job.load("x"), errors.OrderError, "no model yet|job.prepare("),
    "weight before prepare": (lambda: Bench().job.weight(1, full=1), errors.OrderError, "no model yet|job.prepare("),
    "state before prepare": (lambda: Bench().job.state_dict(nn.Linear(1, 1)), errors.OrderError, "no model yet"),
    "a strange model": (
        lambda: prepared().job.state_dict(nn.Linear(1, 1)),
        errors.OrderError,
        "this Linear was not prepared by this job|pass the prepared model",
    ),
    "load after a step": (
        lambda: prepared().step().job.load("x"),
        errors.OrderError,
        "job.load after training has begun|load right after prepare",
    ),
    "save in mid-step": (
        lambda: in_mid_step(lambda b: b.job.save("x")),
        errors.OrderError,
        "job.save in the middle of a step|when job.stepped is True",
    ),
    "state in mid-step": (
        lambda: in_mid_step(lambda b: b.job.state_dict(b.model)),
        errors.OrderError,
        "job.state_dict in the middle of a step",
    ),
    "whole in mid-leaf": (
        lambda: (bench := prepared(), bench.forward(), bench.job.whole(bench.model).__enter__()),
        errors.OrderError,
        "job.whole in the middle of a leaf|before forward or after optimizer.step()",
    ),
    "weight": (lambda: prepared().job.weight(1, full=0), errors.OrderError, "job.weight(1, full=0)|full > 0"),
    "weight after backward": (
        lambda: (bench := prepared(), bench.forward().backward(), bench.job.weight(1, full=2)),
        errors.OrderError,
        "came after backward|call job.weight before loss.backward()",
    ),
}

CHECKPOINTS: dict[str, Mistake] = {
    "nothing there": (lambda: prepared().job.load("x"), errors.CheckpointError, "there is no checkpoint at x"),
    "empty": (
        lambda: (Path("x").mkdir(), prepared().job.load("x")),
        errors.CheckpointError,
        "there is no checkpoint in x: looked for|it holds nothing",
    ),
    "flipped": (lambda: go_on(flip), errors.DamagedError, "is flipped|digest"),
    "truncated": (lambda: go_on(truncate), errors.DamagedError, "is truncated: |bytes"),
    "a file is missing": (
        lambda: go_on(lambda p: next(p.glob("*.safetensors")).unlink()),
        errors.DamagedError,
        "is missing|it holds",
    ),
    "no manifest": (
        lambda: (saved() / "manifest.json").unlink() or prepared().job.load("here/step-1"),
        errors.DamagedError,
        "manifest.json is missing",
    ),
    "another model": (
        lambda: go_on(lambda _: None, other_model),
        errors.ResumeError,
        "of another shape: 0.weight ((80, 8) there, (81, 8) here)",
    ),
    "other groups": (
        lambda: go_on(lambda _: None, other_groups),
        errors.ResumeError,
        "the optimizer has groups of [1, 1, 1, 1] parameters, the checkpoint [4]",
    ),
    "another optimizer": (
        lambda: go_on(lambda _: None, other_optimizer),
        errors.ResumeError,
        "saved with Adam, this job has SGD|use Adam",
    ),
    "leaves": (
        lambda: go_on(lambda _: None, lambda: prepared(leaves=2)),
        errors.ResumeError,
        "made with leaves=1, this job has leaves=2 (code)|leaves=1, or leave leaves out",
    ),
    "seed": (
        lambda: go_on(lambda _: None, lambda: prepared(seed=5)),
        errors.ResumeError,
        "made with seed=0, this job has seed=5 (code)",
    ),
    "saved by two jobs": (
        lambda: (prepared().step().job.save("here"), prepared().step().job.save("here")),
        errors.SaveError,
        "here/step-1 was not saved: rank 0: here/step-1 is there already|another directory",
    ),
    "not a directory": (
        lambda: (Path("file").touch(), prepared().step().job.save("file")),
        errors.SaveError,
        "file/step-1 was not saved: rank 0: |older checkpoints are as they were",
    ),
}


def with_gradients(what: Callable[[Bench], object]) -> None:
    bench = prepared()
    bench.forward().backward()
    what(bench)


def silent_write() -> None:
    bench = prepared()
    bench.model[0].weight.data.fill_(1.0)
    bench.forward()


def after_the_end() -> None:
    bench = prepared()
    with bench.job:
        bench.step()
    bench.model.eval()(torch.ones(2, 8))


AWAY: dict[str, Mistake] = {
    "state of the model": (
        lambda: prepared().model.state_dict(),
        errors.AwayError,
        "model.state_dict() would hold placeholders|on all ranks, job.state_dict(model) or `with job.whole(model): ...`",
    ),
    "state of the optimizer": (
        lambda: prepared().optimizer.state_dict(),
        errors.AwayError,
        "optimizer.state_dict() would hold only this rank's pieces|on all ranks, job.state_dict(optimizer) or job.save(path)",
    ),
    "torch's own clipping": (
        lambda: with_gradients(lambda b: nn.utils.clip_grad_norm_(b.model.parameters(), 1.0)),
        errors.AwayError,
        "the gradient of '0.weight' is not a whole tensor of this rank|job.clip_grad_norm(max_norm)",
    ),
    "reading a gradient": (
        lambda: with_gradients(lambda b: b.model[2].bias.grad.sum()),
        errors.AwayError,
        "the gradient of '2.bias' is not a whole tensor of this rank",
    ),
    "writing a parameter": (
        silent_write,
        errors.AwayError,
        "something wrote to '0.weight' while it was not on this rank|with job.whole(model, write=True)",
    ),
    "after the end": (after_the_end, errors.OrderError, "the job is closed|before job.close()"),
}
EXIT_CODES = [(CONFIGURATION, 2), (PROGRAM, 1), (CHECKPOINTS, 4), (AWAY, 1)]
TABLE = {name: (*mistake, code) for mistakes, code in EXIT_CODES for name, mistake in mistakes.items()}


@pytest.mark.parametrize("name", TABLE)
def test_a_mistake_is_named(name: str) -> None:
    mistake, kind, words, code = TABLE[name]
    with pytest.raises(errors.ShoalError) as caught:
        run(2 if name in AWAY else 1, lambda _rank: mistake())
    error = caught.value
    assert type(error) is kind
    assert error.exit_code == code
    assert str(error).startswith(f"shoal[{kind.code}] ")
    for word in words.split("|"):
        assert word in str(error)


# ---------------------------------------------------------------- from the command line

SHOAL = [sys.executable, "-c", "from shoal.cli import main; main()"]


@pytest.mark.parametrize(
    ("words", "environ", "toml", "text"),
    [
        (["run", "gone.py"], {}, "", "shoal[E02] there is no script 'gone.py' in "),
        (["run", "--workers", "0", "train.py"], {}, "", "shoal[E02] workers=0: a job has at least one worker\n"),
        (["run", "--strategy", "zero4", "train.py"], {}, "", "shoal[E01] there is no strategy 'zero4'\n"),
        (["run", "--set", "leafs=2", "train.py"], {}, "", "shoal[E02] unknown setting 'leafs' (flag --set leafs)\n"),
        (["run", "--set", "cut=odd", "train.py"], {}, "", "shoal[E02] cut='odd' (flag --set cut) does not fit\n"),
        (["run", "train.py"], {"SHOAL_LEAFS": "2"}, "", "shoal[E02] unknown environment variable SHOAL_LEAFS\n"),
        (["run", "train.py"], {"SHOAL_SEED": "x"}, "", "shoal[E02] seed='x' (environment SHOAL_SEED) does not fit\n"),
        (["run", "train.py"], {}, "version = 1\n[job]\nleafs = 2", "shoal[E02] unknown setting 'leafs' (shoal.toml)\n"),
        (["run", "train.py"], {}, "[job]\nseed = 2", "shoal[E02] shoal.toml has no version\n"),
        (["run", "--wrokers", "2", "train.py"], {}, "", "No such option: --wrokers"),
        (["rum", "train.py"], {}, "", "No such command 'rum'."),
        (["run", "--workers", "two", "train.py"], {}, "", "Invalid value for '--workers': "),
    ],
)
def test_mistakes_before_anything_starts(words: list[str], environ: dict[str, str], toml: str, text: str) -> None:
    Path("train.py").write_text("open('ran', 'w')")
    if toml:
        Path("shoal.toml").write_text(toml)
    base = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
    done = subprocess.run([*SHOAL, *words], env=base | environ, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path("ran").exists()


IMPOSSIBLE = """
import shoal
shoal.init("zero3", ranks_per_copy=3, run_dir="none")
"""


def test_a_mistake_that_every_rank_makes() -> None:
    """It is told once, by its own traceback, with its own exit code."""
    Path("train.py").write_text(IMPOSSIBLE)
    command = [*SHOAL, "run", "--run-dir", "none", "--workers", "2", "train.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    what = "shoal.errors.StrategyError: shoal[E01] a world of 2 ranks does not divide into copies of 3\n"
    assert what + "  try:   ranks_per_copy=2, or a world that is a multiple of 3\n" in done.stderr
    assert done.stderr.count("Traceback") == 1
