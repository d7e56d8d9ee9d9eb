"""`shoal.DistributedDataParallel` beside torch's own, on real processes over gloo."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel as TorchDDP
from torch.utils.checkpoint import checkpoint

import shoal
from shoal.comm.threads import run
from shoal.dropin.ddp import LOOKS
from shoal.dropin.mean import cut_into_buckets, to_all
from shoal.dropin.world import world
from shoal.errors import DivergedError, EnvironmentFault, ModelError, OrderError, SettingError
from tests.pool import Pool

Wrap = Callable[..., nn.Module]


class Net(nn.Module):
    """With buffers, a branch that some batches leave out, and a part that is computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh())
        self.side = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)
        self.reentrant: bool | None = None

    def forward(self, x: Tensor, *, side: bool = True) -> Tensor:
        x = self.body(x)
        if side:
            x = x + (self.side(x) if self.reentrant is None else checkpoint(self.side, x, use_reentrant=self.reentrant))
        return self.head(x)


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(100 * step + rank))


def plain(model: nn.Module, step: int, rank: int) -> None:
    model(batch(step, rank)).square().mean().backward()


def accumulating(model: nn.Module, step: int, rank: int) -> None:
    """loss / k, the first backward in no_sync; the second averages what both left."""
    with model.no_sync():
        (model(batch(step, rank)).square().mean() / 2).backward()
    (model(batch(step + 50, rank)).square().mean() / 2).backward()


def twice(model: nn.Module, step: int, rank: int) -> None:
    """Both backwards are averaged."""
    plain(model, step, rank)
    plain(model, step + 50, rank)


def unused(model: nn.Module, step: int, rank: int) -> None:
    """Rank 0 uses a part that the others do not; in step 1 nobody does."""
    model(batch(step, rank), side=rank == 0 and step != 1).square().mean().backward()


def without_gradients(model: nn.Module, step: int, rank: int) -> None:
    """An evaluation before every step, with all ranks."""
    model.eval()
    with torch.no_grad():
        model(batch(step + 50, rank))
    model.train()
    plain(model, step, rank)


def clipped(model: nn.Module, step: int, rank: int) -> None:
    """`p.grad` is whole after backward: torch's own clipping works."""
    plain(model, step, rank)
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)


PROGRAMS: dict[str, tuple[Callable[[nn.Module, int, int], None], dict[str, Any]]] = {
    "plain": (plain, {}),
    "small buckets": (plain, {"bucket_cap_mb": 0.0005}),
    "views": (plain, {"gradient_as_bucket_view": True, "static_graph": True}),
    "buffers of one's own": (plain, {"broadcast_buffers": False}),
    "buffers at the start": (plain, {"forward_sync_buffers": False}),
    "accumulating": (accumulating, {}),
    "twice": (twice, {}),
    "unused": (unused, {"find_unused_parameters": True}),
    "evaluation": (without_gradients, {}),
    "clipped": (clipped, {}),
}


def train(wrap: Wrap, program: Callable[[nn.Module, int, int], None], keywords: dict[str, Any], steps: int = 3) -> Any:
    rank = dist.get_rank()
    torch.manual_seed(rank)  # ranks begin differently: rank 0's values count
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch has another name for broadcast_buffers
        model = wrap(Net(), **keywords)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    grads: list[Tensor | None] = []
    for step in range(steps):
        program(model, step, rank)
        grads += [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), grads


def both(name: str) -> Any:
    dist.init_process_group("gloo")
    program, keywords = PROGRAMS[name]
    try:
        return train(TorchDDP, program, keywords), train(shoal.DistributedDataParallel, program, keywords)
    finally:
        world().leave()


@pytest.mark.parametrize("name", PROGRAMS)
def test_beside_torch(pool: Pool, name: str) -> None:
    """Two ranks: the same bits, as a sum of two has no order. Names in the state dict are torch's too."""
    for (want, want_grads), (got, got_grads) in pool.run(both, name, world=2):
        assert list(got) == list(want)
        for key, value in want.items():
            assert torch.equal(got[key], value), key
        assert [g is None for g in got_grads] == [g is None for g in want_grads]
        assert all(torch.equal(a, b) for a, b in zip(got_grads, want_grads, strict=True) if a is not None)


@pytest.mark.parametrize("name", ["plain", "accumulating", "unused"])
def test_beside_torch_with_three(pool: Pool, name: str) -> None:
    results = pool.run(both, name, world=3)
    for (want, want_grads), (got, got_grads) in results:
        for key, value in want.items():
            assert torch.allclose(got[key], value, atol=1e-6), key
        for a, b in zip(got_grads, want_grads, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, atol=1e-6)
    for _, (got, _) in results[1:]:
        assert all(torch.equal(got[k], v) for k, v in results[0][1][0].items() if "running" not in k)


def joined(divide: bool) -> Any:
    """Rank 0 has two batches, rank 1 four."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def uneven(wrap: Wrap) -> Any:
        torch.manual_seed(3)
        model = wrap(Net())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with model.join(divide_by_initial_world_size=divide):
            for step in range(2 + 2 * rank):
                plain(model, step, rank)
                optimizer.step()
                optimizer.zero_grad()
        return model.state_dict()

    try:
        return uneven(TorchDDP), uneven(shoal.DistributedDataParallel)
    finally:
        world().leave()


@pytest.mark.parametrize("divide", [True, False])
def test_join(pool: Pool, divide: bool) -> None:
    """Afterwards both ranks have the model of the one that went on."""
    for want, got in pool.run(joined, divide, world=2):
        for key, value in want.items():
            assert torch.allclose(got[key], value, atol=1e-7), key


HOOKS: dict[str, Any] = {
    "all-reduce": lambda m: m.register_comm_hook(None, default_hooks.allreduce_hook),
    "half": lambda m: m.register_comm_hook(None, default_hooks.fp16_compress_hook),
    "PowerSGD": lambda m: m.register_comm_hook(
        powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=0.1),
        powerSGD_hook.powerSGD_hook,
    ),
}


def hooked(name: str) -> Any:
    dist.init_process_group("gloo")

    def wrap(kind: Wrap, module: nn.Module, **keywords: Any) -> nn.Module:
        model = kind(module, **keywords)
        HOOKS[name](model)
        return model

    try:
        kinds = (TorchDDP, shoal.DistributedDataParallel)
        return [train(partial(wrap, kind), plain, {}, steps=4)[0] for kind in kinds]
    finally:
        world().leave()


@pytest.mark.parametrize("name", HOOKS)
def test_comm_hooks(pool: Pool, name: str) -> None:
    for want, got in pool.run(hooked, name, world=2):
        for key, value in want.items():
            assert torch.allclose(got[key], value, atol=1e-6), key


def in_pairs() -> Any:
    """Ranks 0 and 2 average among themselves, and 1 and 3."""
    dist.init_process_group("gloo")
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = groups[dist.get_rank() % 2]
    try:
        found = [
            train(kind, plain, {"process_group": mine}, steps=2)[0]
            for kind in (TorchDDP, shoal.DistributedDataParallel)
        ]
        strange = groups[1 - dist.get_rank() % 2]
        with pytest.raises((OrderError, ValueError), match=r"is not in process_group=|not registered|not part"):
            shoal.DistributedDataParallel(Net(), process_group=strange)
        return found
    finally:
        world().leave()


def test_process_group(pool: Pool) -> None:
    results = pool.run(in_pairs, world=4)
    for want, got in results:
        assert all(torch.equal(got[k], v) for k, v in want.items())
    assert not torch.equal(results[0][1]["module.head.weight"], results[1][1]["module.head.weight"])


# -------------------------------------------------------------------- places


def numbered_by_the_script(rank: int | None) -> float:
    """torch's process group is told rank and size, as tutorials do; the environment may know better."""
    import os

    mine = int(os.environ["RANK"])
    if rank is None:  # mp.spawn: nobody but the script knows
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
    dist.init_process_group("gloo", rank=mine if rank is None else (mine + rank) % 2, world_size=2)
    model = shoal.DistributedDataParallel(nn.Linear(1, 1, bias=False))
    try:
        model(torch.tensor([[1.0 + mine]])).sum().backward()
        return float(model.module.weight.grad)
    finally:
        world().leave()


def test_ranks_of_the_process_group(pool: Pool) -> None:
    assert pool.run(numbered_by_the_script, None, world=2) == [1.5, 1.5]


def test_a_rank_that_contradicts_the_environment(pool: Pool) -> None:
    with pytest.raises(EnvironmentFault, match=r"process group says RANK=\d, the environment RANK=") as e:
        pool.run(numbered_by_the_script, 1, world=2)
    assert "dist.init_process_group() without rank= and world_size=" in str(e.value)


def no_address() -> None:
    import os
    import tempfile

    del os.environ["RANK"]
    address = f"tcp://127.0.0.1:{os.environ.pop('MASTER_PORT')}"
    dist.init_process_group("gloo", init_method=address, rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    assert tempfile
    shoal.DistributedDataParallel(Net())


def test_a_process_group_without_an_address(pool: Pool) -> None:
    with pytest.raises(EnvironmentFault, match=r"MASTER_PORT is not set[\s\S]*shoal run --workers N"):
        pool.run(no_address, world=2)


def test_the_connections_of_a_job_are_used() -> None:
    """No torch process group, no second set of connections."""

    def rank_main(rank: int) -> float:
        with shoal.init(run_dir="none", device="cpu") as job:
            model = shoal.DistributedDataParallel(nn.Linear(1, 1, bias=False))
            model(torch.tensor([[1.0 + rank]])).sum().backward()
            assert job.traffic["agree"] > 0
            return float(model.module.weight.grad)

    assert run(3, rank_main) == [2.0] * 3


def test_alone() -> None:
    model = shoal.DistributedDataParallel(Net())
    try:
        with model.join(), model.no_sync():
            plain(model, 0, 0)
        twin = Net()
        twin.load_state_dict(model.module.state_dict())
        model._set_static_graph()
    finally:
        world().leave()
    assert all(p.grad is not None for p in model.parameters())


# -------------------------------------------------------------------- on threads: what is said, what is refused


def on_threads(size: int, main: Callable[[int], Any]) -> tuple[list[Any], str]:
    """What ranks return, and what was said."""

    def rank_main(rank: int) -> Any:
        try:
            return main(rank)
        finally:
            with contextlib.suppress(Exception):
                world().leave()

    said = io.StringIO()
    with redirect_stderr(said):
        return run(size, rank_main), said.getvalue()


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation(reentrant: bool) -> None:
    """A backward inside a backward does not end it."""

    def grads(module: nn.Module, rank: int, wrap: Callable[[nn.Module], nn.Module]) -> list[Tensor]:
        model = wrap(module)
        plain(model, 0, rank)
        return [p.grad.clone() for p in module.parameters()]

    def main(rank: int) -> None:
        torch.manual_seed(1)
        first, second = Net(), Net()
        second.load_state_dict(first.state_dict())
        second.reentrant = reentrant
        a, b = grads(first, rank, shoal.DistributedDataParallel), grads(second, rank, shoal.DistributedDataParallel)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    on_threads(2, main)


def test_the_same_batch_on_all_ranks_is_said() -> None:
    def main(shift: int, rank: int) -> None:
        model = shoal.DistributedDataParallel(Net())
        for step in range(LOOKS + 2):
            plain(model, step, rank * shift)
            model.zero_grad()

    _, same = on_threads(2, partial(main, 0))
    assert same.count("the same batch on all 2 ranks, 2 times in a row") == 1
    assert "torch.utils.data.DistributedSampler(dataset)" in same
    _, other = on_threads(2, partial(main, 1))
    assert "same batch" not in other


def test_replicas_that_drift_apart_are_said() -> None:
    def main(factor: float, rank: int) -> None:
        torch.manual_seed(0)
        model = shoal.DistributedDataParallel(Net())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (1 + factor * rank))
        for step in range(3):
            plain(model, step, rank)
            optimizer.step()
            optimizer.zero_grad()

    _, said = on_threads(2, partial(main, 1.0))
    assert "replicas drifted apart: after 1 steps the ranks' parameters differ" in said
    _, fine = on_threads(2, partial(main, 0.0))
    assert "drifted" not in fine


def diverging(rank: int) -> None:
    torch.manual_seed(0)
    model = shoal.DistributedDataParallel(nn.Linear(6, 2))
    for step in range(2 + rank):
        plain(model, step, rank)
    world().leave()


def test_unequal_batches_without_join() -> None:
    with pytest.raises(DivergedError) as e:
        run(2, diverging)
    assert "rank 0 has come to the end of its program; rank 1 ends a backward" in str(e.value)
    assert "with model.join():" in str(e.value)


def test_different_models() -> None:
    with pytest.raises(DivergedError, match=r"ranks prepare different things: weight is \(2, 3\)"):
        on_threads(2, lambda rank: shoal.DistributedDataParallel(nn.Linear(3 + rank, 2)))


def of_their_own() -> None:
    net = nn.Linear(3 + int(os.environ["RANK"]), 2)
    with pytest.raises(DivergedError, match=r"ranks prepare different things: weight is \(2, 3\)"):
        shoal.DistributedDataParallel(net)
    world().leave()


def test_different_models_in_processes(pool: Pool) -> None:
    """Nothing whose size the ranks must agree on travels before they have compared."""
    pool.run(of_their_own, timeout=20.0)


def test_early_termination() -> None:
    def main(rank: int) -> None:
        model = shoal.DistributedDataParallel(nn.Linear(6, 2))
        with model.join(throw_on_early_termination=True):
            for step in range(1 + rank):
                plain(model, step, rank)

    with pytest.raises(OrderError, match=r"rank 0 ran out of data, with join[\s\S]*goes on with the others' data"):
        on_threads(2, main)


REFUSED: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "device_mesh": (SettingError, 'process_group=mesh.get_group("data")', {"device_mesh": object()}),
    "mixed_precision": (SettingError, 'shoal.init(precision="bfloat16")', {"mixed_precision": object()}),
    "delay": (SettingError, "requires_grad_(False)", {"delay_all_reduce_named_params": []}),
    "hooks of parameters": (SettingError, "requires_grad_(False)", {"param_to_hook_all_reduce": 1}),
    "a device": (SettingError, "leave device_ids out", {"device_ids": [0]}),
    "two devices": (SettingError, "device_ids=[0]", {"device_ids": [0, 1]}),
    "unknown": (TypeError, "unexpected keyword argument 'bucket'", {"bucket": 1}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    kind, text, keywords = REFUSED[name]
    with pytest.raises(kind) as e:
        shoal.DistributedDataParallel(nn.Linear(2, 1), **keywords)
    assert text in str(e.value)
    with nullcontext():
        world().leave()


def test_nothing_to_train() -> None:
    with pytest.raises(ModelError, match=r"Linear has no parameter that is trained[\s\S]*without DistributedDataPar"):
        shoal.DistributedDataParallel(nn.Linear(2, 1).requires_grad_(False))


def test_hooks_that_cannot_be() -> None:
    def main(_rank: int) -> None:
        model = shoal.DistributedDataParallel(nn.Linear(2, 1))
        with pytest.raises(OrderError, match=r"register_comm_hook\(state, int\)[\s\S]*a function of \(state, bucket\)"):
            model.register_comm_hook(None, 3)
        model.register_comm_hook(None, lambda _s, _b: None)
        with pytest.raises(OrderError, match=r"register_comm_hook was called twice"):
            model.register_comm_hook(None, lambda _s, _b: None)

    on_threads(2, main)


def test_buckets() -> None:
    """The last parameters first; a bucket has one dtype, and ends where it would grow beyond its size."""
    params = [nn.Parameter(torch.zeros(n, dtype=d)) for n, d in
              [(4, torch.float32), (100, torch.float32), (4, torch.float64), (4, torch.float32)]]  # fmt: skip
    assert cut_into_buckets(params, 25.0) == [[3, 1, 0], [2]]
    assert cut_into_buckets(params, 40 / 2**20) == [[3], [2], [1], [0]]


def test_values_of_all_dtypes_arrive_as_they_are() -> None:
    """Those that no other dtype could carry, from several ranks at once."""

    def main(rank: int) -> list[Tensor]:
        small, wide, count, mask = tensors = [
            torch.full((3,), 0.5 + rank), torch.full((2, 2), 1 / 3 + rank, dtype=torch.float64),
            torch.tensor(2**60 + 1 + rank), torch.tensor([rank == 0, rank == 1]),
        ]  # fmt: skip
        to_all(world().group_of(None), [[small, count], [mask, wide]])
        return tensors

    want = [torch.full((3,), 0.5), torch.full((2, 2), 1 / 3 + 1, dtype=torch.float64), torch.tensor(2**60 + 1)]
    for small, wide, count, mask in on_threads(2, main)[0]:
        assert mask.tolist() == [False, True]
        assert [a.equal(b) for a, b in zip((small, wide, count), want, strict=True)] == [True] * 3
