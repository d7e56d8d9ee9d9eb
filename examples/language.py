"""Train BERT or GPT-2 from scratch, the classes of transformers, on the source text of Python's standard library.

    python examples/language.py --model bert --strategy zero3 --workers 2

The models are tiny and read bytes; nothing is downloaded. BERT fills in masked bytes, GPT-2 says the next one.
"""

from __future__ import annotations

import argparse
import sys

import common
import torch
from gpt_model import BYTES, Corpus, read_corpus
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import shoal

CONTEXT = 32
MASK = BYTES  # one more letter
MASKED = 5  # bytes of a window, about 15 %
IGNORED = -100  # what the losses of transformers leave out
BATCH, HELD_OUT = 64, 1024  # windows
CORPUS = 2_000_000  # bytes
OPTIONS = common.options(__doc__, steps=(400, 10))
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


def make_model(name: str, width: int = 96, depth: int = 2, heads: int = 4) -> nn.Module:
    """Freshly initialised, more widely than usual as it is narrow, and without dropout as training is short."""
    if name == "bert":
        config = BertConfig(
            vocab_size=BYTES + 1, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
            intermediate_size=4 * width, max_position_embeddings=CONTEXT, pad_token_id=None, initializer_range=0.1,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return BertForMaskedLM(config)
    config = GPT2Config(
        vocab_size=BYTES, n_positions=CONTEXT, n_embd=width, n_layer=depth, n_head=heads, bos_token_id=0,
        eos_token_id=0, use_cache=False, initializer_range=0.1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # as it would be anyway, with a warning
    return model


def train(job: shoal.Job, options: argparse.Namespace) -> tuple[nn.Module, common.Numbers]:
    corpus, masks = read_corpus(CORPUS), options.model == "bert"
    model = make_model(options.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
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
    return model, {"loss on held-out files, nats a byte": loss, "of each byte's frequency": by_frequency(corpus)}


def by_frequency(corpus: Corpus) -> float:
    """The loss on held-out text of always saying how frequent each byte is."""
    seen, new = (
        torch.bincount(torch.tensor(list(t)), minlength=BYTES).double() for t in (corpus.train, corpus.held_out)
    )
    return -(new / new.sum() * ((seen + 1) / (seen + 1).sum()).log()).sum().item()


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
