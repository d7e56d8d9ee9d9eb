"""Clipping by the global norm: torch's number, with the same bits under every strategy and cut."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import shoal
from shoal.comm.threads import run
from shoal.leaves import Tree
from shoal.squares import count_nodes, squares
from shoal.strategy import Cut, Shard, Strategy
from tests.engine.test_models import Stack, Unused, frozen, square
from tests.engine.trials import PLACES, Numbers, adamw, tree_sum


def norms(
    world: int, strategy: str | Strategy, make_model: Callable[[], nn.Module], max_norm: float, factor: float = 1.0
) -> tuple[list[float | None], dict[str, Tensor]]:
    """What clipping returned after every leaf of rank 0, and the model after two steps of four leaves."""

    def rank_main(_rank: int) -> tuple[list[float | None], dict[str, Tensor]]:
        with shoal.init(strategy, leaves=4, run_dir="none", device="cpu") as job:
            model = make_model()
            model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            found: list[float | None] = []
            for number in job.loader(Numbers(8), global_batch=4, shuffle=False):
                (factor * square(model, *divmod(int(number), 4))).backward()
                found.append(job.clip_grad_norm(max_norm))
                optimizer.step()
            return found, job.state_dict(model)

    return run(world, rank_main)[0]


def by_torch(
    make_model: Callable[[], nn.Module], max_norm: float, factor: float = 1.0
) -> tuple[list[float], dict[str, Tensor]]:
    shoal.seed(0, 0)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: list[float] = []
    for step in range(2):
        optimizer.zero_grad()
        (factor * tree_sum([square(model, step, n) for n in range(4)]) / 4).backward()
        found.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
    return found, model.state_dict()


@pytest.mark.parametrize("max_norm", [0.05, 100.0])
@pytest.mark.parametrize("make_model", [Stack, Unused, frozen("blocks.1")])
def test_the_norm_is_torchs_with_the_same_bits_everywhere(make_model: Callable[[], nn.Module], max_norm: float) -> None:
    want, model = by_torch(make_model, max_norm)
    one, state = norms(1, "ddp", make_model, max_norm)
    assert [n for n in one if n is not None] == pytest.approx(want, rel=1e-6)
    assert [n is None for n in one] == [True, True, True, False] * 2
    for name, value in model.items():
        assert torch.allclose(state[name], value, rtol=1e-5, atol=1e-7)
    for world, strategy in [*PLACES.values(), (3, Strategy(shard=Shard.PARAMETERS, cut=Cut.PARAMETER))]:
        got, other = norms(world, strategy, make_model, max_norm)
        assert [n for n in got if n is not None] == [n for n in one if n is not None]
        assert all(torch.equal(other[k], v) for k, v in state.items())


@pytest.mark.parametrize("place", PLACES)
def test_a_norm_that_is_not_finite_spoils_everything_as_in_torch(place: str) -> None:
    want, model = by_torch(Stack, 1.0, factor=math.nan)
    got, state = norms(*PLACES[place], Stack, 1.0, factor=math.nan)
    assert math.isnan(want[0])
    assert all(n is None or math.isnan(n) for n in got)
    assert all(model[k].isnan().all() == v.isnan().all() for k, v in state.items())


def test_clipping_twice_tells_the_norm_after_the_first() -> None:
    def rank_main(_rank: int) -> tuple[float | None, float | None]:
        with shoal.init("zero3", run_dir="none") as job:
            model = Stack()
            model, _ = job.prepare(model, adamw(model))
            square(model, 0, job.rank).backward()
            return job.clip_grad_norm(0.01), job.clip_grad_norm(0.01)

    first, second = run(2, rank_main)[0]
    assert first > 0.01
    assert second == pytest.approx(0.01, rel=1e-3)


# -------------------------------------------------------------------- the sums themselves


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 1000, 64 * 4096, 64 * 4097 + 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_pieces_sum_up_to_the_same_bits(numel: int, dtype: torch.dtype) -> None:
    """However a parameter is cut, on multiples of 64."""
    generator = torch.Generator().manual_seed(numel)
    flat = torch.randn(numel, dtype=dtype, generator=generator)
    blocks = -(-numel // 64)

    def total(cuts: list[int]) -> float:
        tree: Tree[float] = Tree(blocks, lambda a, b: a + b)
        for start, stop in itertools.pairwise(cuts):
            nodes = squares(flat[start:stop], start)
            assert len(nodes) == count_nodes(start, stop)
            for node, value in nodes.items():
                tree.put(node, value)
        return tree.take()

    want = total([0, numel])
    parts = torch.view_as_real(flat) if dtype.is_complex else flat
    assert want == pytest.approx(parts.double().square().sum().item(), rel=1e-12)
    for n in range(1, 4):
        cuts = sorted(
            {min(numel, 64 * int(b)) for b in torch.randint(blocks + 1, (n,), generator=generator)} | {0, numel}
        )
        assert total(cuts) == want
