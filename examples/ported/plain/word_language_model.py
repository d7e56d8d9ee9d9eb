"""A recurrent network that says the next word, in the style of PyTorch's word-language-model example."""

import argparse
import math
import pathlib
import re
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

parser = argparse.ArgumentParser(description="RNN language model on the source of argparse")
parser.add_argument("--emsize", type=int, default=48, help="size of word embeddings")
parser.add_argument("--nhid", type=int, default=48, help="number of hidden units per layer")
parser.add_argument("--nlayers", type=int, default=2, help="number of layers")
parser.add_argument("--lr", type=float, default=5.0, help="initial learning rate")
parser.add_argument("--clip", type=float, default=0.25, help="gradient clipping")
parser.add_argument("--epochs", type=int, default=2, help="upper epoch limit")
parser.add_argument("--batch-size", type=int, default=20)
parser.add_argument("--bptt", type=int, default=20, help="sequence length")
parser.add_argument("--dropout", type=float, default=0.2)
parser.add_argument("--words", type=int, default=4000, help="words of the text to read")
parser.add_argument("--seed", type=int, default=1111)
parser.add_argument("--log-interval", type=int, default=5)
parser.add_argument("--save", default="", help="path to save the final model")


class Corpus(Dataset):
    """Sequences of word numbers, and the same one word later."""

    def __init__(self, words, vocabulary, bptt):
        self.ids = torch.tensor([vocabulary[word] for word in words])
        self.bptt = bptt

    def __len__(self):
        return (len(self.ids) - 1) // self.bptt

    def __getitem__(self, index):
        at = index * self.bptt
        return self.ids[at : at + self.bptt], self.ids[at + 1 : at + 1 + self.bptt]


class RNNModel(nn.Module):
    def __init__(self, ntoken, ninp, nhid, nlayers, dropout):
        super().__init__()
        self.nlayers, self.nhid = nlayers, nhid
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(ntoken, ninp)
        self.rnn = nn.LSTM(ninp, nhid, nlayers, dropout=dropout, batch_first=True)
        self.decoder = nn.Linear(nhid, ntoken)
        self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, data, hidden):
        output, hidden = self.rnn(self.drop(self.encoder(data)), hidden)
        return self.decoder(self.drop(output)).flatten(0, 1), hidden

    def init_hidden(self, batch_size):
        return torch.zeros(self.nlayers, batch_size, self.nhid), torch.zeros(self.nlayers, batch_size, self.nhid)


def evaluate(model, criterion, loader):
    model.eval()
    total_loss = 0.0
    with torch.no_grad():
        for data, targets in loader:
            output, _ = model(data, model.init_hidden(data.size(0)))
            total_loss += data.numel() * criterion(output, targets.flatten()).item()
    return total_loss / (len(loader.dataset) * loader.dataset.bptt)


def main():
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    text = pathlib.Path(argparse.__file__).read_text()
    words = re.findall(r"\w+|[^\w\s]|\n", text)[: args.words]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    cut = len(words) * 9 // 10
    train_data, val_data = Corpus(words[:cut], vocabulary, args.bptt), Corpus(words[cut:], vocabulary, args.bptt)
    train_loader = DataLoader(train_data, batch_size=args.batch_size)
    val_loader = DataLoader(val_data, batch_size=10)

    model = RNNModel(len(vocabulary), args.emsize, args.nhid, args.nlayers, args.dropout)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)

    best_val_loss = math.inf
    for epoch in range(1, args.epochs + 1):
        model.train()
        start_time = epoch_start = time.time()
        for batch, (data, targets) in enumerate(train_loader):
            optimizer.zero_grad()
            output, _ = model(data, model.init_hidden(data.size(0)))
            loss = criterion(output, targets.flatten())
            loss.backward()
            # `clip_grad_norm` helps prevent the exploding gradient problem in RNNs / LSTMs.
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            if batch % args.log_interval == 0 and batch > 0:
                elapsed = (time.time() - start_time) * 1000 / args.log_interval
                print(f"| epoch {epoch:3d} | batch {batch:4d} | ms/batch {elapsed:5.2f} | loss {loss.item():5.2f}")
                start_time = time.time()

        val_loss = evaluate(model, criterion, val_loader)
        elapsed = time.time() - epoch_start
        print(f"| end of epoch {epoch:3d} | time: {elapsed:5.2f}s | valid ppl {math.exp(val_loss):8.2f}")
        if val_loss < best_val_loss:
            best_val_loss = val_loss
        else:  # anneal the learning rate if no improvement has been seen in the validation dataset
            for group in optimizer.param_groups:
                group["lr"] /= 4.0

    if args.save:
        torch.save(model.state_dict(), args.save)


if __name__ == "__main__":
    main()
