"""Train a small GPT on the source text of Python's standard library, spread over workers.

    python examples/gpt.py --strategy zero3 --workers 2
    torchrun --nproc-per-node 2 examples/gpt.py --strategy zero3

Started plainly it starts its own workers. What shoal adds to an ordinary program is marked `# shoal`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import gpt_report
import torch
from gpt_model import GPT, Corpus, Sizes, Windows, generate, read_corpus
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Subset

import shoal
from shoal.data.loader import Loader
from shoal.launch.run import launch
from shoal.strategy import NAMED, PRECISIONS

QUICK = {"steps": 32, "lr": 1e-2, "width": 48, "depth": 2, "context": 64}
QUICK |= {"corpus": 200_000, "windows": 64, "letters": 60}
PROMPT = "def read("
LOOKS = 6  # at held-out text while training
EVALUATED = 4  # times the batch of training
MARKER, RANKS = "gpt.txt", "ranks"
PLACES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "SHOAL_")  # of a worker

Batches = Loader[tuple[Tensor, Tensor]]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small GPT on the source text of Python's standard library.")
    add = parser.add_argument
    add("--strategy", default="zero3", choices=NAMED, help="what the ranks divide among them (%(default)s)")
    add("--workers", type=int, default=2, help="ranks to start, unless torchrun has started them (%(default)s)")
    add("--leaves", type=int, help="micro-batches of a step, whoever computes them (the workers)")
    add("--steps", type=int, default=360, help="(%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--width", type=int, default=128, help="of the model (%(default)s)")
    add("--depth", type=int, default=5, help="blocks (%(default)s)")
    add("--heads", type=int, default=4, help="(%(default)s)")
    add("--context", type=int, default=128, help="bytes that the model sees at once (%(default)s)")
    add("--dropout", type=float, default=0.0, help="(%(default)s)")
    add("--batch", type=int, default=8, help="windows of text in a step, all ranks together (%(default)s)")
    add("--lr", type=float, default=3e-3, help="highest learning rate (%(default)s)")
    add("--precision", default="float32", choices=PRECISIONS, help="what is computed in (%(default)s)")
    add("--corpus", type=int, default=4_000_000, help="bytes of text to read (%(default)s)")
    add("--windows", type=int, default=512, help="held-out windows to look at in the end (%(default)s)")
    add("--letters", type=int, default=400, help="bytes of text to write in the end (%(default)s)")
    add("--proof", type=int, default=3, help="steps to repeat in one process (%(default)s)")
    add("--out", type=Path, default=Path("runs/gpt"), help="for results; an earlier run's are replaced (%(default)s)")
    add("--quick", action="store_true", help="a tiny model and a few steps")
    add("--replay", action="store_true", help=argparse.SUPPRESS)  # only the steps of the proof, in this process
    if "--quick" in argv:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(argv)
    check(parser, options)
    return options


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what would fail only later."""
    for name in ("steps", "width", "depth", "heads", "context", "batch", "workers", "proof", "windows"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: at least 1")
    if options.leaves is not None and options.leaves < 1:
        parser.error(f"--leaves {options.leaves}: at least 1")
    if options.width % (2 * options.heads):
        parser.error(f"--width {options.width} does not divide into --heads {options.heads} of even width")
    if options.proof > options.steps:
        parser.error(f"--proof {options.proof} is more than --steps {options.steps}")


def main() -> int:
    options = parse(sys.argv[1:])
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("gpt.py draws with matplotlib: pip install 'shoal[examples]'")
    if options.replay:
        return replay(options)
    if "RANK" in os.environ:  # a worker of ours, of `shoal run` or of torchrun
        return train(options)
    return launch([__file__, *sys.argv[1:]], workers=options.workers, run_dir=str(options.out / "run")).exit_code


# ---------------------------------------------------------------- learning


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a loop needs."""

    job: shoal.Job
    model: GPT
    optimizer: AdamW
    scheduler: LambdaLR
    batches: Batches

    def learn(self, until: int) -> Iterator[float]:
        """Train up to a step; gives the loss of each step when it is done."""
        job, model, optimizer, scheduler = self.job, self.model, self.optimizer, self.scheduler
        while job.step < until:
            for text, following in self.batches:
                loss = loss_of(model, text, following)
                loss.backward()
                job.clip_grad_norm(1.0)  # shoal
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                mean = job.mean(loss.detach())  # shoal
                if mean is not None:
                    yield mean
                if job.step == until:
                    break

    def evaluate(self, batches: Batches) -> float:
        """The loss on other text."""
        self.model.eval()
        with torch.no_grad():
            losses = [self.job.mean(loss_of(self.model, text, following)) for text, following in batches]
        self.model.train()
        return fmean(loss for loss in losses if loss is not None)

    def fingerprint(self) -> str:
        """sha256 of all parameters, on rank 0."""
        digest = hashlib.sha256()
        for name, value in self.job.state_dict(self.model).items():  # shoal
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + value.numpy().tobytes())
        return digest.hexdigest()


def loss_of(model: GPT, text: Tensor, following: Tensor) -> Tensor:
    return cross_entropy(model(text).flatten(0, 1), following.flatten())


def start(job: shoal.Job, options: argparse.Namespace, corpus: Corpus) -> Training:
    """A model with its optimizer, spread over the ranks, and its batches."""
    o = options
    model = GPT(Sizes(width=o.width, depth=o.depth, heads=o.heads, context=o.context), o.dropout)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=o.lr, betas=(0.9, 0.95))
    scheduler = LambdaLR(optimizer, lambda step: warm_up_then_cosine(step, o.steps))
    model, optimizer, scheduler = job.prepare(model, optimizer, scheduler)  # shoal
    batches = job.loader(Windows(corpus.train, o.context), global_batch=o.batch, drop_last=True)  # shoal
    if not len(batches):
        sys.exit(f"--batch {o.batch} windows of --context {o.context} are more than the text of --corpus {o.corpus}")
    return Training(job=job, model=model, optimizer=optimizer, scheduler=scheduler, batches=batches)


def warm_up_then_cosine(step: int, steps: int) -> float:
    """The share of the highest learning rate."""
    warm = min(1.0, (step + 1) / min(40, 1 + steps // 5))
    return warm * (0.05 + 0.95 * (1 + math.cos(math.pi * min(1.0, step / steps))) / 2)


def open_job(options: argparse.Namespace, run_dir: str) -> shoal.Job:
    o = options
    return shoal.init(  # shoal
        o.strategy, device="cpu", seed=o.seed, leaves=o.leaves, precision=o.precision, threads=1, run_dir=run_dir
    )


def train(options: argparse.Namespace) -> int:
    """What each worker does."""
    began, o, out = time.monotonic(), options, options.out
    with open_job(options, str(out / "run")) as job:
        if job.rank == 0:
            claim(out)
        corpus = read_corpus(o.corpus)
        training = start(job, options, corpus)
        some, many = (held_out(job, corpus, options, count) for count in (o.windows // 8, o.windows))
        strategy, tokens = job.resolved.settings.strategy, o.batch * o.context  # flags may say another
        progress = gpt_report.Progress(title=f"{strategy}, {job.world_size} ranks", steps=o.steps, tokens=tokens)
        first = follow(training, progress, options, some)
        loss = training.evaluate(many)
        sample = write_text(training, options)
        checkpoint = job.save(out / "checkpoint")  # shoal
        size = sum(p.numel() for p in training.model.parameters())
        plain = gpt_report.plain_memory(size, job.strategy.precision)
        report = gpt_report.Report(
            command=shlex.join(["python", "examples/gpt.py", *sys.argv[1:]]), strategy=strategy, workers=job.world_size,
            leaves=job.leaves, parameters=size, progress=progress, loss=loss, plain=plain, sample=sample,
            held_out_bytes=len(many.dataset) * o.context, checkpoint=str(checkpoint), seconds=0.0,
            proof=gpt_report.Proof(steps=o.proof, here=first, alone=""),
        )  # fmt: skip
    return finish(report, job, options, began) if job.rank == 0 else 0


def claim(out: Path) -> None:
    """Make room for this run's results, where an earlier run may have left its own."""
    marker, checkpoint = out / MARKER, out / "checkpoint"
    if checkpoint.exists():
        if not marker.exists():
            sys.exit(f"{checkpoint} is there, and not from this program: choose another --out")
        shutil.rmtree(checkpoint)
    shutil.rmtree(out / RANKS, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(shlex.join(sys.argv) + "\n")


def held_out(job: shoal.Job, corpus: Corpus, options: argparse.Namespace, count: int) -> Batches:
    """Windows of held-out text, evenly spread over it; equally many in each batch."""
    windows, batch = Windows(corpus.held_out, options.context), options.batch * EVALUATED
    count = min(len(windows), max(count, batch)) // batch * batch
    if not count:
        sys.exit(f"--batch {options.batch} is too large for {len(corpus.held_out):,} bytes of held-out text")
    spread = Subset(windows, [i * len(windows) // count for i in range(count)])
    return job.loader(spread, global_batch=batch, shuffle=False)  # shoal


def follow(training: Training, progress: gpt_report.Progress, options: argparse.Namespace, some: Batches) -> str:
    """Train to the end; show it, and look at held-out text now and then. Returns the proof's fingerprint."""
    job, ranks, first = training.job, options.out / RANKS, ""
    looks = {options.proof, *(options.steps * i // LOOKS for i in range(1, LOOKS + 1))}

    def look() -> None:
        gpt_report.tell_use(ranks, use_of(job))
        progress.held_out.append((job.step, training.evaluate(some)))
        progress.uses = gpt_report.hear_uses(ranks, job.world_size)  # all have told: they were together just now

    with gpt_report.view(progress, quiet=job.rank != 0) as show:
        look()
        progress.resume()
        for loss in training.learn(options.steps):
            progress.add(loss)
            if job.rank == 0:
                progress.uses[0] = use_of(job)
            show()
            if job.step == options.proof:
                first = training.fingerprint()
            if job.step in looks:
                look()
            progress.resume()
    return first


def use_of(job: shoal.Job) -> gpt_report.Use:
    return gpt_report.Use(rank=job.rank, memory=dict(job.memory()), sent=sum(job.traffic.values()))  # shoal


def write_text(training: Training, options: argparse.Namespace) -> str:
    """What the model makes of a beginning. Rank 0 asks it, alone; the others hold the door."""
    with training.job.whole(training.model):  # shoal
        if training.job.rank:
            return ""
        training.model.eval()
        text = generate(training.model, PROMPT.encode(), options.letters, temperature=0.7, seed=options.seed)
    shown = text.decode(errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in shown)


def finish(report: gpt_report.Report, job: shoal.Job, options: argparse.Namespace, began: float) -> int:
    """On rank 0, after the job: the proof, and all that a reader wants to see. Returns the exit code."""
    console, out = Console(highlight=False, soft_wrap=True), options.out
    console.print(f"repeating the first {report.proof.steps} steps in one process ...")
    proof = replace(report.proof, alone=fingerprint_alone(job))
    report = replace(report, proof=proof, seconds=time.monotonic() - began)
    gpt_report.write(report, out)
    console.rule("what it writes")
    console.print(report.sample, markup=False)
    console.rule("what was found")
    console.print(gpt_report.summary(report))
    for text in gpt_report.proof_lines(report):
        console.print(text)
    for name in ("loss.png", "report.html", "report.json", "run"):
        console.print(f"  {out / name}", markup=False)
    return 0 if proof.same else 1


# ---------------------------------------------------------------- the proof


def fingerprint_alone(job: shoal.Job) -> str:
    """Start this program again as a world of one, with the same leaves, for the first steps only."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(PLACES)}
    settings = {"strategy": "ddp", "leaves": job.leaves, "seed": job.seed, "threads": job.threads,
                "precision": job.strategy.precision}  # fmt: skip
    environ = inherited | {f"SHOAL_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, __file__, *sys.argv[1:], "--replay"]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else f"(failed: exit code {done.returncode})"


def replay(options: argparse.Namespace) -> int:
    """The other side of `fingerprint_alone`."""
    with open_job(options, "none") as job:
        training = start(job, options, read_corpus(options.corpus))
        for _ in training.learn(options.proof):
            pass
        print(training.fingerprint())
    return 0


if __name__ == "__main__":
    sys.exit(main())
