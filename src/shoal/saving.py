"""What a job keeps: whole state dicts, checkpoints, and weights of other programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shoal import export, resume
from shoal.average import Average
from shoal.base import Base
from shoal.checkpoint import check_keep, keep_newest
from shoal.comm.meet import Want
from shoal.engine.binding import Binding
from shoal.errors import OrderError
from shoal.pretrained.fill import Pretrained, load_pretrained
from shoal.trace import Traced


class Saving(Base):
    """Writes and reads state."""

    def state_dict(self, what: nn.Module | Optimizer | Average) -> dict[str, object]:
        """The whole state dict of a prepared model or optimizer, or of an average. Collective.

        Returns:
            On rank 0 what torch's `state_dict()` would give in one process, on the CPU; elsewhere nothing.
        """
        if isinstance(what, Average):
            binding = what.binding
        else:
            binding = self._find(what) if isinstance(what, nn.Module) else self._find_optimizer(what)
        self._state_between_steps("job.state_dict")
        self._meeting.meet(Want.STATE, 0, model=binding.engine.number)
        with self._together.leased("job.state_dict"):
            if isinstance(what, nn.Module):
                return cast(dict[str, object], export.model_state(binding))
            if isinstance(what, Average):
                return cast(dict[str, object], export.model_state(binding, what.pieces))
            return export.optimizer_state(binding, what)

    def save(self, path: str | Path, *, keep: int | None = None) -> Path:
        """Write `path/step-N`: all state, whatever the strategy; it loads under any other. Collective.

        Args:
            path: a directory that all ranks see.
            keep: so many of the newest whole checkpoints stay, this one included; older ones are deleted. None: all.

        Returns:
            The directory of this checkpoint. One that this job has saved or loaded at this step stays as it is.

        Raises:
            SaveError: it could not be written (or is there already, of another job); older ones are intact.
        """
        bindings = self._all_bound()
        if keep is not None:
            check_keep(keep)
        self._state_between_steps("job.save")
        self._meeting.meet(Want.SAVE, self.step)
        with self._together.leased("job.save"):
            root = Path(path) if self._trace is None else self._trace.saved(Path(path))
            target = self._saved_here(root) or resume.save(bindings, root, self._facts(), self._share)
            keep_newest(target, keep, self._resumed, rank=self.rank, share=self._share)
        if target != self._saved:
            self.event("save", step=self.step, path=str(target))
            self._tracking.saved(self.step, target)
        self._saved = target
        return target

    def _saved_here(self, root: Path) -> Path | None:
        """This step's checkpoint in `root`, if this job wrote or read it. Rank 0 decides, whose file system it is."""
        target, own = root / f"step-{self.step}", self._saved
        same = own is not None and own.is_dir() and own.resolve() == target.resolve()
        if self._share(b"same" if same else b"new")[0] != b"same":
            return None
        self._say(f"{target} stays as it is: this job saved or loaded it, and no step came after it")
        return target

    def load(self, path: str | Path) -> int:
        """Go on from a checkpoint, saved under any strategy and world size, with the same bits. Collective.

        Call it after `prepare` and before the first step. The checkpoint's leaves and threads win over defaults.

        Args:
            path: `.../step-N`, or the directory that holds several: the newest is taken.

        Returns:
            The number of steps done.

        Raises:
            CheckpointError: there is none, it is damaged, or it does not fit.
        """
        bindings = self._all_bound()
        if any(b.engine.turns_done for b in bindings):
            raise OrderError("job.load after training has begun", remedy="load right after prepare")
        self._meeting.meet(Want.LOAD, 0)
        with self._together.leased("job.load"):
            found = resume.load(bindings, Path(path), self._facts(), self.resolved, self._share, self._rebuild)
        self._feed.strategy, before = self._all_bound()[0].strategy, self.leaves
        if found.leaves != before:
            self._say(f"going on with the checkpoint's {found.leaves} leaves a step")
        self._resumed = self._saved = found.path
        self._feed.set_seed(found.seed)
        self.threads = found.threads
        torch.set_num_threads(found.threads)
        for loader, at in zip(self._loaders, found.positions, strict=False):
            loader.go_to(at["epoch"], at["step"])
        self._feed.between_steps()
        self.event("load", step=self.step, path=str(found.path))
        return self.step

    def _rebuild(self, precision: str, masters: bool) -> Sequence[Binding]:
        """Prepare again for the precision of a checkpoint."""
        rounded = "" if masters else " without masters"
        self._say(f"going on with the checkpoint's precision {precision}{rounded}")
        change = {"precision": precision, "masters": masters}
        self._meeting.granters.clear()
        for name, old in self._bindings.items():
            wanted = self._wanted[name]
            old.undo()
            self._build_again(name, old, replace(wanted, strategy=replace(wanted.strategy, **change)))
        return self._all_bound()

    def _facts(self) -> resume.Facts:
        return resume.Facts(
            leaves=self.leaves, seed=self.seed, threads=self.threads, precision=self.strategy.precision, path=Path(),
            twig=self.strategy.twig, masters=self.strategy.masters, positions=[x.position() for x in self._loaders],
            tracked=self._tracked,
        )  # fmt: skip

    def _take_trace(self) -> None:
        if self._trace is not None:
            facts = Traced(leaves=self.leaves, device=str(self.device))
            models = {name: self.state_dict(binding.model) for name, binding in self._bindings.items()}
            self._trace.take(self.rank, facts, cast(dict[str, dict[str, Tensor]], models))

    def track(self, **objects: object) -> None:
        """Put more into checkpoints: whatever has `state_dict()` and `load_state_dict()`. Call it before `job.load`.

        Models, optimizers, schedulers and loaders given to `prepare`, loaders of `job.loader` and averages of `job.ema`
        (in shards, like their models) are there already. States are kept without pickle: tensors, arrays, numbers,
        strings, None, and lists, tuples and dicts of them. Rank 0's is saved, and all ranks get it back; a line says
        where ranks differ.

        Args:
            objects: by the names that they have in the checkpoint.

        Raises:
            SettingError: one has no such methods.
            OrderError: the name is taken, or `job.load` has passed its state by.
        """
        self._tracked.add(objects)

    def load_pretrained(
        self, path: str | Path, model: nn.Module | None = None, *, strict: bool = True, trust: bool = False,
        rename: Callable[[str], str] = str,
    ) -> Pretrained:  # fmt: skip
        """Fill a prepared model with weights that another program has written, tensor by tensor. Collective.

        No rank ever holds the whole of it: each reads the tensors of which it keeps a part. Values are converted to the
        model's dtype. Averages of `job.ema` begin anew.

        Args:
            path: a `.safetensors` file, a Hugging Face index or a directory with either; `.pt`, `.pth`, `.bin` with
                a state dict; a directory of torch's distributed checkpoint; of DeepSpeed's ZeRO, universal or as
                stages 1 to 3 write it.
            model: the prepared one; None: the only one.
            strict: missing or extra names are an error; else they are reported.
            trust: may pickles be read that run code? Needed for torch's distributed and DeepSpeed's sharded ones.
            rename: what a name of the file is called in the model.

        Returns:
            The names that were loaded, are missing in the file, and are extra in it.

        Raises:
            CheckpointError: there are no weights, or they may not be read.
            ResumeError: other names or shapes; nothing has been changed then.
        """
        binding = self._find(model)
        self._state_between_steps("job.load_pretrained")
        self._saved = None  # a checkpoint of this step, if there is one, has other weights
        self._together.meeting.meet(Want.PRETRAINED, model=binding.engine.number)
        with self._together.leased("job.load_pretrained"):
            share = partial(self._together.world.share_any, "file")
            return load_pretrained(binding, Path(path), share, strict=strict, trust=trust, rename=rename)
