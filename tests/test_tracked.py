"""`job.track`: more state in the checkpoint."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import shoal
from shoal.comm.threads import run
from shoal.errors import OrderError, SaveError, SettingError
from shoal.tracked import decode, encode


class Own:
    """The user's own state."""

    def __init__(self, state: object = None) -> None:
        self.state = state

    def state_dict(self) -> dict[str, object]:
        return {"state": self.state}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.state = state["state"]


def job_with(
    world: int, strategy: str, body: Callable[[shoal.Job, nn.Module, torch.optim.Optimizer], object]
) -> list[object]:
    """What `body(job, model, optimizer)` returns on every rank."""

    def rank_main(_rank: int) -> object:
        with shoal.init(strategy, leaves=2, run_dir="none", device="cpu") as job:
            model = nn.Linear(4, 3)
            model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.25))
            return body(job, model, optimizer)

    return run(world, rank_main)


VALUES = [
    None, True, 3, 2**80, -0.0, math.inf, "text", [1, [2.5, None]], (1, (2, "x")), {}, {"a": {1: "int key"}},
    {(1, 2): "tuple key"}, Counter({30: 1, 80: 2}), {"deep": [{"tuple": (None,)}]},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_what_json_can_hold(value: object, tmp_path: Path) -> None:
    """Through a checkpoint, with types as they were."""

    def save(job: shoal.Job, _model: nn.Module, _optimizer: torch.optim.Optimizer) -> None:
        job.track(own=Own(value))
        job.save(tmp_path)

    def load(job: shoal.Job, _model: nn.Module, _optimizer: torch.optim.Optimizer) -> object:
        own = Own()
        job.track(own=own)
        job.load(tmp_path)
        return own.state

    job_with(1, "ddp", save)
    for found in job_with(1, "ddp", load):
        assert found == value
        assert type(found) is type(value)


def test_nan_and_arrays() -> None:
    tensors: list[tuple[str, Tensor]] = []
    state = {"nan": math.nan, "array": np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::2], "number": np.float32(1.5)}
    found = decode(encode(state, "x", tensors), dict(tensors).__getitem__)
    assert math.isnan(found["nan"])
    assert found["array"].dtype == np.int16
    assert found["array"].tolist() == [[0, 2], [3, 5]]
    assert found["number"] == 1.5


@pytest.mark.parametrize(("first", "second"), [((2, "zero3"), (3, "ddp")), ((1, "ddp"), (2, "zero3"))])
def test_schedulers_modules_and_generators_go_on(
    first: tuple[int, str], second: tuple[int, str], tmp_path: Path
) -> None:
    """At another world size, on every rank."""

    def tracked(job: shoal.Job, optimizer: torch.optim.Optimizer) -> tuple[object, nn.Module, Own]:
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3], gamma=0.5)
        ema = torch.optim.swa_utils.AveragedModel(nn.Linear(4, 3))
        own = Own(np.random.default_rng(job.rank and 5).bit_generator.state)
        job.track(scheduler=scheduler, ema=ema, own=own)
        return scheduler, ema, own

    def save(job: shoal.Job, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
        scheduler, ema, own = tracked(job, optimizer)
        for _ in range(4):
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
            scheduler.step()
        with torch.no_grad():
            ema.module.weight.fill_(7.0)
        job.save(tmp_path)
        return {"lr": optimizer.param_groups[0]["lr"], "state": scheduler.state_dict(), "own": own.state}

    def load(job: shoal.Job, _model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
        scheduler, ema, own = tracked(job, optimizer)
        own.state = None
        job.load(tmp_path)
        assert ema.module.weight.eq(7.0).all()
        return {"lr": optimizer.param_groups[0]["lr"], "state": scheduler.state_dict(), "own": own.state}

    want = job_with(*first, save)[0]
    assert job_with(*second, load) == [want] * second[0]


def test_differences_are_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Between ranks, and between a job and its checkpoint."""

    def save(job: shoal.Job, *_: object) -> None:
        job.track(own=Own(torch.tensor(job.rank)), gone=Own(1))
        job.save(tmp_path)

    def load(job: shoal.Job, *_: object) -> object:
        own, new = Own(), Own("as it was")
        job.track(own=own, new=new)
        job.load(tmp_path)
        assert new.state == "as it was"
        with pytest.raises(OrderError, match=r"job.track\(gone=...\) came after job.load[\s\S]*track, then load"):
            job.track(gone=Own())
        return int(own.state)

    job_with(2, "zero3", save)
    assert "the state of 'own' differs between rank 0 and rank 1: rank 0's is saved" in capfd.readouterr().err
    assert job_with(2, "zero3", load) == [0, 0]
    said = capfd.readouterr().err
    assert "the checkpoint has no state of 'new', which stays as it is" in said
    assert "the checkpoint has a state of 'gone', which this job does not track" in said


def test_refusals(tmp_path: Path) -> None:
    def body(job: shoal.Job, model: nn.Module, _optimizer: torch.optim.Optimizer) -> None:
        with pytest.raises(SettingError, match=r"job.track\(average=...\): a Average has no state_dict"):
            job.track(average=job.ema(model, 0.9))
        with pytest.raises(SettingError, match=r"job.track\(x=...\): a type has no state_dict"):
            job.track(x=Own)
        own = Own({"f": [lambda: None]})
        job.track(own=own)
        job.track(own=own)
        with pytest.raises(OrderError, match=r"job.track\(own=...\) is taken by a Own[\s\S]*another name"):
            job.track(own=Own())
        with pytest.raises(SaveError, match=r"own.state.f.0 is a function, which only a pickle could hold"):
            job.save(tmp_path)

    job_with(2, "zero3", body)
