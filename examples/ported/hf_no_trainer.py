"""Fine-tune a classifier of transformers in a loop of one's own, in the style of Hugging Face's no-trainer examples.

The text is made up, and the model small and fresh, as nothing is downloaded.
"""

import argparse
import random

import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, get_scheduler

import shoal

MOVIE = ("the film was", "a story that is", "this plot feels", "its ending seems")
GOOD, BAD = ("great", "moving", "clever", "bright"), ("dull", "weak", "clumsy", "flat")


def parse_args():
    parser = argparse.ArgumentParser(description="Finetune a transformers model on a text classification task")
    parser.add_argument("--max_length", type=int, default=12)
    parser.add_argument("--per_device_train_batch_size", type=int, default=8)
    parser.add_argument("--per_device_eval_batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--weight_decay", type=float, default=0.01)
    parser.add_argument("--max_train_steps", type=int, default=20)
    parser.add_argument("--lr_scheduler_type", default="linear")
    parser.add_argument("--num_warmup_steps", type=int, default=2)
    parser.add_argument("--output_dir", default=None, help="where to store the final model")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def read_reviews(count, seed):
    rng = random.Random(seed)
    reviews = []
    for _ in range(count):
        label = rng.randrange(2)
        words = [rng.choice(GOOD if label else BAD) for _ in range(rng.randint(1, 3))]
        reviews.append({"sentence": f"{rng.choice(MOVIE)} {' and '.join(words)}", "label": label})
    return reviews


def main():
    args = parse_args()
    torch.manual_seed(args.seed)
    job = shoal.init()

    words = sorted({word for review in read_reviews(500, 0) for word in review["sentence"].split()})
    vocabulary = {"[PAD]": 0, **{word: number for number, word in enumerate(words, 1)}}

    def preprocess(review):
        ids = [vocabulary[word] for word in review["sentence"].split()][: args.max_length]
        return {"input_ids": ids, "labels": review["label"]}

    def collate(features):
        longest = max(len(f["input_ids"]) for f in features)
        ids = [f["input_ids"] + [0] * (longest - len(f["input_ids"])) for f in features]
        batch = {"input_ids": torch.tensor(ids), "labels": torch.tensor([f["labels"] for f in features])}
        return {**batch, "attention_mask": (batch["input_ids"] != 0).long()}

    train_dataset = [preprocess(review) for review in read_reviews(480, 1)]
    eval_dataset = [preprocess(review) for review in read_reviews(96, 2)]
    train_dataloader = DataLoader(
        train_dataset, shuffle=True, collate_fn=collate, batch_size=args.per_device_train_batch_size
    )
    eval_dataloader = DataLoader(eval_dataset, collate_fn=collate, batch_size=args.per_device_eval_batch_size)

    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=args.max_length, num_labels=2,
    )  # fmt: skip
    model = BertForSequenceClassification(config)

    # Split weights in two groups, one with weight decay and the other not.
    no_decay = ["bias", "LayerNorm.weight"]
    named = list(model.named_parameters())
    optimizer_grouped_parameters = [
        {"params": [p for n, p in named if not any(nd in n for nd in no_decay)], "weight_decay": args.weight_decay},
        {"params": [p for n, p in named if any(nd in n for nd in no_decay)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(optimizer_grouped_parameters, lr=args.learning_rate)
    lr_scheduler = get_scheduler(
        name=args.lr_scheduler_type, optimizer=optimizer, num_warmup_steps=args.num_warmup_steps,
        num_training_steps=args.max_train_steps,
    )  # fmt: skip

    model, optimizer, train_dataloader, lr_scheduler = job.prepare(model, optimizer, train_dataloader, lr_scheduler)
    completed_steps = 0
    while completed_steps < args.max_train_steps:
        model.train()
        for batch in train_dataloader:
            outputs = model(**batch)
            outputs.loss.backward()
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            completed_steps = job.step
            if completed_steps >= args.max_train_steps:
                break

        model.eval()
        correct = 0
        for batch in eval_dataloader:
            with torch.no_grad():
                predictions = model(**batch).logits.argmax(dim=-1)
            correct += (predictions == batch["labels"]).sum().item()
        print(f"step {completed_steps}: accuracy {correct / len(eval_dataset):.3f}")

    if args.output_dir is not None:
        model.save_pretrained(args.output_dir, is_main_process=job.rank == 0, state_dict=job.state_dict(model))


if __name__ == "__main__":
    main()
