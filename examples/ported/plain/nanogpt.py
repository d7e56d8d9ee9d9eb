"""Train a character-level GPT from scratch, in the style of nanoGPT's train.py; it reads the source of argparse."""

import argparse
import contextlib
import inspect
import math
import pathlib
import time

import torch
from torch import nn
from torch.nn import functional as F

parser = argparse.ArgumentParser()
parser.add_argument("--out", default="", help="where checkpoints go; empty: nowhere")
parser.add_argument("--eval-interval", type=int, default=10)
parser.add_argument("--eval-iters", type=int, default=4)
parser.add_argument("--log-interval", type=int, default=2)
parser.add_argument("--gradient-accumulation-steps", type=int, default=6)
parser.add_argument("--batch-size", type=int, default=4, help="of a micro-batch")
parser.add_argument("--block-size", type=int, default=32)
parser.add_argument("--n-layer", type=int, default=2)
parser.add_argument("--n-head", type=int, default=2)
parser.add_argument("--n-embd", type=int, default=32)
parser.add_argument("--dropout", type=float, default=0.1)
parser.add_argument("--learning-rate", type=float, default=3e-3)
parser.add_argument("--max-iters", type=int, default=20)
parser.add_argument("--weight-decay", type=float, default=1e-1)
parser.add_argument("--grad-clip", type=float, default=1.0)
parser.add_argument("--warmup-iters", type=int, default=4)
parser.add_argument("--min-lr", type=float, default=3e-4)
parser.add_argument("--device", default="cpu")
parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
args = parser.parse_args()


class Block(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.n_head, self.dropout = args.n_head, args.dropout
        self.ln_1, self.ln_2 = nn.LayerNorm(args.n_embd), nn.LayerNorm(args.n_embd)
        self.c_attn = nn.Linear(args.n_embd, 3 * args.n_embd)
        self.c_proj = nn.Linear(args.n_embd, args.n_embd)
        self.mlp = nn.Sequential(
            nn.Linear(args.n_embd, 4 * args.n_embd), nn.GELU(), nn.Linear(4 * args.n_embd, args.n_embd),
            nn.Dropout(args.dropout),
        )  # fmt: skip

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(self.ln_1(x)).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, vocab_size, args):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, args.n_embd)
        self.wpe = nn.Embedding(args.block_size, args.n_embd)
        self.drop = nn.Dropout(args.dropout)
        self.h = nn.ModuleList([Block(args) for _ in range(args.n_layer)])
        self.ln_f = nn.LayerNorm(args.n_embd)
        self.lm_head = nn.Linear(args.n_embd, vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, idx, targets):
        pos = torch.arange(idx.size(1), device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(pos))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))

    def configure_optimizers(self, weight_decay, learning_rate):
        params = list(self.parameters())
        optim_groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(optim_groups, lr=learning_rate, betas=(0.9, 0.95))


torch.manual_seed(1337)
text = inspect.cleandoc(pathlib.Path(argparse.__file__).read_text())
stoi = {ch: i for i, ch in enumerate(sorted(set(text)))}
data = torch.tensor([stoi[c] for c in text])
train_data, val_data = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
ptdtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[args.dtype]
ctx = contextlib.nullcontext() if ptdtype is torch.float32 else torch.amp.autocast(args.device, dtype=ptdtype)


# poor man's data loader
def get_batch(split):
    data = train_data if split == "train" else val_data
    ix = torch.randint(len(data) - args.block_size, (args.batch_size,))
    x = torch.stack([data[i : i + args.block_size] for i in ix])
    y = torch.stack([data[i + 1 : i + 1 + args.block_size] for i in ix])
    return x.to(args.device), y.to(args.device)


model = GPT(len(stoi), args).to(args.device)
scaler = torch.amp.GradScaler(args.device, enabled=(args.dtype == "float16"))
optimizer = model.configure_optimizers(args.weight_decay, args.learning_rate)


# helps estimate an arbitrarily accurate loss over either split using many batches
@torch.no_grad()
def estimate_loss():
    out = {}
    model.eval()
    for split in ["train", "val"]:
        losses = torch.zeros(args.eval_iters)
        for k in range(args.eval_iters):
            X, Y = get_batch(split)
            with ctx:
                _, loss = model(X, Y)
            losses[k] = loss.item()
        out[split] = losses.mean()
    model.train()
    return out


# learning rate decay scheduler (cosine with warmup)
def get_lr(it):
    if it < args.warmup_iters:
        return args.learning_rate * (it + 1) / (args.warmup_iters + 1)
    decay_ratio = (it - args.warmup_iters) / max(1, args.max_iters - args.warmup_iters)
    return args.min_lr + 0.5 * (1.0 + math.cos(math.pi * decay_ratio)) * (args.learning_rate - args.min_lr)


# training loop
t0 = time.time()
for iter_num in range(args.max_iters):
    # determine and set the learning rate for this iteration
    for param_group in optimizer.param_groups:
        param_group["lr"] = get_lr(iter_num)

    # evaluate the loss on train/val sets and write checkpoints
    if iter_num % args.eval_interval == 0:
        losses = estimate_loss()
        print(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        if iter_num > 0 and args.out:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, args.out)

    # forward backward update, with optional gradient accumulation to simulate larger batch size
    for _micro_step in range(args.gradient_accumulation_steps):
        X, Y = get_batch("train")
        with ctx:
            logits, loss = model(X, Y)
            loss = loss / args.gradient_accumulation_steps  # scale the loss to account for gradient accumulation
        # backward pass, with gradient scaling if training in fp16
        scaler.scale(loss).backward()
    # clip the gradient
    if args.grad_clip != 0.0:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
    # step the optimizer and scaler if training in fp16
    scaler.step(optimizer)
    scaler.update()
    # flush the gradients as soon as we can, no need for this memory anymore
    optimizer.zero_grad(set_to_none=True)

    # timing and logging
    t1 = time.time()
    if iter_num % args.log_interval == 0:
        lossf = loss.item() * args.gradient_accumulation_steps  # undo the division above: the true last loss
        print(f"iter {iter_num}: loss {lossf:.4f}, time {(t1 - t0) * 1000:.2f}ms")
    t0 = t1
