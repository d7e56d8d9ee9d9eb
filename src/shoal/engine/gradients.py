"""The gradients of one step: out of the user's parameters, into sums over leaves, to the owners of shards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from functools import partial

import torch
from torch import Tensor

from shoal.comm.crossover import one_round_for
from shoal.comm.group import Common, Pending
from shoal.comm.meet import Meeting
from shoal.comm.mesh import Mesh
from shoal.comm.pool import Pool
from shoal.engine.away import AwayGrad
from shoal.engine.cells import local_gradient
from shoal.engine.exchange import agree, swap
from shoal.engine.fast import Axes, Fast
from shoal.engine.journeys import Gate, Journeys
from shoal.engine.leaf import Leaf
from shoal.engine.one_round import OneRound
from shoal.engine.scale import LossScale, Overflow
from shoal.engine.strips import not_finite, strips_of
from shoal.engine.sums import Flow, Mean, Sum, Sums, between, drain, even_bounds, keep, new_tree, own
from shoal.engine.turns import Turns
from shoal.engine.unit import Unit
from shoal.engine.weights import Weights
from shoal.errors import OrderError
from shoal.leaves import Node, Weighed
from shoal.rules import Moment, Op, Rules


class Gradients:
    """All gradients of one model on this rank.

    Between two moments at which the user may see them, parameters and pieces carry an `AwayGrad` instead.

    Args:
        units: of the model; those that are not trained are left out.
        mesh: the grid of ranks.
        meeting: where ranks tell each other the weights of their leaves.
        rules: those of the moment after backward say what travels, and in which turn.
        number: of the model in its job.
        scale: of losses, by which gradients are divided as they are taken.
        axes: who adds up, where numerics are fast; None: we do.
        layerwise: is a unit updated as soon as its gradients are there? All ranks then hear with them what was touched,
            and one unit's gradients at a time are under way.
    """

    def __init__(
        self, units: Sequence[Unit], mesh: Mesh, meeting: Meeting, rules: Rules, number: int,
        scale: LossScale | None, axes: Axes | None = None, *, layerwise: bool = False,
    ) -> None:  # fmt: skip
        self.layerwise = layerwise
        self.touched, self.told = set[str](), set[str]()  # in this step: by this rank's leaves, by any as far as known
        self.number, self.scale = number, scale
        self.overflow: Overflow | None = None  # of this step, on this rank
        self.units = [u for u in units if u.trainable]
        self.mesh = mesh
        self.rules = [r for r in rules if r.moment is Moment.AFTER_BACKWARD]
        self.names = [n for u in self.units for n in u.params]
        self.pool = Pool(kept=1)
        self.fast = None if axes is None else Fast(mesh, axes, self.pool)
        largest = max((u.numel * u.dtypes.reduce.itemsize for u in self.units), default=0)
        carrier = mesh.world.carrier
        limit = largest if layerwise else carrier.plenty
        self.journeys = Journeys(carrier.levels, ordered=carrier.ordered, limit=limit)
        self.at_once = OneRound(mesh.copies, self.units) if axes is None and self._in_one_round() else None
        self.weights = Weights(mesh, meeting, number, self.journeys, voted=self.at_once is not None)
        guard = partial(AwayGrad, layerwise=layerwise)
        self.guards = {n: guard(p, n, self._accumulate) for u in self.units for n, p in u.params.items()}
        self.piece_guards = {u.index: [(p, guard(p, n)) for n, p in u.pieces.items()] for u in self.units}
        self.held: dict[str, Tensor] = {}  # of this leaf, between two backward calls
        self.added: set[str] = set()  # those of them that autograd has added to, and nobody has seen yet
        self.stale: set[str] = set()  # parameters with gradients that the user should have zeroed
        self.results: dict[int, Mean] = {}
        self.commons: dict[int, Common | None] = {}
        self.in_common = False  # may pieces have gradients that lie in memory of several ranks?
        for unit in self.units:
            self._guard_pieces(unit)

    def _in_one_round(self) -> bool:
        """Does one round of all to all take less time than two? Of a large model most rounds pass unseen."""
        copies, nbytes = self.mesh.copies, sum(u.numel * u.dtypes.reduce.itemsize for u in self.units)
        whole = self.mesh.shard.size == 1 and any(r.op is Op.AGREE for r in self.rules)
        if self.layerwise or not whole or not 0 < nbytes <= self.journeys.limit:
            return False
        common = copies.common(1, torch.uint8, self.units[0].device)
        if common is not None:  # no round at all
            common.release()
        return common is None and one_round_for(copies, nbytes)

    def begin(self, turns: Turns) -> None:
        """A step begins."""
        self.overflow = None
        self.touched, self.told = set[str](), set[str]()
        self.turns = turns
        self.mine: dict[int, Sums] = {u.index: new_tree(turns.twigs) for u in self.units}
        self.sums: dict[int, Sums] = {u: new_tree(turns.twigs) for u in self.mine}
        self.growing: dict[int, tuple[int, Weighed[Sum]]] = {}  # per unit: leaves so far of the twig, and their sum
        self.weights.begin(turns)

    # ---------------------------------------------------------------- in a leaf

    def _accumulate(self, name: str, grad: Tensor) -> Tensor:
        """Autograd adds to a guard: it means what earlier backward calls of this leaf left there."""
        if name in self.stale:
            raise _not_zeroed(name)
        held = self.held.get(name)
        if held is None:
            self.held[name] = grad.clone()  # others may have it, too
        elif torch.is_grad_enabled():  # create_graph=True
            self.held[name] = held + grad
        else:
            held.add_(grad)
        self.added.add(name)
        return self.held[name]

    def show(self, name: str, param: Tensor) -> None:
        """Autograd has added to `param.grad`: in a backward call, all may see it."""
        if name in self.added:
            self.added.discard(name)
            param.grad = self.held.pop(name)
        self.stale.discard(name)

    def hide(self) -> None:
        """Nobody may see this leaf's gradients between two backward calls."""
        held, guards = self.held, self.guards
        for unit in self.units:
            for name, param in unit.params.items():
                grad = param.grad
                if grad is not None and grad is not (guard := guards[name]):
                    held[name], param.grad = grad, guard

    def discard(self, names: Collection[str], leaf: Leaf | None) -> None:
        """`zero_grad()` for `names`: in mid-leaf, forget what this leaf has gathered for them."""
        self.stale.difference_update(names)
        if leaf is None or not leaf.touched.intersection(names):
            return
        if leaf.done:
            raise _too_late()
        for name in names:
            self.held.pop(name, None)
        leaf.touched.difference_update(names)
        if not leaf.touched:
            leaf.fresh.clear()
            leaf.record.forget_gradients()

    def drop_held(self, leaf: Leaf) -> None:
        """What a leaf for another model's sake left in this one's gradients must be zeroed by the user, as ever."""
        self.stale |= {n for n in leaf.touched if n in self.held}
        self.held.clear()

    def check_kept(self, unit: Unit, leaf: Leaf) -> None:
        """`p.grad = None` and the module's own `zero_grad()` tell nobody."""
        if unit.index in leaf.done:
            for name in leaf.touched & unit.params.keys():
                if unit.params[name].grad is not self.guards[name]:
                    raise _too_late()

    def take(self, unit: Unit, leaf: Leaf) -> None:
        """Move a unit's gradients of this leaf from the parameters into its sums."""
        if unit.index in leaf.done:
            return
        leaf.done.add(unit.index)
        grads: dict[str, Tensor] = {}
        for name, param in unit.params.items():
            held, grad, guard = self.held.pop(name, None), param.grad, self.guards[name]
            if grad is guard:
                grad = held
            elif grad is not None:
                param.grad = guard
            if grad is not None:
                grads[name] = local_gradient(grad, param)
        if leaf.number is not None:
            self.touched |= leaf.touched & unit.params.keys() if leaf.weight else set()
            value = Sum(self._unscaled(unit, strips_of(unit, grads), leaf.number)) if leaf.weight else None
            self._put(unit, leaf.number, Weighed(value, leaf.weight if leaf.weight else None))
        if self._last(leaf):
            for absent in self.turns.absent(self.mesh.cell):
                self._put(unit, absent, Weighed(None))

    def _put(self, unit: Unit, leaf: int, value: Weighed[Sum]) -> None:
        """Into the twig's sum, from left to right; a whole twig goes into the tree."""
        tree, twig = self.mine[unit.index], leaf // self.turns.twig
        count, total = self.growing.pop(unit.index, (0, None))
        total = value if total is None else tree.add(total, value)
        if count + 1 == self.turns.twig_size(twig):
            tree.put_leaf(twig, total)
        else:
            self.growing[unit.index] = (count + 1, total)

    def _unscaled(self, unit: Unit, strips: list[Tensor], leaf: int) -> list[Tensor]:
        """Divided by the loss scale; what has overflowed is remembered."""
        if self.scale is not None:
            with torch.no_grad():
                for strip in strips:
                    strip.mul_(1 / self.scale.scale)
                bad = not_finite(unit, strips)
            if bad:
                found = Overflow(leaf, min(self.names.index(name) for name in bad))
                self.overflow = min(found, self.overflow or found)
        return strips

    # ---------------------------------------------------------------- on their way

    def start(self, unit: Unit, leaf: Leaf) -> None:
        """Send a unit's gradients on their way, as far as the rules say in this turn."""
        last = self._last(leaf)
        ops = [r.op for r in self.rules if last or not r.last]
        self.weights.say(leaf)
        self.journeys.wait_for(unit.index)  # those of the turn before
        if Op.AGREE in ops and self.fast is None and unit.index not in self.commons:  # all start in one order
            numel = unit.mine.stop - unit.mine.start
            common = None if self.layerwise else self.mesh.copies.common(numel, unit.dtypes.reduce, unit.device)
            self.commons[unit.index] = common  # it would stay: a unit's gradients are to be gone before the next one's
        flow = self._journey(unit, ops, leaf)
        flow = self._telling(unit, flow, leaf) if self.layerwise and last else flow
        self.journeys.start(unit.index, flow, unit.numel * unit.dtypes.reduce.itemsize)

    def _last(self, leaf: Leaf) -> bool:
        return leaf.turn == self.turns.count - 1

    def _journey(self, unit: Unit, ops: Sequence[Op], leaf: Leaf) -> Flow:
        """Inside a copy every owner gets its shard of all partial sums; then copies agree on the step's gradient."""
        came: Pending | None = None
        key = f"unit {unit.index} turn {leaf.serial}"  # each rank goes on as soon as it can
        turns, tree = self.turns, self.sums[unit.index]  # of this step; a next one may have begun when all is done
        mine = drain(self.mine[unit.index])  # before those of the next turn join them
        if self.weights.hearing is not None:
            yield self.weights.hearing
            self.weights.learn()
        if self.fast is not None:
            done = yield from self.fast.journey(unit, mine, turns, key, last=Op.AGREE in ops)
            self.results |= {unit.index: done} if done is not None else {}
            return
        if Op.REDUCE in ops:
            came = yield from self._reduce(unit, mine, tree, leaf.turn, key)
        if Op.AGREE in ops:
            yield from self._agree(unit, tree, turns, key, borrowed=came is not None)
        if came is not None:
            own(tree)
            came.release()

    def _telling(self, unit: Unit, flow: Flow, leaf: Leaf) -> Flow:
        """With a unit's last gradients, all ranks hear which of its parameters some leaf of the step has touched."""
        names, world = list(unit.params), self.mesh.world
        told = torch.zeros(world.size, len(names), dtype=torch.uint8)
        told[world.rank] = torch.tensor([n in self.touched for n in names], dtype=torch.uint8)
        boxes = [[[row]] for row in told]
        pending = world.swap("touched", [[[told[world.rank]]]] * world.size, boxes, f"unit {unit.index} {leaf.serial}")
        yield from flow
        yield pending
        pending.wait()
        self.told |= {n for n, column in zip(names, told.unbind(1), strict=True) if bool(column.any())}

    def _reduce(
        self, unit: Unit, mine: list[tuple[Node, Weighed[Sum]]], tree: Sums, turn: int, key: str
    ) -> Generator[Pending, None, Pending | None]:
        shard = self.mesh.shard
        first = self.mesh.cell - shard.rank
        theirs = [self.turns.given(first + r, turn) for r in range(shard.size)]
        assert theirs[shard.rank] == [(n, Weighed(True if w.value else None, w.weight)) for n, w in mine], unit
        like = torch.empty(0, dtype=unit.dtypes.reduce, device=unit.device)
        bounds = unit.layout.bounds
        return (yield from swap(shard, "reduce", bounds, unit.runs, mine, theirs, tree, like, key, unit.index))

    def _agree(self, unit: Unit, tree: Sums, turns: Turns, key: str, *, borrowed: bool) -> Flow:
        """`borrowed`: the sums lie in memory that others lend us."""
        copies = self.mesh.copies
        like = torch.empty(0, dtype=unit.dtypes.reduce, device=unit.device)
        start, stop = unit.mine.start, unit.mine.stop
        runs = between(unit.runs, start, stop)
        if copies.size == 1 and borrowed:
            flat = self.pool.take(stop - start, like.dtype, like.device)
            self.results[unit.index] = keep(tree.take(), turns.divisor, runs, start, flat, self.pool)
            return
        if self.at_once is not None:
            now, votes = self.at_once.join(unit.index, drain(tree), turns.sums), self.weights.votes
            yield now
            yield votes
            theirs = [turns.copy_holds(c) for c in range(copies.size)]
            self.results[unit.index] = self.at_once.result(unit.index, now, theirs, turns.divisor, turns.twigs)
            return
        theirs = [turns.copy_holds(c) for c in range(copies.size)]
        bounds = even_bounds(start, stop, copies.size)
        gate = Gate() if self.journeys.gated else None
        self.results[unit.index] = yield from agree(
            copies, bounds, runs, drain(tree), theirs, turns.divisor, turns.twigs, self.pool, like,
            self.commons.get(unit.index), key, gate, unit.index,
        )  # fmt: skip

    # ---------------------------------------------------------------- at the end of a step

    def hand_out(self, unit: Unit, touched: Collection[str], *, apart: bool) -> None:
        """Give the pieces of a unit's parameters in `touched` the step's gradients.

        Args:
            apart: none may lie in memory of several ranks: whoever updates might write to them.
        """
        self.in_common = not apart
        mean = self.results[unit.index]
        unit.widen()
        pieces = list(unit.pieces.values())
        if not mean.strips:
            for piece in pieces:
                piece.grad = None
            return
        copies = apart and mean.common is not None
        parts = mean.strips if unit.alone and len(mean.strips) == len(pieces) else mean.cut(unit.places)
        for p, piece, grad in zip(unit.owned, pieces, parts, strict=True):
            if p.name not in touched:
                piece.grad = None
            else:
                grad = grad.view(piece.shape) if grad.dim() != piece.dim() else grad
                piece.grad = grad.clone() if copies else grad if grad.dtype is piece.dtype else grad.to(piece.dtype)

    def change(self, change: Callable[[Tensor], object]) -> None:
        """All gradients that were handed out, in place and element by element. Collective."""
        together = [m for m in self.results.values() if m.common is not None and self.in_common]
        parts = [t for mean in together for t in mean.own]  # every rank its own, when nobody reads them
        for unit in self.units:
            if self.results[unit.index] not in together:
                parts += [piece.grad for piece in unit.pieces.values() if piece.grad is not None]
        _meet_in(together)
        with torch.no_grad():
            for part in parts:
                change(part)
        _meet_in(together)

    def forget(self, unit: Unit) -> None:
        """The unit is updated."""
        self._guard_pieces(unit)
        mean = self.results.pop(unit.index)
        if mean.flat is not None:
            self.pool.give(mean.flat)

    def _guard_pieces(self, unit: Unit) -> None:
        """Pieces have gradients from the end of a step's last leaf to the update only."""
        for piece, guard in self.piece_guards[unit.index]:
            piece.grad = guard


def _meet_in(means: Sequence[Mean]) -> None:
    """Until all ranks have come here."""
    commons = [mean.common for mean in means if mean.common is not None]
    for common in commons:
        common.publish()
    for common in commons:
        common.current().wait()


def _not_zeroed(name: str) -> OrderError:
    return OrderError(
        f"'{name}' still has gradients of a forward that came after its own optimizer's step",
        cause="another model's loss went through this one, as a generator's goes through the discriminator",
        remedy="zero_grad() of this model's optimizer before its next backward",
    )


def _too_late() -> OrderError:
    return OrderError(
        "zero_grad() came after this leaf's gradients had been handed on",
        remedy="call it before backward or after step(), or shoal.init(..., overlap=False)",
    )
