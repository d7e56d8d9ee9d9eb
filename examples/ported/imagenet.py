"""A residual network with checkpoints and the best accuracy so far, in the style of PyTorch's ImageNet example."""

import argparse
import os
import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset

import shoal

parser = argparse.ArgumentParser(description="PyTorch image classification")
parser.add_argument("-a", "--arch", default="resnet6", choices=["resnet6", "resnet10"])
parser.add_argument("-j", "--workers", default=0, type=int, help="data loading workers (default: 0)")
parser.add_argument("--epochs", default=3, type=int, help="total epochs to run")
parser.add_argument("-b", "--batch-size", default=24, type=int)
parser.add_argument("--lr", default=0.05, type=float, help="initial learning rate")
parser.add_argument("--momentum", default=0.9, type=float)
parser.add_argument("--wd", "--weight-decay", default=1e-4, type=float, dest="weight_decay")
parser.add_argument("-p", "--print-freq", default=20, type=int)
parser.add_argument("--resume", default="", help="path to the latest checkpoint")
parser.add_argument("--output", default="checkpoint", help="where checkpoints go; empty: nowhere")
parser.add_argument("-e", "--evaluate", action="store_true", help="evaluate the model only")
parser.add_argument("--seed", default=0, type=int)
parser.add_argument("--device", default="cpu")


class BasicBlock(nn.Module):
    def __init__(self, inplanes, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + identity)


class ResNet(nn.Module):
    def __init__(self, layers, width=8, num_classes=10):
        super().__init__()
        blocks = []
        inplanes = 1
        for stage, count in enumerate(layers):
            for number in range(count):
                blocks.append(BasicBlock(inplanes, width << stage, 2 if number == 0 and stage else 1))
                inplanes = width << stage
        self.layers = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inplanes, num_classes)

    def forward(self, x):
        return self.fc(torch.flatten(self.avgpool(self.layers(x)), 1))


class Digits(Dataset):
    """Images with random crops while training."""

    def __init__(self, train):
        images, labels = load_digits(return_X_y=True)
        part = slice(None, 1440) if train else slice(1440, None)
        self.images = torch.tensor(images[part] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
        self.labels = torch.tensor(labels[part])
        self.train = train

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        if self.train:
            left, top = torch.randint(0, 3, (2,)).tolist()
            image = nn.functional.pad(image, (1, 1, 1, 1))[:, top : top + 8, left : left + 8]
        return image, self.labels[index]


class AverageMeter:
    """Computes and stores the average and current value"""

    def __init__(self, name):
        self.name, self.val, self.sum, self.count = name, 0.0, 0.0, 0

    def update(self, val, n=1):
        self.val = val
        self.sum += val * n
        self.count += n

    @property
    def avg(self):
        return self.sum / max(self.count, 1)

    def __str__(self):
        return f"{self.name} {self.val:.3f} ({self.avg:.3f})"


def accuracy(output, target, topk=(1,)):
    """Computes the accuracy over the k top predictions"""
    with torch.no_grad():
        _, pred = output.topk(max(topk), 1)
        correct = pred.eq(target.view(-1, 1))
        return [correct[:, :k].any(1).float().mean().item() * 100 for k in topk]


def train(train_loader, model, criterion, optimizer, epoch, device, args):
    batch_time, losses, top1 = AverageMeter("Time"), AverageMeter("Loss"), AverageMeter("Acc@1")
    model.train()
    end = time.time()
    for i, (images, target) in enumerate(train_loader):
        images = images.to(device, non_blocking=True)
        target = target.to(device, non_blocking=True)

        output = model(images)
        loss = criterion(output, target)
        losses.update(loss.item(), images.size(0))
        top1.update(accuracy(output, target)[0], images.size(0))

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        batch_time.update(time.time() - end)
        end = time.time()
        if i % args.print_freq == 0:
            print(f"Epoch: [{epoch}][{i}/{len(train_loader)}]", batch_time, losses, top1, sep="\t")


def validate(val_loader, model, criterion, device):
    losses, top1, top5 = AverageMeter("Loss"), AverageMeter("Acc@1"), AverageMeter("Acc@5")
    model.eval()
    with torch.no_grad():
        for images, target in val_loader:
            images, target = images.to(device), target.to(device)
            output = model(images)
            losses.update(criterion(output, target).item(), images.size(0))
            acc1, acc5 = accuracy(output, target, topk=(1, 5))
            top1.update(acc1, images.size(0))
            top5.update(acc5, images.size(0))
    print(f" * Acc@1 {top1.avg:.3f} Acc@5 {top5.avg:.3f}")
    return top1.avg


def save_checkpoint(folder, epoch, model, optimizer, scheduler):
    os.makedirs(folder, exist_ok=True)
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save({"epoch": epoch, **states}, os.path.join(folder, "checkpoint.pth.tar"))


def load_checkpoint(folder, model, optimizer, scheduler):
    checkpoint = torch.load(os.path.join(folder, "checkpoint.pth.tar"))
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["scheduler"])
    return checkpoint["epoch"]


def main():
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    job = shoal.init()
    device = torch.device(args.device)

    model = ResNet({"resnet6": [1, 1], "resnet10": [2, 2]}[args.arch]).to(device)
    criterion = nn.CrossEntropyLoss().to(device)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    scheduler = StepLR(optimizer, step_size=30, gamma=0.1)

    train_loader = DataLoader(Digits(True), args.batch_size, shuffle=True, num_workers=args.workers)
    val_loader = DataLoader(Digits(False), 128, shuffle=False, num_workers=args.workers)

    model, optimizer, train_loader, scheduler = job.prepare(model, optimizer, train_loader, scheduler)
    start_epoch, best_acc1 = 0, 0.0
    if args.resume:
        start_epoch = job.load(args.resume) and train_loader.epoch
    if args.evaluate:
        validate(val_loader, model, criterion, device)
        return

    for epoch in range(start_epoch, args.epochs):
        train(train_loader, model, criterion, optimizer, epoch, device, args)
        acc1 = validate(val_loader, model, criterion, device)
        scheduler.step()
        best_acc1 = max(acc1, best_acc1)
        print(f"   best {best_acc1:.3f}")
        if args.output:
            job.save(args.output)


if __name__ == "__main__":
    main()
