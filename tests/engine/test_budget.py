"""`memory=`: the budget is kept, gathers are saved, and a budget that is too small is refused."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

import shoal
from shoal.comm.threads import run
from shoal.engine.ledger import GATHERED, KEPT_UNITS
from shoal.errors import DivergedError, SettingError
from shoal.strategy import Shard, Strategy

WIDTH, BLOCKS = 64, 8
BLOCK = (WIDTH * WIDTH + WIDTH) * 4
"""Bytes of a block's parameters."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x).tanh()
        return x


class Seen(NamedTuple):
    """Of one rank: the ledger's most from the second step on, of units alone, bytes gathered in the last step."""

    most: int
    units: int
    kept: int
    gathered: int
    weights: list[float]


def train(
    memory: int | str | None, *, leaves: int = 2, steps: int = 3, lookers: bool = True, **settings: object
) -> Seen:
    with shoal.init("zero3", leaves=leaves, run_dir="none", device="cpu", memory=memory, **settings) as job:
        model = Net()
        model, optimizer = job.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
        most = [0, 0, 0]
        gathered = 0

        def look(*_: object) -> None:
            now = job.memory()
            entries = {e.name: e for e in now.entries}
            units = entries[GATHERED].now + entries[KEPT_UNITS].now
            assert entries[GATHERED].now <= entries[GATHERED].peak
            assert entries[KEPT_UNITS].now <= entries[KEPT_UNITS].peak
            assert (entries[KEPT_UNITS].lifetime, entries[KEPT_UNITS].setting) == ("between uses", "memory")
            if job.step:
                most[:] = [max(most[0], now.total), max(most[1], units), max(most[2], entries[KEPT_UNITS].now)]

        for module in model.blocks if lookers else ():
            module.register_forward_pre_hook(look)
            module.weight.register_post_accumulate_grad_hook(look)
        for _ in range(steps):
            gathered, acted = job.traffic.get("gather", 0), False
            while not acted:
                model(torch.randn(4, WIDTH)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                acted = job.stepped
        gathered = job.traffic.get("gather", 0) - gathered
        with job.whole(model):
            weights = [float(p.detach().sum()) for p in model.parameters()]
        return Seen(*most, gathered, weights)


def base(leaves: int = 2) -> int:
    """Bytes of everything but units, at most: what a budget cannot change."""

    def rank_main(_rank: int) -> int:
        with shoal.init("zero3", leaves=leaves, run_dir="none", device="cpu") as job:
            model = Net()
            job.prepare(model, torch.optim.AdamW(model.parameters()))
            apart = (GATHERED, KEPT_UNITS, "parameters in job.whole")
            return sum(e.peak for e in job.memory().entries if e.name not in apart)

    return max(run(2, rank_main))


@pytest.mark.parametrize("leaves", [2, 4])
def test_budgets(leaves: int) -> None:
    """The more, the fewer bytes are gathered; what units and the whole ledger take stays below; the same numbers."""
    without = run(2, lambda _r: train(None, leaves=leaves, lookers=False))
    others, gathered = base(leaves), list[int]()
    for blocks in (2, 3, 5, 7, 9):
        budget = others + blocks * BLOCK
        ranks = run(2, lambda _r: train(budget, leaves=leaves))  # noqa: B023
        for rank, plain in zip(ranks, without, strict=True):
            assert rank.weights == plain.weights
            assert rank.units <= blocks * BLOCK
            assert rank.most <= budget
            assert rank.gathered <= plain.gathered or blocks < 5
        gathered.append(sum(rank.gathered for rank in ranks))
    uses = 2 * BLOCKS * (leaves // 2)
    assert gathered == sorted(gathered, reverse=True)
    assert gathered[0] in [n * BLOCK for n in range(uses - leaves, uses)]
    assert gathered[-1] == BLOCKS * BLOCK  # once a step


def test_nothing_is_kept_without_it() -> None:
    assert [rank.kept for rank in run(2, lambda _r: train(None))] == [0, 0]


def test_memory_in_common_is_kept_for_nothing() -> None:
    """Each rank's part of it rests anyway: no room is taken, and no placeholder shown between two uses."""
    for rank in run(2, lambda _r: train("1MiB"), common=True):
        assert (rank.units, rank.gathered) == (0, 0)
        assert rank.most <= 2**20


def test_too_small() -> None:
    text = (
        r"memory=0\.0625 MiB is too small: rank \d holds 0\.\d+ MiB at rest, and its largest unit is 0\.\d+ MiB, "
        r"0\.\d+ MiB in all\n.*print\(job\.memory\(\)\).*\n.*memory=1MiB or more, more ranks per copy, or smaller blocks"
    )
    with pytest.raises(SettingError, match=text):
        run(2, lambda _r: train("64KiB"))


class Four(nn.Module):
    """A block of four modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(self.a(x).tanh()).tanh()).tanh())


@pytest.mark.parametrize("blocks", [3, 4])
def test_units_of_one_block_are_whole_together(blocks: int) -> None:
    """From the first leaf on, which no plan has foreseen. So a budget must have room for all of them."""

    def rank_main(_rank: int, memory: int | None) -> tuple[int, int]:
        with shoal.init("zero3", run_dir="none", device="cpu", memory=memory) as job:
            model = nn.Sequential(Four(), Four())
            model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), units=2000)
            assert len(job.explain().split("\n\n")[1].splitlines()) == 1 + 8
            rest = sum(e.rest for e in job.memory().entries)
            most = [0]

            def look(*_: object) -> None:
                found = [e for e in job.memory().entries if e.name in (GATHERED, KEPT_UNITS)]
                assert all(e.now <= e.peak for e in found)
                most.append(sum(e.now for e in found))

            model[0].a.register_forward_hook(look)
            model[1].a.weight.register_post_accumulate_grad_hook(look)
            for _ in range(3):
                model(torch.randn(4, WIDTH)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            return max(most), rest

    ranks = run(2, lambda _r: rank_main(_r, None))
    rest = max(rest for _, rest in ranks)
    if blocks < 4:
        with pytest.raises(SettingError, match="is too small"):
            run(2, lambda r: rank_main(r, rest + blocks * BLOCK))
    else:
        assert [most for most, _ in run(2, lambda r: rank_main(r, rest + blocks * BLOCK))] == [4 * BLOCK] * 2


def test_the_smallest_budget_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """And is said, once."""
    same = run(2, lambda _r: train("1MiB"))
    capsys.readouterr()
    assert [s.gathered for s in run(2, lambda r: train(["2MiB", "1MiB"][r]))] == [s.gathered for s in same]
    said = capsys.readouterr().err
    assert said.count("memory= differs between ranks: 1 MiB of rank 1, the smallest, counts for all") == 1


def test_a_budget_for_some_ranks_only_is_refused() -> None:
    with pytest.raises(DivergedError, match="setting memory is a budget on rank 0 and none on rank 1"):
        run(2, lambda r: train("2MiB" if r == 0 else None))


def test_without_a_plan_there_is_no_budget() -> None:
    with pytest.raises(SettingError, match=r"memory=1048576 with overlap=False\n.*order.*\n.*leave memory= out"):
        train("1MiB", overlap=False)


def test_units_that_stay_between_leaves_survive_what_happens_there() -> None:
    """An evaluation on some ranks, or the whole model lent to all, in the middle of a step."""

    def rank_main(rank: int, memory: str | None, at: str) -> list[float]:
        strategy = Strategy(shard=Shard.PARAMETERS)
        with shoal.init(strategy, leaves=6, run_dir="none", device="cpu", memory=memory) as job:
            model = Net()
            model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            for _ in range(3):
                for _ in range(3):
                    model(torch.randn(4, WIDTH)).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    with torch.no_grad():
                        if at == "evaluation" and rank == 0 and memory:
                            model.eval()(torch.ones(2, WIDTH))
                            model.train()
                    if at == "whole":
                        with job.whole(model):
                            assert not model.blocks[0].weight.isnan().any()
            with job.whole(model):
                return [float(p.detach().sum()) for p in model.parameters()]

    for at in ("evaluation", "whole"):
        assert run(2, lambda r: rank_main(r, "4MiB", at)) == run(2, lambda r: rank_main(r, None, at))  # noqa: B023


def test_gathers_are_ahead_of_their_use() -> None:
    """Several units come at the same time, and only as many bytes as the ledger says."""
    blocks = BLOCKS * BLOCK

    def rank_main(_rank: int) -> tuple[int, int]:
        with shoal.init("zero3", run_dir="none", device="cpu") as job:
            model = Net()
            model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            found = [0]

            def look(*_: object) -> None:
                if job.step:
                    found.append(job.memory()["parameters"])

            model.blocks[0].register_forward_hook(look)
            for _ in range(2):
                model(torch.randn(4, WIDTH)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            peak = next(e.peak for e in job.memory().entries if e.name == GATHERED)
            return max(found), peak

    assert run(2, rank_main) == [(blocks - BLOCK, blocks)] * 2  # the first is let go by then


@pytest.mark.parametrize("pending", [False, True])
def test_several_models_share_a_budget(pending: bool) -> None:
    """Also with updates that are pending in the next forward; and a model that runs for the other one's sake."""

    def rank_main(_rank: int, memory: str | None) -> tuple[list[float], int]:
        with shoal.init("zero3", leaves=4, run_dir="none", device="cpu", memory=memory, pending=pending) as job:
            made = {name: Net() for name in ("maker", "judge")}
            pairs = [
                job.prepare(m, torch.optim.Adam(m.parameters(), lr=0.01), name=name) for name, m in made.items()
            ]  # fmt: skip
            (maker, maker_steps), (judge, judge_steps) = pairs
            for _ in range(6):
                fake = maker(torch.randn(4, WIDTH))
                judge(fake.detach()).square().mean().backward()
                judge_steps.step()
                judge_steps.zero_grad()
                judge(fake).mean().backward()
                maker_steps.step()
                maker_steps.zero_grad()
                judge_steps.zero_grad()
            sent = job.traffic["gather"]
            found: list[float] = []
            for model in (maker, judge):
                with job.whole(model):
                    found += [float(p.detach().sum()) for p in model.parameters()]
            return found, sent

    plain = run(2, lambda r: rank_main(r, None))
    kept = run(2, lambda r: rank_main(r, "8MiB"))
    assert [numbers for numbers, _ in kept] == [numbers for numbers, _ in plain]
    assert all(less < more for (_, less), (_, more) in zip(kept, plain, strict=True))
