"""Claims about bytes, elements and samples: the numbers are the same on every machine."""

from __future__ import annotations

import torch
from finding import Claim, Finding, Seen
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DistributedSampler, TensorDataset

from shoal import Job, Strategy, init
from shoal.comm.meter import dry_run
from shoal.comm.threads import run
from shoal.leaves import Tree

BLOCKS, WIDTH = 8, 256
PARAMETERS = BLOCKS * WIDTH * WIDTH
"""524,288, so 2 MiB in float32."""
STATE = ("parameters", "masters", "optimizer")
"""What rests on a rank between steps; a gradient comes and goes."""
NAMES = ("ddp", "zero1", "zero2", "zero3")


def square() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(BLOCKS)))


def one_step(job: Job, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(job.leaves // job.world_size):
        model(torch.zeros(2, WIDTH, device=job.device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def sent(name: str, world: int, leaves: int) -> int:
    """Bytes that rank 0 sends in its third step: parameters and gradients, not the few bytes of votes."""
    told: list[int] = []

    def rank_main(_rank: int) -> None:
        with init(Strategy.named(name), leaves=leaves, run_dir="none") as job:
            model = square().to(job.device)
            optimizer = torch.optim.AdamW(model.parameters())
            model, optimizer = job.prepare(model, optimizer, units=0)  # blocks travel alone, as large ones do
            for _ in range(3):
                one_step(job, model, optimizer)
                told.append(sum(job.traffic.get(verb, 0) for verb in ("gather", "reduce", "agree")))

    dry_run(0, world, rank_main)
    return told[2] - told[1]


def at_rest(name: str, world: int, **settings: object) -> int:
    """Bytes of parameters, masters and Adam's state that rank 0 holds after two steps, as its ledger says."""

    def rank_main(_rank: int) -> int:
        with init(Strategy.named(name), leaves=world, run_dir="none", device="cpu", **settings) as job:  # type: ignore[arg-type]
            model, optimizer = job.prepare(*_trained(square()), units=0)
            for _ in range(2):
                one_step(job, model, optimizer)
            return sum(job.memory()[kind] for kind in STATE)

    return run(world, rank_main)[0]


def _trained(model: nn.Sequential) -> tuple[nn.Sequential, torch.optim.AdamW]:
    return model, torch.optim.AdamW(model.parameters(), foreach=False)


# ---------------------------------------------------------------- the claims


def sends_less(_quick: bool) -> Finding:
    bytes_of = {name: sent(name, 4, 4) for name in NAMES}
    seen = [Seen(case=f"{name}, 4 ranks", metric="sent a step", value=b, unit="byte") for name, b in bytes_of.items()]
    return Finding(
        holds=all(bytes_of[name] < bytes_of["ddp"] for name in NAMES[1:]),
        because="ZeRO-1 and ZeRO-2 send what DDP sends, in two halves; ZeRO-3 gathers parameters for the backward, too "
        "(but those that are still there from the forward)",
        seen=seen,
    )


def accumulation_is_free(_quick: bool) -> Finding:
    cases = {(name, leaves): sent(name, 2, leaves) for name in NAMES for leaves in (2, 8)}
    seen = [
        Seen(case=f"{name}, 2 ranks, {leaves} leaves", metric="sent a step", value=b, unit="byte")
        for (name, leaves), b in cases.items()
    ]
    return Finding(
        holds=all(cases[name, 8] == cases[name, 2] for name in NAMES),
        because="DDP and ZeRO-1 send once a step; ZeRO-2 and ZeRO-3 hold no whole gradient, so they send one per leaf",
        seen=seen,
    )


def ddp_halves_memory(_quick: bool) -> Finding:
    alone, two = at_rest("ddp", 1), {name: at_rest(name, 2) for name in NAMES}
    seen = [Seen(case="one process", metric="rests on a rank", value=alone, unit="byte")]
    seen += [Seen(case=f"{name}, 2 ranks", metric="rests on a rank", value=b, unit="byte") for name, b in two.items()]
    return Finding(
        holds=two["ddp"] <= alone / 2 * 1.01,
        because="every rank of DDP holds the whole model and all of Adam's state; ZeRO-3 is what halves it. Only "
        "activations become fewer, where a rank's batch does",
        seen=seen,
    )


def half_precision_halves_memory(_quick: bool) -> Finding:
    cases = {
        "float32": at_rest("ddp", 1),
        "bfloat16, float32 masters": at_rest("ddp", 1, precision="bfloat16"),
        "bfloat16, no masters": at_rest("ddp", 1, precision="bfloat16", masters=False),
    }
    kept = {"float32": saved(torch.float32), "bfloat16": saved(torch.bfloat16)}
    seen = [Seen(case=case, metric="rests on a rank", value=b, unit="byte") for case, b in cases.items()]
    seen += [Seen(case=case, metric="activations saved", value=b, unit="byte") for case, b in kept.items()]
    mixed = cases["bfloat16, float32 masters"]
    return Finding(
        holds=mixed <= cases["float32"] / 2 * 1.01,
        because="activations are halved. With float32 masters, state grows: 2 + 4 + 8 bytes a parameter in place of "
        "4 + 8; without masters Adam's state stays float32",
        seen=seen,
    )


def saved(dtype: torch.dtype) -> int:
    """Bytes of activations (not weights) that autograd keeps for the backward."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(BLOCKS))).to(dtype)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)  # or its address would be another one's
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(torch.ones(64, WIDTH, dtype=dtype)).sum().backward()
    return sum(found.values())


def gradient(dtype: torch.dtype, parts: int, *, norm: bool = False) -> Tensor:
    """Of one batch of 64, as the mean over so many equal micro-batches."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, n, generator=generator, dtype=torch.float64).to(dtype) for n in (32, 1))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64) if norm else nn.Tanh(), nn.Linear(64, 1)).to(dtype)
    for inputs, targets in zip(x.chunk(parts), y.chunk(parts), strict=True):
        (mse_loss(model(inputs), targets) / parts).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def trained(strategy: str, world: int) -> Tensor:
    """All parameters after 3 steps of 8 leaves."""

    def rank_main(rank: int) -> Tensor:
        with init(strategy, leaves=8, seed=1, run_dir="none", device="cpu") as job:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 1))
            model, optimizer = job.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
            generator = torch.Generator().manual_seed(0)
            data = TensorDataset(*(torch.randn(192, n, generator=generator) for n in (32, 1)))
            for inputs, targets in job.loader(data, global_batch=64):
                mse_loss(model(inputs), targets).backward()
                optimizer.step()
                optimizer.zero_grad()
            with job.whole(model):
                return torch.cat([p.detach().flatten().clone() for p in model.parameters()])

    return run(world, rank_main)[0]


def accumulation_is_exact(_quick: bool) -> Finding:
    def apart(dtype: torch.dtype, *, norm: bool = False) -> float:
        whole = gradient(dtype, 1, norm=norm)
        return ((gradient(dtype, 8, norm=norm) - whole).norm() / whole.norm()).item()

    off = {"float32": apart(torch.float32), "float64": apart(torch.float64)}
    off["float64, batch norm"] = apart(torch.float64, norm=True)
    same = int((trained("ddp", 1) != trained("zero3", 4)).sum())
    seen = [
        Seen(case=f"8 x 8 against 64, {c}", metric="gradients apart", value=v, unit="of norm") for c, v in off.items()
    ]
    seen += [Seen(case="8 leaves: 1 rank against 4 (zero3)", metric="parameters differ", value=same, unit="element")]
    return Finding(
        holds=all(v == 0 for v in off.values()),
        because="sums are rounded in another order, and batch norm sees other batches. What is exact is the same "
        "micro-batches on other numbers of ranks, where the order of the sum is fixed, as shoal does",
        seen=seen,
    )


def order_is_nothing(_quick: bool) -> Finding:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(100_000, generator=generator) for _ in range(8)]
    rings = [torch.stack(leaves[r:] + leaves[:r]).unbind() for r in range(8)]
    line = sum(rings[0][1:], rings[0][0].clone())
    turned = sum(rings[3][1:], rings[3][0].clone())
    in_tree = [_tree(leaves, order) for order in (range(8), (5, 2, 7, 0, 1, 6, 3, 4))]
    differ = {
        "8 gradients, ring from rank 0 or 3": line != turned,
        "fixed tree, two orders of arrival": in_tree[0] != in_tree[1],
    }
    seen = [Seen(case=c, metric="sums differ", value=int(d.sum()), unit="element") for c, d in differ.items()]
    return Finding(
        holds=all(s.value == 0 for s in seen),
        because="floating-point addition is not associative: of 100,000 sums in float32 many change with the order; "
        "none does along a tree that hangs on the numbers of the leaves",
        seen=seen,
    )


def _tree(leaves: list[Tensor], order: range | tuple[int, ...]) -> Tensor:
    tree: Tree[Tensor] = Tree(len(leaves), lambda a, b: a + b)
    for leaf in order:
        tree.put_leaf(leaf, leaves[leaf])
    return tree.take()


def sampler_is_exact(_quick: bool) -> Finding:
    data = TensorDataset(torch.arange(10.0))
    given = [i for rank in range(4) for i in DistributedSampler(data, 4, rank, shuffle=False)]

    def rank_main(_rank: int) -> float:
        with init("ddp", leaves=4, run_dir="none", device="cpu") as job:
            model = nn.Linear(1, 1)
            model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            for (numbers,) in job.loader(data, global_batch=12, shuffle=False):
                model(numbers.view(-1, 1)).sum().backward()
                optimizer.step()
                mean = job.mean(numbers.mean())
            assert mean is not None
            return float(mean)

    means = {"torch's sampler": sum(given) / len(given), "job.loader": run(4, rank_main)[0]}
    seen = [Seen(case="0 to 9 on 4 ranks, torch's sampler", metric="handed out", value=len(given), unit="sample")]
    seen += [
        Seen(case=f"0 to 9 on 4 ranks, {c}", metric="mean of all", value=m, unit="of 4.5") for c, m in means.items()
    ]
    return Finding(
        holds=len(given) == 10,
        because="it repeats samples until all ranks have equally many, so a mean over them is not the data set's",
        seen=seen,
    )


CLAIMS = tuple(
    Claim(name=name, words=words, measure=measure)
    for name, words, measure in (
        ("zero-sends-less", "ZeRO sends less than DDP", sends_less),
        ("accumulation-sends-nothing", "gradient accumulation sends nothing more", accumulation_is_free),
        ("ddp-halves-memory", "DDP on two workers halves the memory", ddp_halves_memory),
        ("bfloat16-halves-memory", "mixed precision halves the memory", half_precision_halves_memory),
        ("accumulation-is-exact", "gradient accumulation equals a bigger batch exactly", accumulation_is_exact),
        ("order-is-nothing", "the order in which gradients are added does not matter", order_is_nothing),
        ("sampler-is-exact", "a distributed sampler shows every sample once an epoch", sampler_is_exact),
    )
)
