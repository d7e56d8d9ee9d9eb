"""What is not here cannot be touched by accident: every access that a user might try, under zero3 and elsewhere."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parameters_to_vector, vector_to_parameters

import shoal
from shoal.comm.threads import run
from shoal.errors import AwayError, OrderError
from tests.engine.test_models import Stack, square
from tests.engine.trials import PLACES, assert_bits, inputs

Touch = Callable[[nn.Module], object]


def after_a_step(
    touch: Callable[[shoal.Job, nn.Module, torch.optim.Optimizer], object], place: str = "zero3", **kw: object
) -> list[object]:
    """Train one step, do something, train another."""
    world, strategy = PLACES[place]

    def rank_main(_rank: int) -> object:
        with shoal.init(strategy, run_dir="none", device="cpu", **kw) as job:
            model = Stack()
            model.count = nn.Parameter(torch.arange(3), requires_grad=False)
            model, optimizer = job.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
            square(model, 0, job.rank).backward()
            optimizer.step()
            optimizer.zero_grad()
            found = touch(job, model, optimizer)
            square(model, 1, job.rank).backward()
            optimizer.step()
            return found

    return run(world, rank_main)


def weight(model: nn.Module) -> nn.Parameter:
    return model.blocks[1].into.weight


# -------------------------------------------------------------------- what is still true of a parameter


def test_what_is_still_true() -> None:
    def touch(_job: shoal.Job, model: nn.Module, _optimizer: object) -> None:
        p = weight(model)
        assert (p.shape, p.dtype, p.device.type, p.numel(), p.dim()) == ((68, 68), torch.float32, "cpu", 4624, 2)
        assert p.requires_grad
        assert p.is_leaf
        assert isinstance(p, nn.Parameter)
        assert p.grad is None
        assert sum(q.numel() for q in model.parameters()) == sum(q.numel() for q in Stack().parameters()) + 3
        assert [n for n, _ in model.named_parameters()][1:] == [n for n, _ in Stack().named_parameters()]
        assert "Linear(in_features=68" in repr(model)

    after_a_step(touch)


READS: dict[str, Touch] = {
    "sum": lambda m: weight(m).sum(),
    "norm": lambda m: weight(m).norm(),
    "an element": lambda m: weight(m)[3, 4],
    "a row": lambda m: weight(m)[5],
    "data": lambda m: weight(m).data,
    "detach": lambda m: weight(m).detach() * 2,
    "clone": lambda m: weight(m).clone(),
    "a view": lambda m: weight(m).view(-1),
    "numpy": lambda m: torch.from_numpy(weight(m).detach().numpy().copy()),
    "list": lambda m: torch.tensor(weight(m).tolist()),
    "another dtype": lambda m: weight(m).double(),
    "a vector of all": lambda m: parameters_to_vector(m.blocks.parameters()),
    "a sum over all": lambda m: sum(p.square().sum() for p in m.parameters() if p.is_floating_point()),
    "a matrix product": lambda m: torch.ones(2, 68) @ weight(m).T,
    "a module of a block": lambda m: m.blocks[1].into(torch.ones(2, 68)),
    "printed": lambda m: torch.tensor(float("nan") if "nan" in f"{weight(m)}" and "nan" in repr(m.last.bias) else 0.0),
}


@pytest.mark.parametrize("name", READS)
def test_reads_are_nan(name: str) -> None:
    """Wrong numbers that nobody takes for right ones; the training goes on as if nothing had been read."""
    for value in after_a_step(lambda _job, model, _optimizer: READS[name](model)):
        assert value.isnan().all()


def test_whole_numbers_are_the_smallest() -> None:
    for value in after_a_step(lambda _job, model, _optimizer: model.count.clone()):
        assert value.tolist() == [torch.iinfo(torch.int64).min] * 3


WRITES: dict[str, tuple[Touch, str]] = {
    "add_": (lambda m: weight(m).data.add_(1.0), "more than one element"),
    "mul_": (lambda m: weight(m).data.mul_(2.0), "more than one element"),
    "copy_": (lambda m: weight(m).data.copy_(torch.ones(68, 68)), "more than one element"),
    "clamp_": (lambda m: weight(m).data.clamp_(0, 1), "more than one element"),
    "normal_": (lambda m: nn.init.normal_(weight(m)), "more than one element"),
    "xavier_uniform_": (lambda m: nn.init.xavier_uniform_(weight(m)), "more than one element"),
    "kaiming_normal_": (lambda m: nn.init.kaiming_normal_(weight(m)), "more than one element"),
    "orthogonal_": (lambda m: nn.init.orthogonal_(weight(m)), "more than one element"),
    "trunc_normal_": (lambda m: nn.init.trunc_normal_(weight(m)), "more than one element"),
    "reset_parameters": (lambda m: m.blocks[1].into.reset_parameters(), "more than one element"),
    "a leaf in place": (lambda m: weight(m).add_(1.0), "a leaf Variable that requires grad"),
    "fill_": (lambda m: weight(m).data.fill_(1.0), "something wrote to 'blocks.1.into.weight'"),
    "zero_": (lambda m: weight(m).data.zero_(), "something wrote to 'blocks.1.into.weight'"),
    "an element": (lambda m: weight(m).data[2].__setitem__(3, 1.0), "something wrote to 'blocks.1.into.weight'"),
    "nn.init.zeros_": (lambda m: nn.init.zeros_(weight(m)), "something wrote to 'blocks.1.into.weight'"),
    "nn.init.constant_": (lambda m: nn.init.constant_(m.last.bias, 3.0), "something wrote to 'last.bias'"),
    "ones_ of all": (lambda m: [nn.init.ones_(p) for p in m.blocks.parameters()], "something wrote to 'blocks.0.into.weight', "),
    "whole numbers": (lambda m: m.count.data.zero_(), "something wrote to 'count'"),
    "data =": (lambda m: setattr(weight(m), "data", torch.ones(68, 68)), "the values of 'blocks.1.into.weight' were replaced"),
    "half": (lambda m: m.half(), "were replaced by another tensor after prepare"),
    "from a vector": (lambda m: vector_to_parameters(torch.ones(4624), [weight(m)]), "the values of 'blocks.1.into.weight'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_writes_are_errors(name: str) -> None:
    """At once, by torch, or at the next gather, by shoal; never lost in silence."""
    touch, text = WRITES[name]
    with pytest.raises((AwayError, RuntimeError)) as e:
        after_a_step(lambda _job, model, _optimizer: touch(model))
    assert text in str(e.value)
    if isinstance(e.value, AwayError):
        assert "with job.whole(model, write=True)" in str(e.value)


@pytest.mark.parametrize("place", ["ddp", "zero1", "zero2"])
@pytest.mark.parametrize("name", ["data =", "half", "from a vector"])
def test_replaced_values_are_errors_everywhere(name: str, place: str) -> None:
    """What is updated would no longer be what the model computes with."""
    with pytest.raises(AwayError) as e:
        after_a_step(lambda _job, model, _optimizer: WRITES[name][0](model), place)
    assert "were replaced by another tensor after prepare" in str(e.value)
    assert "p.data = ..., model.to(), .half() or .double()" in str(e.value)


@pytest.mark.parametrize("place", PLACES)
def test_values_replaced_inside_whole_count(place: str) -> None:
    def touch(job: shoal.Job, model: nn.Module, _optimizer: object) -> Tensor:
        with job.whole(model, write=True):
            weight(model).data = torch.full((68, 68), 0.25)
            model.first.bias.data.fill_(0.5)
        with job.whole(model):
            return torch.cat([weight(model).flatten(), model.first.bias]).detach().clone()

    for found in after_a_step(touch, place):
        assert found.unique().tolist() == [0.25, 0.5]


# -------------------------------------------------------------------- state dicts and copies


Program = Callable[[shoal.Job, nn.Module, torch.optim.Optimizer], object]
STATES: dict[str, tuple[Program, str, str]] = {
    "model": (lambda _j, m, _o: m.state_dict(), "would hold placeholders", "job.state_dict(model)"),
    "block": (lambda _j, m, _o: m.blocks[0].state_dict(), "would hold placeholders", "job.state_dict(model)"),
    "load": (
        lambda _j, m, _o: m.load_state_dict({}, strict=False),
        "would write to placeholders",
        "with job.whole(model, write=True): model.load_state_dict(...)",
    ),
    "load a block": (
        lambda _j, m, _o: m.blocks[0].load_state_dict(m.blocks[0].__class__().state_dict()),
        "would write to placeholders",
        "with job.whole(model, write=True)",
    ),
    "optimizer": (lambda _j, _m, o: o.state_dict(), "only this rank's pieces", "job.state_dict(optimizer)"),
    "load optimizer": (
        lambda _j, _m, o: o.load_state_dict({"state": {}, "param_groups": []}),
        "takes whole state, and this rank holds pieces",
        "load it before prepare, which cuts it",
    ),
    "copy": (
        lambda _j, m, _o: copy.deepcopy(m),
        "a copy of this Stack would hold placeholders",
        "with job.whole(model)",
    ),
    "copy of a block": (lambda _j, m, _o: copy.deepcopy(m.blocks[0]), "a copy of this Block", "copy.deepcopy(model)"),
    "averaged model": (lambda _j, m, _o: torch.optim.swa_utils.AveragedModel(m), "a copy of this Stack", "job.whole"),
}


@pytest.mark.parametrize("name", STATES)
def test_state_that_is_not_whole(name: str) -> None:
    touch, what, remedy = STATES[name]
    for place in ("zero3", "hybrid"):
        with pytest.raises(AwayError) as e:
            after_a_step(touch, place)
        assert what in str(e.value)
        assert remedy in str(e.value)


@pytest.mark.parametrize("name", STATES)
def test_state_that_is_whole(name: str) -> None:
    """Under zero1 the model is whole, under ddp the optimizer too."""
    after_a_step(lambda j, m, o: STATES[name][0](j, m, o) if "load" not in name else None, "ddp")
    if "optimizer" in name:
        with pytest.raises(AwayError):
            after_a_step(STATES[name][0], "zero1")
    else:
        after_a_step(STATES[name][0], "zero1")


@pytest.mark.parametrize("name", ["model", "load"])
def test_state_in_a_narrower_dtype(name: str) -> None:
    with pytest.raises(AwayError, match="copies in a narrower dtype: what is trained lives apart from the model"):
        after_a_step(STATES[name][0], "ddp", precision="bfloat16")


@pytest.mark.parametrize("place", PLACES)
def test_a_copy_inside_whole_is_a_plain_module(place: str) -> None:
    """It has the values and none of shoal's hooks: it can be trained by itself, on one rank, saved, and pickled."""

    def touch(job: shoal.Job, model: nn.Module, _optimizer: object) -> bool:
        with job.whole(model):
            want = {k: v.clone() for k, v in model.state_dict().items()}
            twin = copy.deepcopy(model)
            part = copy.deepcopy(model.blocks[1])
        if job.rank == 1:
            optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
            for name, value in twin.state_dict().items():
                assert_bits(value, want[name], name)
            square(twin, 0, 0).backward()
            optimizer.step()
            assert not torch.equal(twin.first.weight, want["first.weight"])
            part(torch.ones(2, 68)).sum().backward()
            assert part.into.weight.grad is not None
            copy.deepcopy(twin)
        return True

    assert all(after_a_step(touch, place))


# -------------------------------------------------------------------- gradients


GRADIENTS: dict[str, Touch] = {
    "clip_grad_norm_": lambda m: clip_grad_norm_(m.parameters(), 1.0),
    "clip_grad_value_": lambda m: clip_grad_value_(m.parameters(), 1.0),
    "norm": lambda m: weight(m).grad.norm(),
    "data": lambda m: weight(m).grad.data,
    "mul_": lambda m: weight(m).grad.mul_(0.5),
    "clone": lambda m: weight(m).grad.clone(),
    "an element": lambda m: weight(m).grad[0],
    "a list of norms": lambda m: torch.stack([p.grad.norm() for p in m.parameters() if p.grad is not None]),
    "isnan": lambda m: torch.isnan(weight(m).grad).any(),
    "numpy": lambda m: weight(m).grad.numpy(),
    "tolist": lambda m: weight(m).grad.tolist(),
    "shape": lambda m: weight(m).grad.shape,
    "plus": lambda m: 1.0 + weight(m).grad,
    "format": lambda m: f"{weight(m).grad.sum():.3f}",
    "zero_grad without None": lambda m: m.zero_grad(set_to_none=False),
}


INSTEAD = {
    "clip_grad_norm_": "job.clip_grad_norm(max_norm) in its place clips and returns the true global norm",
    "clip_grad_value_": "job.clip_grad_value(limit) in its place",
    "zero_grad without None": "optimizer.zero_grad(), or model.zero_grad() as it is by default",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_no_tensors_of_this_rank(name: str, place: str) -> None:
    """In every strategy, so that torch's own clipping cannot silently do another thing than job.clip_grad_norm."""

    def rank_main(_rank: int) -> None:
        with shoal.init(PLACES[place][1], run_dir="none") as job:
            model = Stack()
            model, _ = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            square(model, 0, job.rank).backward()
            assert all("held by shoal until the step" in repr(p.grad) for p in model.parameters())
            GRADIENTS[name](model)

    with pytest.raises(AwayError) as e:
        run(PLACES[place][0], rank_main)
    assert "is not a whole tensor of this rank" in str(e.value)
    assert INSTEAD.get(name, "with job.gradients(): ... shows every p.grad whole") in str(e.value)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_grad_value_])
def test_pieces_have_no_gradients_before_the_step_either(clip: Callable[..., object], place: str) -> None:
    """Clipping what the optimizer holds would do nothing: the gradients are not there yet."""

    def rank_main(_rank: int) -> None:
        with shoal.init(PLACES[place][1], run_dir="none") as job:
            model = Stack()
            model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            square(model, 0, job.rank).backward()
            clip([p for group in optimizer.param_groups for p in group["params"]], 1.0)

    with pytest.raises(AwayError, match="is not a whole tensor of this rank"):
        run(PLACES[place][0], rank_main)


@pytest.mark.parametrize("place", PLACES)
def test_a_gradient_set_by_hand(place: str) -> None:
    """Without overlap it is this leaf's; with overlap the leaf's have been handed on."""

    def go(overlap: bool) -> Tensor:
        def rank_main(_rank: int) -> Tensor:
            with shoal.init(PLACES[place][1], run_dir="none", overlap=overlap) as job:
                model = nn.Linear(64, 2)
                model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
                for _ in range(2):
                    model(inputs(0, job.rank, 3, 64)).sum().backward()
                    model.bias.grad = torch.full((2,), float(job.rank))
                    optimizer.step()
                state = job.state_dict(model)
                return state["bias"] if job.rank == 0 else torch.empty(0)

        return run(PLACES[place][0], rank_main)[0]

    shoal.seed(0, 0)
    start = nn.Linear(64, 2).bias.detach()
    mean = sum(range(PLACES[place][0])) / PLACES[place][0]
    assert torch.allclose(go(False), start - 2 * mean)
    with pytest.raises(OrderError, match="gradients had been handed on"):
        go(True)


# -------------------------------------------------------------------- no segmentation faults

DANGEROUS = """
import sys
sys.path.insert(0, {root!r})
import torch, shoal
from shoal.comm.threads import run
from tests.engine.test_models import Stack, square

def rank_main(rank):
    with shoal.init("zero3", run_dir="none") as job:
        model = Stack()
        model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        kept = []
        for step in range(3):
            with job.whole(model):
                kept += [p.detach() for p in model.parameters()] + [model.first.weight.T, model.first.weight[2]]
                kept += [p.view(-1)[:3] for p in model.parameters()]
            square(model, step, rank).backward()
            print(model.last.weight, list(model.blocks[0].parameters()), model.last.weight.grad)
            optimizer.step()
            print(model.last.weight, optimizer.param_groups)
            for p in model.parameters():
                values = p.detach()
                str(p), bytes(p.untyped_storage()), values.numpy().sum(), values.tolist(), values.flatten().sort()
                values.contiguous().view(-1), values.double(), values.t() if p.dim() == 2 else None, torch.save(p, "/dev/null")
            torch.nn.functional.linear(torch.ones(2, 68), model.last.weight).sum()
            unused = model(torch.ones(2, 5)); del unused
            optimizer.step()
        for tensor in kept:
            assert tensor.isfinite().all()
            tensor.clone().add_(1)
        return True

assert run(2, rank_main) == [True, True]
print("fine")
"""


def test_no_segmentation_fault(request: pytest.FixtureRequest) -> None:
    """References kept from `whole`, prints in mid-leaf, numpy and raw storage, graphs that are thrown away."""
    script = DANGEROUS.format(root=str(request.config.rootpath))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("fine\n")
