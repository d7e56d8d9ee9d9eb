"""Gradients that travel while backward runs.

Note: what all ranks know. The backward before has told every rank which parameters had gradients on any of them. So
each starts every bucket of these once and in one order, whatever its own backward does this time: what is not there
counts as zeros. At the end ranks tell each other what was otherwise, and exchange that once more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator

import torch
from torch import Tensor, nn

from shoal.comm.group import Pending
from shoal.dropin.mean import Averager
from shoal.engine.journeys import Journeys


class Overlap:
    """The exchange of one model's gradients, from its second backward on.

    Args:
        averager: its buckets.
    """

    def __init__(self, averager: Averager) -> None:
        self.averager, self.group = averager, averager.group
        carrier = self.group.carrier
        self.journeys = Journeys(carrier.levels, ordered=carrier.ordered, limit=carrier.plenty)
        self.places = {p: place for place, p in enumerate(averager.params)}
        self.bucket_of = {place: number for number, bucket in enumerate(averager.buckets) for place in bucket}
        self.travels = 0  # the parameters that do, a bit for each; nothing is known before the first backward
        self.times = Counter[int]()  # how often the backward before has added to each, by place
        self.backwards = 0
        self._begin()

    def _begin(self) -> None:
        self.added = Counter[int]()
        self.begun = 0  # buckets so far, in their order
        self.late = 0  # those that got gradients afterwards, a bit for each
        self.missing = [{i for i in bucket if self.times[i]} for bucket in self.averager.buckets]
        self.results: dict[int, Tensor] = {}

    def accumulated(self, param: nn.Parameter) -> None:
        """Backward has added to a parameter's gradient: start what is complete by that."""
        place = self.places[param]
        number = self.bucket_of[place]
        self.added[place] += 1
        if not self.travels:
            return
        if number < self.begun:
            self.late |= 1 << number
        elif self.added[place] == self.times[place]:
            self.missing[number].discard(place)
            while self.begun < len(self.missing) and not self.missing[self.begun]:
                self._start()
        self.journeys.progress()

    def give_up(self) -> None:
        """The backward has raised: what has begun ends with the next one, and is exchanged again."""
        self.late |= (1 << self.begun) - 1

    def start_all(self) -> None:
        """The backward is over."""
        while self.travels and self.begun < len(self.averager.buckets):
            self._start()

    def _start(self) -> None:
        number = self.begun
        self.begun += 1
        places = self._places(number)
        if places:
            flat = self.averager.flatten(places, present=True)
            self.journeys.start(number, self._exchange(number, flat), flat.nbytes)

    def _places(self, number: int) -> list[int]:
        return [i for i in self.averager.buckets[number] if self.travels >> i & 1]

    @torch.no_grad()
    def _exchange(self, number: int, flat: Tensor) -> Generator[Pending, None, None]:
        key, size = f"bucket {number} backward {self.backwards}", self.group.size
        active = [True] * size
        self.results[number] = yield from self.averager.steps(flat, active, size, key)

    def finish(self, touched: int, late: int) -> int:
        """Hand out what has travelled. Collective.

        Args:
            touched: parameters that have gradients on any rank, a bit for each.
            late: buckets that got gradients afterwards on any rank.

        Returns:
            Those of `touched` that have still to be exchanged.
        """
        self.journeys.finish()
        left = touched & ~self.travels
        for number, result in self.results.items():
            places = self._places(number)
            if late >> number & 1:
                left |= touched & sum(1 << i for i in places)
            else:
                self.averager.hand_out(places, result, touched)
            self.averager.pool.give(result)
        self.travels, self.times = touched, self.added
        self.backwards += 1
        self._begin()
        return left
