"""The two journeys of partial sums: to a shard's owner, and across copies."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import islice, pairwise

from torch import Tensor

from shoal.comm.group import Common, Group, Like, Pending, Strips
from shoal.comm.pool import Pool
from shoal.engine.sums import Known, Mean, Runs, Sum, Sums, between, drain, keep, known, lying_in, mean, new_tree
from shoal.leaves import Node, Weighed


def swap(
    group: Group, verb: str, bounds: Sequence[int], runs: Runs, mine: list[tuple[Node, Weighed[Sum]]],
    theirs: Sequence[Known], tree: Sums, like: Tensor, key: str = "", turn: int = 0,
) -> Generator[Pending, None, Pending | None]:  # fmt: skip
    """Put everybody's partial sums of this member's part (`bounds`) into `tree`.

    Args:
        runs: of all parts together.
        mine: this member's, each over all runs.
        theirs: what each member has.
        like: dtype and device of what travels.
        key: see `Group.swap`.
        turn: see `Hosts.speaker`.

    Returns:
        The transfer, to be released when the tree has let go of what came with it (see `own`); None: nothing travelled.
    """
    me = group.rank
    if group.size == 1:
        for node, weighed in mine:
            tree.put(node, weighed)
        return None
    if group.hosts.two_levels:
        by_hosts = ByHosts(group, verb, bounds, runs, mine, theirs, like, key or group.new_key(), turn)
        return (yield from by_hosts.swap(tree))
    parts = [[w.value.between(runs, a, b) for _, w in mine if w.value] for a, b in pairwise(bounds)]
    own_runs = between(runs, bounds[me], bounds[me + 1])
    box = Like(tuple(b - a for a, b in own_runs), like.dtype, like.device)
    boxes = [[] if r == me else [box for _, w in has if w.value] for r, has in enumerate(theirs)]
    pending = group.swap(verb, parts, boxes, key)
    yield pending
    came = iter(pending.wait())
    for r, has in enumerate(theirs):
        values = iter(parts[me]) if r == me else came
        for node, weighed in has:
            tree.put(node, Weighed(Sum(next(values)) if weighed.value else None, weighed.weight))
    return pending


class ByHosts:
    """`swap` in two levels: a host's members add up what they have, then one of them speaks for all of it.

    What crosses to another host is one partial sum for every subtree of leaves that the host has computed.
    """

    def __init__(
        self, group: Group, verb: str, bounds: Sequence[int], runs: Runs, mine: list[tuple[Node, Weighed[Sum]]],
        theirs: Sequence[Known], like: Tensor, key: str, turn: int,
    ) -> None:  # fmt: skip
        self.group, self.verb, self.key, self.turn = group, verb, key, turn
        self.bounds, self.runs, self.like, self.mine, self.theirs = bounds, runs, like, mine, theirs
        self.sizes = [[b - a for a, b in between(runs, start, stop)] for start, stop in pairwise(bounds)]

    def swap(self, tree: Sums) -> Generator[Pending, None, Pending]:
        me, hosts = self.group.rank, self.group.hosts
        trees = {owner: new_tree(tree.leaves) for owner in hosts.spoken_to(me, self.turn)}
        inside = yield from self._inside({me: tree, **trees})
        across = yield from self._across(tree, trees)
        return Both(inside, across)

    def _inside(self, trees: dict[int, Sums]) -> Generator[Pending, None, Pending]:
        """Add up this host's sums: of this member's part, and of those that it speaks to."""
        group, me = self.group, self.group.rank
        mates = group.hosts.of[group.hosts.home[me]]
        parts: list[list[Strips]] = [[] for _ in self.theirs]
        boxes: list[list[Like]] = [[] for _ in self.theirs]
        for m in mates:
            owners = [m, *group.hosts.spoken_to(m, self.turn)]
            parts[m] = [self._strips(w.value, owners) for _, w in self.mine if w.value]
            boxes[m] = [] if m == me else [self._box(list(trees)) for _, w in self.theirs[m] if w.value]
        pending = group.swap(self.verb, parts, boxes, f"{self.key} inside")
        yield pending
        came = iter(pending.wait())
        for m in mates:
            values = iter(parts[me]) if m == me else came
            for node, weighed in self.theirs[m]:
                strips = iter(next(values) if weighed.value else ())
                for owner, tree in trees.items():
                    value = Sum(list(islice(strips, len(self.sizes[owner])))) if weighed.value else None
                    tree.put(node, Weighed(value, weighed.weight))
        return pending

    def _across(self, tree: Sums, trees: dict[int, Sums]) -> Generator[Pending, None, Pending]:
        """Send other hosts' members the sums over this host, and take in those over theirs."""
        group, me, hosts = self.group, self.group.rank, self.group.hosts
        parts: list[list[Strips]] = [[] for _ in self.theirs]
        boxes: list[list[Like]] = [[] for _ in self.theirs]
        for owner, found in trees.items():
            parts[owner] = [w.value.strips for _, w in drain(found) if w.value]
        heard: dict[int, Known] = {}
        for host, members in enumerate(hosts.of):
            if host != hosts.home[me]:
                speaker = hosts.speaker(host, me, self.turn)
                heard[speaker] = known(tree.leaves, [item for m in members for item in self.theirs[m]])
                boxes[speaker] = [self._box([me]) for _, w in heard[speaker] if w.value]
        pending = group.swap(self.verb, parts, boxes, f"{self.key} across")
        yield pending
        came = iter(pending.wait())
        for speaker in sorted(heard):  # as they are among members
            for node, weighed in heard[speaker]:
                tree.put(node, Weighed(Sum(next(came)) if weighed.value else None, weighed.weight))
        return pending

    def _strips(self, value: Sum, owners: Sequence[int]) -> list[Tensor]:
        return [t for o in owners for t in value.between(self.runs, self.bounds[o], self.bounds[o + 1])]

    def _box(self, owners: Sequence[int]) -> Like:
        return Like(tuple(size for o in owners for size in self.sizes[o]), self.like.dtype, self.like.device)


class Both:
    """Two transfers that are over, and what came with them is in use."""

    def __init__(self, *both: Pending) -> None:
        self.both = both

    def ready(self) -> bool:
        return True

    def wait(self) -> Sequence[Strips]:
        return ()

    def release(self) -> None:
        for pending in self.both:
            pending.release()


def agree(
    group: Group, bounds: Sequence[int], runs: Runs, mine: list[tuple[Node, Weighed[Sum]]], theirs: Sequence[Known],
    weights: float, leaves: int, pool: Pool, like: Tensor, common: Common | None = None,
    key: str = "", gate: Pending | None = None, turn: int = 0,
) -> Generator[Pending, None, Mean]:  # fmt: skip
    """The step's gradient on every member of `group`, from what each of them has summed up.

    An all-reduce in a fixed order: everybody adds up one part (`bounds`) and hands it to all.

    Args:
        common: memory of the whole group for the result, if there is.
        key, turn: see `swap`.
        gate: is waited for before the result goes to all.
    """
    start, stop, me = bounds[0], bounds[-1], group.rank
    tree = new_tree(leaves)
    pending = yield from swap(group, "agree", bounds, runs, mine, theirs, tree, like, key, turn)
    if pending is None:
        return Mean(runs, mean(tree.take(), weights))
    own_runs = between(runs, bounds[me], bounds[me + 1])
    if common is not None:
        whole = common.data
        done = mean(tree.take(), weights, lying_in(whole, own_runs, start))
        pending.release()
        common.publish()
        yield common.current()
        return Mean(runs, None if done is None else lying_in(whole, runs, start), common=common, own=done or ())
    whole = pool.take(stop - start, like.dtype, like.device)
    part = keep(tree.take(), weights, own_runs, start, whole, pool)
    pending.release()
    if part.strips is None:  # on all members
        return Mean(runs, None)
    if gate is not None:
        yield gate
    yield group.gather("agree", whole, [b - start for b in bounds], key and f"{key} whole")
    return Mean(runs, lying_in(whole, runs, start), whole)


def finished(flow: Generator[Pending, None, Mean]) -> Mean:
    """Run it to its end."""
    while True:
        try:
            next(flow).wait()
        except StopIteration as done:
            return done.value
