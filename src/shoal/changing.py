"""Models that change while they are trained: parameters frozen, thawed, added, taken away."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from shoal import export
from shoal.base import Base
from shoal.comm.meet import Want
from shoal.engine.binding import Binding


class Changing(Base):
    """Lets go of a model and takes it back."""

    @contextmanager
    def change(self, model: nn.Module | None = None) -> Generator[None]:
        """Inside, the model and its optimizers are the user's own again, whole; afterwards they are prepared anew.

        For what cannot change in between: thaw what was frozen in `prepare`, add parameters (and a group of the
        optimizer for them), take some away, replace a block. Optimizer state stays with the parameters that stay.
        Freezing needs no `change`, nor does thawing what was trained before. Between steps. Collective: all ranks make
        the same changes; new parameters start from rank 0's values. Averages of `job.ema` go on, for what is new from
        its first values. Memory: the whole model, its optimizer state and averages.

        Args:
            model: the prepared one; None: the only one.

        Raises:
            OrderError: in the middle of a step.
            ModelError, OptimizerError, DivergedError: as in `prepare`.
        """
        binding = self._find(model)
        self._state_between_steps("job.change")
        self._meeting.meet(Want.CHANGE, 0, model=binding.engine.number)
        name = next(name for name, found in self._bindings.items() if found is binding)
        self._saved = None  # a checkpoint of this step, if there is one, has another model
        with self._together.leased("job.change"):
            named = {name: param for unit in binding.engine.units for name, param in unit.params.items()}
            averages = [
                (average, {named[n]: value for n, value in export.whole_values(binding, average.pieces).items()})
                for average in binding.averages
            ]
            self._let_go(binding)
            try:
                yield
                self._build_again(name, binding, replace(self._wanted[name], first=self._next_unit(), fill=None))
                for average, wholes in averages:
                    average.follow(self._bindings[name], wholes)
            except BaseException:  # the model is the user's own now, and no other one's turn waits for it
                del self._bindings[name]
                self._feed.unbind(binding.engine)
                raise
            self._budget.check()

    def _let_go(self, binding: Binding) -> None:
        states = [export.whole_states(binding, optimizer) for optimizer in binding.optimizers]
        binding.undo(states)
        engine = binding.engine
        self._meeting.granters.remove(engine.presence.grant)
        self._meeting.meet(Want.CHANGE, 1, model=engine.number)  # nobody reads what ranks have in common any more
        for common in [unit.common for unit in engine.units] + list(engine.gradients.commons.values()):
            if common is not None:
                common.release()
