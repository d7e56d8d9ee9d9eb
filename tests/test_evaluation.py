"""`job.evaluate`: each sample once, and no rank waits for nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

import shoal
from shoal.comm.threads import run
from shoal.errors import BatchError, DivergedError, OrderError, SettingError
from shoal.evaluation import Evaluation
from shoal.metrics import Loss
from tests.test_collectives import together


def data(count: int) -> TensorDataset:
    g = torch.Generator().manual_seed(count)
    return TensorDataset(torch.randn(count, 6, generator=g), torch.randint(3, (count,), generator=g))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 40), nn.Sequential(nn.Tanh(), nn.Dropout(0.5)), nn.Linear(40, 3))


class Seen:
    """The user's own metric: which samples were seen, in which order."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.seen: list[Tensor] = []

    def update(self, outputs: Tensor, _targets: Tensor) -> None:
        self.seen.append(outputs)

    def compute(self) -> list[float]:
        return torch.cat(self.seen).flatten().tolist()


def numbers(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count).float()[:, None], torch.zeros(count))


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(numbers(11))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["loader", "short", "stream", "list", "prepared", "distributed", "empty ranks"])
def test_every_sample_is_counted_once(kind: str, world: int) -> None:
    """In the order of the loader, whoever saw it: uneven last batches, fewer batches than ranks, streams."""

    def body(job: shoal.Job) -> Evaluation:
        set_ = numbers(11)
        loader: object = {
            "loader": lambda: DataLoader(set_, batch_size=1),
            "short": lambda: DataLoader(set_, batch_size=4),
            "stream": lambda: DataLoader(Stream(), batch_size=2),
            "list": lambda: [(torch.tensor([[float(i)]]), torch.zeros(1)) for i in range(11)],
            "prepared": lambda: job.loader(set_, global_batch=2 * job.world_size, shuffle=False),
            "distributed": lambda: DataLoader(
                set_, batch_size=2, sampler=torch.utils.data.DistributedSampler(set_, 2, 0, shuffle=False)
            ),
            "empty ranks": lambda: DataLoader(set_, batch_size=6),
        }[kind]()
        return job.evaluate(nn.Identity(), loader, {"seen": Seen()})

    for found in together(world, body, order=world):
        assert found.values["seen"] == list(range(11))
        assert found.samples == 11


def test_a_shuffled_loader_gives_one_order() -> None:
    def body(job: shoal.Job) -> object:
        once = job.evaluate(nn.Identity(), DataLoader(numbers(20), batch_size=3, shuffle=True), {"seen": Seen()})
        loader = DataLoader(numbers(20), batch_size=3, sampler=RandomSampler(numbers(20)))
        assert job.evaluate(nn.Identity(), loader, {"seen": Seen()}).values == once.values
        return once.values["seen"]

    one = together(1, body)[0]
    assert sorted(one) == list(range(20)) != one
    assert together(3, body) == [one] * 3


def test_torchmetrics() -> None:
    def body(job: shoal.Job) -> Evaluation:
        model = net()
        mine = torchmetrics.classification.MulticlassF1Score(3, average="macro")
        return job.evaluate(model, DataLoader(data(50), batch_size=8), {"theirs": mine, "ours": "f1"})

    found = together(2, body)[0]
    assert found["theirs"] == pytest.approx(found["ours"], rel=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_training_goes_on_as_if_nothing_had_been(strategy: str) -> None:
    """Evaluating after some steps, with loader positions, modes and random numbers as they were."""

    def rank_main(often: bool) -> dict[str, Tensor]:
        with shoal.init(strategy, leaves=2, run_dir="none", device="cpu") as job:
            model = net()
            model, optimizer = job.prepare(model, torch.optim.AdamW(model.parameters()))
            model[1][1].eval()
            train, held = job.loader(data(32), global_batch=8), DataLoader(data(13), batch_size=4)
            for x, y in train:
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                if often and job.stepped:
                    job.evaluate(model, held, ["accuracy"])
                    job.evaluate(model, train, ["accuracy"])
                    assert [m.training for m in model.modules()] == [True, True, True, True, False, True]
            return job.state_dict(model)

    plain, evaluated = (run(2, lambda _rank, often=often: rank_main(often))[0] for often in (False, True))
    for name, value in plain.items():
        assert torch.equal(value, evaluated[name]), name


def test_no_dropout_and_no_gradients() -> None:
    def body(job: shoal.Job) -> tuple[float, float]:
        model = net()
        wants: list[bool] = []

        def predict(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            outputs = model(batch[0])
            wants.append(outputs.requires_grad)
            return outputs, batch[1]

        loader = DataLoader(data(9), batch_size=4)
        found = [job.evaluate(model, loader, {"loss": nn.CrossEntropyLoss()}, predict=predict)["loss"] for _ in "ab"]
        assert not any(wants)
        return found[0], found[1]

    first, second = together(1, body)[0]
    assert first == second


def test_what_a_batch_may_be() -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Known(nn.Module):
        def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor | Output:
            return Output(x * scale) if isinstance(scale, Tensor) else x

    x = torch.eye(3)
    y = torch.tensor([0, 1, 1])
    batches = [{"x": x, "scale": torch.ones(3, 1), "labels": y}]
    triples = [(x, torch.ones(3, 1), y)]

    def body(job: shoal.Job) -> None:
        assert job.evaluate(Known(), batches, ["accuracy"])["accuracy"] == 2 / 3
        with pytest.raises(SettingError, match="outputs of Output"):
            job.evaluate(Known(), triples, ["accuracy"])
        with pytest.raises(BatchError, match=r"a batch that is a Tensor[\s\S]*predict="):
            job.evaluate(Known(), [x], ["accuracy"])

    together(1, body)


def test_what_is_shown() -> None:
    found = Evaluation(values={"f1": [0.5, 1.0], "loss": 0.123456, "t": torch.tensor(2.0)}, samples=7, batches=2)
    assert str(found) == "f1 [0.5, 1.0]  loss 0.1235  t 2  (7 samples)"
    assert found["t"] == 2.0
    with pytest.raises(SettingError, match=r"'f1' is no single number but a list[\s\S]*found.values\['f1'\]"):
        found["f1"]


def test_refusals() -> None:
    def empty(job: shoal.Job) -> None:
        job.evaluate(net(), [], ["accuracy"])

    with pytest.raises(BatchError, match="the loader has no batches"):
        together(2, empty)
    with pytest.raises(SettingError, match=r"metrics='accuracy'[\s\S]*a list or a dict"):
        together(1, lambda job: job.evaluate(net(), [], "accuracy"))
    with pytest.raises(DivergedError, match=r"rank 0 read 1 batches, rank 1 read 2 batches[\s\S]*takes its share"):
        together(2, lambda job: job.evaluate(nn.Identity(), [next(iter(DataLoader(data(3))))] * (job.rank + 1), {"a": Loss(lambda o, _t: o.sum())}))  # fmt: skip
    with pytest.raises(
        DivergedError, match=r"rank 0 job.evaluate of Sequential: accuracy; 3 batches; rank 1 job.ev[\s\S]*: f1;"
    ):
        together(2, lambda job: job.evaluate(net(), DataLoader(data(3)), ["f1" if job.rank else "accuracy"]))


def test_not_in_the_middle_of_a_step() -> None:
    def body(job: shoal.Job) -> None:
        model = net()
        model, _ = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        model(torch.zeros(1, 6))
        job.evaluate(model, DataLoader(data(3)), ["accuracy"])

    with pytest.raises(OrderError, match=r"job.evaluate in the middle of a step[\s\S]*job.stepped"):
        together(1, body)


def test_inside_an_average_it_measures_the_average() -> None:
    def body(job: shoal.Job) -> tuple[float, float]:
        model = net()
        model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=5.0))
        average = job.ema(model, 1 - 1e-9)
        loader, metrics = DataLoader(data(9), batch_size=2), {"loss": nn.functional.cross_entropy}
        before = job.evaluate(model, loader, metrics)["loss"]
        for x, y in loader:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        with average.whole():
            inside = job.evaluate(model, loader, metrics)["loss"]
        assert job.evaluate(model, loader, metrics)["loss"] != before
        return before, inside

    for before, inside in together(2, body, strategy="zero3"):
        assert before == pytest.approx(inside, rel=1e-4)
