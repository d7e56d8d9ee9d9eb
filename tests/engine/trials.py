"""One small training run, under a strategy and in plain PyTorch, whose bits can be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

import shoal
from shoal.comm.threads import run
from shoal.strategy import Shard, Strategy

PLACES = {
    "ddp": (2, Strategy()),
    "zero1": (2, Strategy(shard=Shard.OPTIMIZER)),
    "zero2": (3, Strategy(shard=Shard.GRADIENTS)),
    "zero3": (2, Strategy(shard=Shard.PARAMETERS)),
    "hybrid": (4, Strategy(shard=Shard.PARAMETERS, ranks_per_copy=2)),
}
"""Per name a world and a strategy. Four leaves a step: ranks compute two, one or two, or one each."""

Leaf = Callable[[nn.Module, int, int], Tensor]
"""`leaf(model, step, number)` is the user's code for one micro-batch. A result that requires no gradient has been
backwarded already."""

MakeOptimizer = Callable[[nn.Module], Optimizer]


class Result(NamedTuple):
    """Everything that training leaves behind: the model's state, the optimizer's, and the mean losses."""

    model: dict[str, Tensor]
    optimizer: dict[str, object]
    losses: list[float]


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def inputs(step: int, number: int, *shape: int) -> Tensor:
    """What leaf `number` of `step` is given."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * step + number))


class Numbers(Dataset[int]):
    """Samples that are their own numbers."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def train(
    place: str | tuple[int, str | Strategy], make_model: Callable[[], nn.Module], leaf: Leaf, *,
    make_optimizer: MakeOptimizer = sgd, steps: int = 3, leaves: int = 4, clip: float | None = None,
    units: list[str] | int | None = None, each: Callable[[shoal.Job, nn.Module, Optimizer], None] | None = None,
    order: int | None = None, **settings: object,
) -> Result:  # fmt: skip
    """Train on threads.

    Args:
        place: a name of `PLACES`, or a world and a strategy.
        each: called on every rank after every step.
        order: seed of who runs next.
    """
    world, strategy = PLACES[place] if isinstance(place, str) else place

    def rank_main(_rank: int) -> Result:
        with shoal.init(strategy, leaves=leaves, run_dir="none", device="cpu", **settings) as job:
            model = make_model()
            model, optimizer = job.prepare(model, make_optimizer(model), units=units)
            loader = job.loader(Numbers(leaves * steps), global_batch=leaves, shuffle=False)
            losses: list[float] = []
            for number in loader:
                loss = leaf(model, *divmod(int(number), leaves))
                if loss.requires_grad:
                    loss.backward()
                if clip is not None:
                    job.clip_grad_norm(clip)
                optimizer.step()
                optimizer.zero_grad()
                value = job.mean(loss.detach())
                losses += [] if value is None else [value]
                if job.stepped and each is not None:
                    each(job, model, optimizer)
            return Result(job.state_dict(model), job.state_dict(optimizer), losses)

    return run(world, rank_main, seed=order)[0]


def plain(
    make_model: Callable[[], nn.Module], leaf: Leaf, *, make_optimizer: MakeOptimizer = sgd, steps: int = 3,
    leaves: int = 4,
) -> Result:  # fmt: skip
    """The same without shoal: gradients of the leaves, summed along the tree, divided, and one step.

    Every leaf starts from the step's buffers. Floating ones become the leaves' mean, others the last leaf's.
    """
    threads, states = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    shoal.seed(0, 0)
    model = make_model()
    optimizer = make_optimizer(model)
    losses: list[float] = []
    for step in range(steps):
        found: list[dict[str, Tensor]] = []
        values: list[float] = []
        start = {n: b.clone() for n, b in model.named_buffers()}
        made: list[dict[str, Tensor]] = []
        for number in range(leaves):
            shoal.seed(0, step, number)
            loss = leaf(model, step, number)
            if loss.requires_grad:
                loss.backward()
            values.append(float(loss.detach()))
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
            optimizer.zero_grad()
            made.append({n: b.clone() for n, b in model.named_buffers()})
            set_buffers(model, start)
        set_buffers(model, {n: averaged([m[n] for m in made]) for n in start})
        for name, p in model.named_parameters():
            if any(name in grads for grads in found):
                p.grad = averaged([grads.get(name, torch.zeros_like(p)) for grads in found])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(tree_sum([torch.tensor(v, dtype=torch.float64) for v in values]) / leaves))
    torch.set_num_threads(threads)
    torch.set_rng_state(states)
    return Result(model.state_dict(), optimizer.state_dict(), losses)


def set_buffers(model: nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(values[name])


def averaged(parts: list[Tensor]) -> Tensor:
    """The mean along the tree, in float32 at least; the last one of whole numbers."""
    dtype = parts[0].dtype
    if len(parts) == 1 or not (dtype.is_floating_point or dtype.is_complex):
        return parts[-1]
    wide = [p.float() if dtype in (torch.float16, torch.bfloat16) else p for p in parts]
    return (tree_sum(wide) / len(parts) + 0.0).to(dtype)


def tree_sum(parts: list[Tensor]) -> Tensor:
    """Neighbours first."""
    while len(parts) > 1:
        parts = [sum(parts[i : i + 2][1:], parts[i]) for i in range(0, len(parts), 2)]
    return parts[0]


def assert_same(got: Result, want: Result) -> None:
    """Bit for bit; the first difference is named."""
    assert list(got.model) == list(want.model)
    for name, value in want.model.items():
        assert_bits(got.model[name], value, name)
    ours, theirs = got.optimizer["state"], want.optimizer["state"]
    assert sorted(ours) == sorted(theirs), "the parameters that have state"
    for i, state in theirs.items():
        assert sorted(ours[i]) == sorted(state), i
        for key, value in state.items():
            assert_bits(torch.as_tensor(ours[i][key]), torch.as_tensor(value), f"state {key} of parameter {i}")
    assert got.losses == want.losses


def assert_bits(got: Tensor, want: Tensor, what: str) -> None:
    assert got.dtype == want.dtype, what
    assert got.shape == want.shape, what
    assert torch.equal(got.nan_to_num(), want.nan_to_num()), f"{what}: up to {(got - want).abs().max()} apart"
