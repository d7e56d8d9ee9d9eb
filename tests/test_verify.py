"""The oracle itself: distances in ulps, and what it reports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shoal.errors import OrderError
from shoal.strategy import Cut, Shard, Strategy
from shoal.trace import Trace, Traced
from shoal.verify import compare, ulps, verify


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_neighbours_are_one_ulp_apart(dtype: torch.dtype) -> None:
    for value in (1.0, -1.0, 0.0, 3.75, -1e-6):
        x = torch.tensor([value], dtype=dtype)
        up = torch.nextafter(x, torch.tensor([float("inf")], dtype=dtype))
        assert ulps(x, up).tolist() == [1]
        assert ulps(up, x).tolist() == [1]


def test_zero_and_minus_zero_differ() -> None:
    assert ulps(torch.tensor([0.0]), torch.tensor([-0.0])).tolist() == [1]


def test_across_zero() -> None:
    tiny = torch.tensor([1e-45])
    assert ulps(-tiny, tiny).tolist() == [3]  # -tiny, -0, 0, tiny


def test_integers_and_complex_numbers() -> None:
    assert ulps(torch.tensor([3]), torch.tensor([7])).tolist() == [4]
    assert ulps(torch.tensor([1 + 1j]), torch.tensor([1 + 1j])).tolist() == [[0, 0]]


def test_the_first_difference_is_named() -> None:
    one = {"a": torch.zeros(2), "b": torch.ones(3)}
    two = {"a": torch.zeros(2), "b": torch.nextafter(torch.ones(3), torch.tensor([2.0, 0.5, 1.0]))}
    report = compare([one, two], [one, one])
    assert (report.equal, report.step, report.name, report.ulps, report.differing) == (False, 1, "b", 1, 2)
    assert str(report) == "different after step 1: 'b' by up to 1 ulps in 2 elements"
    assert str(compare([one, one], [one, one])) == "the same bits after each of 2 steps"


def test_what_is_no_number_is_told_in_words() -> None:
    one, other = {"a": torch.zeros(2)}, {"a": torch.zeros(2), "b": torch.zeros(1)}
    assert compare([one], [other]).why == "'b' is only in the run in one process"
    assert compare([other], [one]).why == "'b' is only in the run under test"
    shaped = compare([one], [{"a": torch.zeros(3, dtype=torch.bfloat16)}])
    assert str(shaped) == (
        "different after step 0: 'a' is float32 (2,) in the run under test, bfloat16 (3,) in one process"
    )
    counted = compare([one, one], [one])
    assert (counted.equal, counted.step) == (False, 1)
    assert counted.why == "2 steps in the run under test, 1 in one process"


@pytest.mark.parametrize(
    "strategy",
    [
        Strategy(shard=Shard.PARAMETERS, precision="bfloat16", masters=False, twig=2),
        Strategy(shard=Shard.OPTIMIZER, precision="float16", reduce="bfloat16", cut=Cut.PARAMETER, ranks_per_copy=2),
    ],
    ids=["without masters", "float16"],
)
def test_the_reference_keeps_all_that_is_part_of_the_numbers(strategy: Strategy) -> None:
    def loss(model: nn.Module, step: int, leaf: int) -> torch.Tensor:
        return model(torch.full((2, 4), 0.1 * step + leaf)).square().mean()

    report = verify(lambda: nn.Linear(4, 3), lambda p: torch.optim.SGD(p, lr=0.1), loss, strategy, leaves=6)
    assert (report.equal, report.steps) == (True, 3)


def test_a_trace_comes_back_in_the_models_order(tmp_path: Path) -> None:
    trace = Trace.asked(Trace(tmp_path, 2).variable())
    assert trace is not None
    first = {"w": torch.ones(2, dtype=torch.bfloat16), "a": torch.zeros(1), "tied": torch.ones(3)}
    models = {"one": first, "other": {"w": torch.ones(1)}}
    trace.take(0, Traced(leaves=4, device="cpu"), models)
    with pytest.raises(SystemExit) as left:
        trace.take(0, Traced(leaves=4, device="cpu"), models)
    assert left.value.code == 0
    assert trace.facts() == Traced(leaves=4, device="cpu")
    before, after = trace.states()
    assert list(before) == list(after) == ["one/w", "one/a", "one/tied", "other/w"]
    assert before["one/w"].equal(first["w"])
    assert compare([before], [after]).equal
    with pytest.raises(OrderError, match="a second job of one script"):
        Trace(tmp_path, 2).take(0, Traced(leaves=4, device="cpu"), models)


def test_names_of_the_package_are_not_hidden_by_the_module() -> None:
    program = "import shoal; shoal.Trial; assert callable(shoal.verify); assert shoal.Report.__name__ == 'Report'"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_settings_of_the_place_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared is what the caller says, wherever it is."""
    monkeypatch.chdir(tmp_path)
    Path("shoal.toml").write_text('version = 1\n[job]\nleaves = 3\nstrategy = "zero9"\n')

    def loss(model: nn.Module, step: int, leaf: int) -> Tensor:
        return model(torch.full((2, 3), float(step + leaf))).square().mean()

    report = verify(lambda: nn.Linear(3, 3), lambda ps: torch.optim.SGD(ps, lr=0.1), loss, "zero3", workers=2)
    assert report.equal
