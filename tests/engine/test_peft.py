"""Adapters of `peft`, where it is installed (pip install peft)."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

import shoal
from shoal.comm.threads import run

LEAVES = 2

if importlib.util.find_spec("peft") is not None:
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    def train(strategy: str) -> dict[str, Tensor]:
        with shoal.init(strategy, leaves=LEAVES, run_dir="none") as job:
            torch.manual_seed(0)
            config = GPT2Config(
                n_layer=2, n_embd=32, n_head=2, vocab_size=97, n_positions=32, use_cache=False, eos_token_id=0
            )
            lora = LoraConfig(r=4, target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True)
            net: Any = get_peft_model(GPT2LMHeadModel(config), lora)
            net, optimizer = job.prepare(net, AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01))
            for step in range(3):
                for leaf in range(job.rank, LEAVES, job.world_size):
                    tokens = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(10 * step + leaf))
                    shoal.seed(0, step, leaf)
                    net(input_ids=tokens, labels=tokens).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
            return job.state_dict(net)  # type: ignore[return-value]

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore::FutureWarning")
    @pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero3"])
    def test_the_same_bits(strategy: str) -> None:
        alone = run(1, lambda _rank: train("ddp"))[0]
        found = run(2, lambda _rank: train(strategy))[0]
        assert any("lora" in name for name in alone)
        assert not [name for name in alone if not torch.equal(found[name], alone[name])]
