"""Train BERT or GPT-2 from scratch, the classes of transformers, on the source text of Python's standard library.

    python examples/language.py --model bert --strategy zero3 --workers 2

The models are tiny and read bytes; nothing is downloaded. BERT fills in masked bytes, GPT-2 says the next one.
"""

from __future__ import annotations

import argparse
import math
import sys

import common
import torch
from gpt_model import BYTES, read_corpus
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import shoal

CONTEXT = 128
MASK = BYTES  # one more letter
MASKED = 19  # bytes of a window, 15 %
IGNORED = -100  # what the losses of transformers leave out
BATCH, HELD_OUT = 16, 256  # windows
CORPUS = 2_000_000  # bytes
OPTIONS = common.options(__doc__, steps=(300, 10))
OPTIONS.add_argument("--model", default="gpt2", choices=("bert", "gpt2"), help="(%(default)s)")


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a text: what the model reads, and the labels of its loss.

    Args:
        text: bytes.
        masks: hide some bytes and ask for these alone; new ones every time, from torch's generator.
    """

    def __init__(self, text: bytes, *, masks: bool) -> None:
        usable = len(text) // CONTEXT * CONTEXT
        self.windows = torch.frombuffer(bytearray(text[:usable]), dtype=torch.uint8).view(-1, CONTEXT)
        self.masks = masks

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        read = self.windows[index].long()
        if not self.masks:
            return read, read.clone()
        hidden = torch.zeros(CONTEXT, dtype=torch.bool)
        hidden[torch.randperm(CONTEXT)[:MASKED]] = True  # shoal seeds this by the leaf
        return read.masked_fill(hidden, MASK), read.masked_fill(~hidden, IGNORED)


def make_model(name: str, width: int = 96, depth: int = 3, heads: int = 4) -> nn.Module:
    if name == "bert":
        return BertForMaskedLM(BertConfig(
            vocab_size=BYTES + 1, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
            intermediate_size=4 * width, max_position_embeddings=CONTEXT, pad_token_id=None,
        ))  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=BYTES, n_positions=CONTEXT, n_embd=width, n_layer=depth, n_head=heads, bos_token_id=0,
        eos_token_id=0, use_cache=False,
    ))  # fmt: skip


def train(job: shoal.Job, options: argparse.Namespace) -> tuple[nn.Module, common.Numbers]:
    corpus, masks = read_corpus(CORPUS), options.model == "bert"
    model = make_model(options.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    scheduler = common.cosine(optimizer, options.steps)
    model, optimizer, scheduler = job.prepare(model, optimizer, scheduler)
    loader = job.loader(Windows(corpus.train, masks=masks), global_batch=BATCH, drop_last=True)
    model.train()
    while job.step < options.steps:
        for read, labels in loader:
            loss = model(input_ids=read, labels=labels).loss
            loss.backward()
            job.clip_grad_norm(1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            common.progress(job, job.mean(loss.detach()), options.steps)
            if job.step == options.steps:
                break
    loss = evaluate(job, model, Windows(corpus.held_out, masks=masks), options.seed)
    return model, {"loss on held-out files, nats a byte": loss, "of guessing": math.log(BYTES)}


def evaluate(job: shoal.Job, model: nn.Module, windows: Windows, seed: int) -> float:
    """The loss on windows evenly spread over a text."""
    model.eval()
    torch.manual_seed(seed)  # the same masks everywhere
    some = [windows[i * len(windows) // HELD_OUT] for i in range(HELD_OUT)]
    read, labels = (torch.stack(part) for part in zip(*some, strict=True))
    with job.whole(model), torch.no_grad():
        return model(input_ids=read, labels=labels).loss.item()


if __name__ == "__main__":
    sys.exit(common.run(__file__, OPTIONS, train))
