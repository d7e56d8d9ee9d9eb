"""`job.load_pretrained` fills models in shards with weights from anywhere."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from enum import Enum
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn

import shoal
from shoal.comm.threads import run
from shoal.errors import CheckpointError, DamagedError, ResumeError
from shoal.pretrained.fill import Pretrained

State = dict[str, Tensor]


class Net(nn.Module):
    """Tied weights, buffers of both kinds, a frozen parameter, odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 37)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(37, 70), nn.Linear(70, 37)) for _ in range(2))
        self.blocks[0][0].weight.requires_grad_(False)
        self.norm = nn.BatchNorm1d(37)
        self.out = nn.Linear(37, 11, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("mask", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        return self.out(self.norm(h))


def weights() -> State:
    torch.manual_seed(7)
    net = Net()
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.norm.num_batches_tracked.fill_(9)
    return net.state_dict()


def untied(state: State) -> State:
    return {n: t.clone() for n, t in state.items() if n != "out.weight"}


def filled(path: Path, world: int = 2, strategy: str = "zero3", **kw: object) -> tuple[State, Pretrained]:
    def rank_main(_rank: int) -> tuple[State, Pretrained]:
        with shoal.init(strategy, run_dir="none", device="cpu") as job:
            model = Net()
            model, _ = job.prepare(model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad))
            report = job.load_pretrained(path, **kw)
            return job.state_dict(model), report

    return run(world, rank_main)[0]


def assert_filled(path: Path, want: State, **kw: object) -> None:
    got, report = filled(path, **kw)
    assert not report.missing
    assert not report.extra
    for name, value in want.items():
        assert torch.equal(got[name], value), name


# ---------------------------------------------------------------- what can be read


def as_safetensors(state: State, path: Path) -> Path:
    save_file(untied(state), path / "weights.safetensors")
    return path / "weights.safetensors"


def as_directory(state: State, path: Path) -> Path:
    save_file(untied(state), path / "model.safetensors")
    return path


def as_other_name_of_the_tied(state: State, path: Path) -> Path:
    save_file({n: t.clone() for n, t in state.items() if n != "embed.weight"}, path / "x.safetensors")
    return path


def as_index(state: State, path: Path) -> Path:
    names = list(untied(state))
    files = {n: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        save_file({n: state[n].clone() for n in names if files[n] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return path


def as_bin_index(state: State, path: Path) -> Path:
    torch.save(state, path / "part.bin")
    index = {"weight_map": dict.fromkeys(state, "part.bin")}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return path / "pytorch_model.bin.index.json"


def as_pt(state: State, path: Path) -> Path:
    torch.save(state, path / "weights.pt")
    return path / "weights.pt"


def as_training_state(state: State, path: Path) -> Path:
    torch.save({"model": state, "epoch": 3, "optimizer": {"state": {}}}, path / "last.ckpt")
    return path / "last.ckpt"


def as_universal(state: State, path: Path) -> Path:
    for name, value in state.items():
        (path / "global_step3_universal/zero" / name).mkdir(parents=True)
        torch.save({"param": value}, path / "global_step3_universal/zero" / name / "fp32.pt")
    (path / "latest_universal").write_text("global_step3_universal")
    return path


KINDS = [
    as_safetensors, as_directory, as_other_name_of_the_tied, as_index, as_bin_index, as_pt, as_training_state,
    as_universal,
]  # fmt: skip


@pytest.mark.parametrize("write", KINDS, ids=lambda f: f.__name__)
def test_weights_from_anywhere(write: Callable[[State, Path], Path], tmp_path: Path) -> None:
    assert_filled(write(weights(), tmp_path), weights())


@pytest.mark.parametrize(("world", "strategy"), [(1, "ddp"), (2, "ddp"), (3, "zero1"), (3, "zero3")])
def test_into_every_strategy(world: int, strategy: str, tmp_path: Path) -> None:
    assert_filled(as_pt(weights(), tmp_path), weights(), world=world, strategy=strategy)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # when saving
@pytest.mark.parametrize("beside", [False, True])
def test_torch_distributed(beside: bool, tmp_path: Path) -> None:
    """Alone, or as "model" beside an optimizer."""
    dcp.save(
        {"model": weights(), "optimizer": {"x": torch.zeros(2)}} if beside else weights(),
        checkpoint_id=tmp_path / "d",
        no_dist=True,
    )
    with pytest.raises(CheckpointError, match=r"whose .metadata is a pickle[\s\S]*trust=True"):
        filled(tmp_path / "d")
    assert_filled(tmp_path / "d", weights(), trust=True)


class LossScaler:
    """Stands for an object of DeepSpeed's in its files."""


class ZeroStageEnum(int, Enum):
    """The stage is one, too."""

    one, two, three = 1, 2, 3


def write_zero(state: State, path: Path, stage: int, ranks: int, paddings: list[int] | None = None) -> Path:
    """The folder of a step as DeepSpeed lays it out; `paddings` after each parameter."""
    folder = path / "global_step7"
    folder.mkdir()
    (path / "latest").write_text("global_step7")
    net = Net()
    frozen = "blocks.0.0.weight"
    trained = {n: state[n] for n, p in net.named_parameters() if n != frozen}
    groups = [{n: t for n, t in trained.items() if t.dim() > 1}, {n: t for n, t in trained.items() if t.dim() == 1}]
    parts: list[list[Tensor]] = [[] for _ in range(ranks)]
    for group in groups:
        if stage < 3:
            padded = [
                nn.functional.pad(t.reshape(-1), (0, (paddings or [0] * 99)[i])) for i, t in enumerate(group.values())
            ]
            flat = torch.cat(padded)
            flat = nn.functional.pad(flat, (0, -len(flat) % (2 * ranks)))
            for rank, part in enumerate(flat.chunk(ranks)):
                parts[rank].append(part.clone())
            continue
        pieces = [cut(t, ranks) for t in group.values()]
        for rank in range(ranks):
            parts[rank].append(torch.cat([p[rank] for p in pieces]))
    shapes = [{n: t.shape for n, t in group.items()} for group in groups]
    for rank in range(ranks):
        optimizer: dict[str, object] = {
            "zero_stage": ZeroStageEnum(stage),
            "partition_count": ranks,
            "loss_scaler": LossScaler(),
        }
        optimizer["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"] = parts[rank]
        if paddings:
            optimizer["param_alignment_paddings"] = [paddings[: len(g)] for g in groups]
        torch.save({"optimizer_state_dict": optimizer}, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        whole = {n: t.clone() for n, t in state.items() if stage < 3 or n.startswith("norm.")}
        model = {
            "module": whole, "param_shapes": shapes,
            "buffer_names": ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"],
            "shared_params": {"out.weight": "embed.weight"}, "frozen_param_shapes": {frozen: state[frozen].shape},
            "frozen_param_fragments": {frozen: cut(state[frozen], ranks)[rank] if stage == 3 else state[frozen]},
        }  # fmt: skip
        if stage == 1:
            model["frozen_param_shapes"] = model["frozen_param_fragments"] = None
        if stage == 3:
            torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        elif rank == 0:
            torch.save(model, folder / "mp_rank_00_model_states.pt")
    return path


def cut(tensor: Tensor, ranks: int) -> list[Tensor]:
    """Equal parts, the last ones padded."""
    each = math.ceil(tensor.numel() / ranks)
    return [p.clone() for p in nn.functional.pad(tensor.reshape(-1), (0, each * ranks - tensor.numel())).split(each)]


@pytest.mark.parametrize(
    ("stage", "ranks", "paddings"),
    [(1, 2, None), (2, 3, None), (2, 2, [0, 3, 1, 5, 2, 7, 1, 1, 1]), (3, 2, None), (3, 11, None)],
)
def test_deepspeed(
    stage: int, ranks: int, paddings: list[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The objects of DeepSpeed's in the files are left out: it need not be installed. Rank 10 comes after rank 9."""
    for kind in (LossScaler, ZeroStageEnum):
        monkeypatch.setattr(kind, "__module__", "deepspeed.runtime.fp16.loss_scaler")
    monkeypatch.setattr(pickle, "whichmodule", lambda _obj, _name: "deepspeed.runtime.fp16.loss_scaler", raising=False)
    path = saved_with_foreign_objects(lambda: write_zero(weights(), tmp_path, stage, ranks, paddings))
    monkeypatch.undo()
    with pytest.raises(
        CheckpointError, match=r"is a ZeRO checkpoint of DeepSpeed, whose files are pickles[\s\S]*trust"
    ):
        filled(path)
    assert_filled(path, weights(), trust=True)
    next((path / "global_step7").glob("*rank_1_mp_rank_00_optim_states.pt")).unlink()
    with pytest.raises(CheckpointError, match=rf"holds {ranks - 1} of {ranks} files"):
        filled(path, trust=True)


def saved_with_foreign_objects(write: Callable[[], Path]) -> Path:
    """Pickling looks the class up where it says it is from."""
    import sys
    from types import ModuleType

    names = ["deepspeed", "deepspeed.runtime", "deepspeed.runtime.fp16", "deepspeed.runtime.fp16.loss_scaler"]
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = ModuleType(name)
    for kind in (LossScaler, ZeroStageEnum):
        setattr(sys.modules[names[-1]], kind.__name__, kind)
    try:
        return write()
    finally:
        for name in names:
            del sys.modules[name]
            if before[name] is not None:
                sys.modules[name] = before[name]


# ---------------------------------------------------------------- into what


def test_a_meta_model_in_bfloat16_goes_on_training(tmp_path: Path) -> None:
    """Masters take the file's float32; the average begins with it."""
    path = as_pt(weights(), tmp_path)

    def rank_main(_rank: int) -> tuple[State, State]:
        with shoal.init("zero3", run_dir="none", device="cpu", precision="bfloat16") as job:
            with torch.device("meta"):
                model = Net()
            model, optimizer = job.prepare(
                model, torch.optim.SGD(model.parameters(), lr=0.0), fill=lambda _module: None
            )
            average = job.ema(model, 0.5)
            job.load_pretrained(path, model)
            model(torch.arange(4)).sum().backward()
            optimizer.step()
            return job.state_dict(model), job.state_dict(average)

    got, average = run(2, rank_main)[0]
    trained = {n: v for n, v in weights().items() if "running" not in n and "num_batches" not in n}
    for name, value in trained.items():
        assert torch.equal(got[name], value), name
        assert torch.equal(average[name].to(value.dtype), value), name


def test_channels_last(tmp_path: Path) -> None:
    torch.manual_seed(3)
    want = nn.Conv2d(5, 7, 3).state_dict()
    torch.save(want, tmp_path / "conv.pt")

    def rank_main(_rank: int) -> State:
        with shoal.init("zero3", run_dir="none", device="cpu") as job:
            model = nn.Conv2d(5, 7, 3).to(memory_format=torch.channels_last)
            model, _ = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            job.load_pretrained(tmp_path / "conv.pt")
            return job.state_dict(model)

    got = run(2, rank_main)[0]
    assert torch.equal(got["weight"], want["weight"])


def test_names_that_differ(tmp_path: Path) -> None:
    state = untied(weights())
    state["head.weight"] = state.pop("norm.weight")
    path = as_pt(state, tmp_path)
    with pytest.raises(
        ResumeError, match=r"are not those of this Net: missing: norm.weight; extra: head.weight[\s\S]*strict=False"
    ):
        filled(path)
    got, report = filled(path, strict=False)
    assert (report.missing, report.extra) == (("norm.weight",), ("head.weight",))
    assert str(report) == "13 tensors loaded; missing: norm.weight; extra: head.weight"
    assert torch.equal(got["norm.weight"], torch.ones(37))
    assert torch.equal(got["embed.weight"], state["embed.weight"])
    assert_filled(path, weights(), rename=lambda name: name.replace("head", "norm"))


def test_shapes_that_differ_are_refused_even_if_not_strict(tmp_path: Path) -> None:
    state = weights()
    state["norm.weight"] = torch.zeros(5)
    with pytest.raises(ResumeError, match=r"of another shape: norm.weight \(\(5,\) there, \(37,\) here\)"):
        filled(as_pt(state, tmp_path), strict=False)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("I was run",)


def test_what_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(path: Path, message: str, kind: type[Exception] = CheckpointError) -> None:
        with pytest.raises(kind, match=message):
            filled(path)

    refused(tmp_path / "nothing.pt", "there are no weights at")
    refused(tmp_path, r"there are no weights in [\s\S]*it holds nothing[\s\S]*job.load for checkpoints of shoal")
    torch.save({"model": weights(), "evil": Evil()}, tmp_path / "evil.pt")
    refused(tmp_path / "evil.pt", r"evil.pt holds pickled objects besides weights[\s\S]*run code[\s\S]*trust=True")
    assert "I was run" not in capsys.readouterr().out
    torch.save({"epoch": 3, "net": 5}, tmp_path / "none.pt")
    refused(tmp_path / "none.pt", r"none.pt holds no state dict: it is a dict of epoch, net[\s\S]*model_state_dict")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "evil.pt").read_bytes()[:1000])
    refused(tmp_path / "cut.pt", "cut.pt cannot be read")
    (tmp_path / "weights.txt").write_text("")
    refused(tmp_path / "weights.txt", r"is of no known kind[\s\S]*.safetensors")
    (tmp_path / "x.index.json").write_text("{}")
    refused(tmp_path / "x.index.json", r"is no index of weights: KeyError")
    (tmp_path / "y.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/x.safetensors"}}))
    refused(tmp_path / "y.index.json", r"names a file outside of its directory: \.\./\.\./etc")
    (tmp_path / "bad.safetensors").write_bytes(b"not one")
    refused(tmp_path / "bad.safetensors", "bad.safetensors cannot be read")
    for name in ("a", "b"):
        (tmp_path / "u/zero" / name).mkdir(parents=True)
        torch.save([1], tmp_path / "u/zero" / name / "fp32.pt")
    refused(tmp_path / "u", r"fp32.pt holds no parameter")
    assert issubclass(DamagedError, CheckpointError)


def test_ranks_that_see_different_files(tmp_path: Path) -> None:
    as_pt(weights(), tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    torch.save({**weights(), "more": torch.zeros(1)} | {"norm.weight": torch.zeros(37)}, other / "weights.pt")
    state = weights()
    del state["norm.weight"]
    torch.save(state, other / "weights.pt")

    def rank_main(rank: int) -> None:
        with shoal.init("zero3", run_dir="none", device="cpu") as job:
            model = Net()
            model, _ = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            job.load_pretrained((other if rank else tmp_path) / "weights.pt", strict=False)

    with pytest.raises(CheckpointError, match="holds other names on rank 0 than on other ranks"):
        run(2, rank_main)
