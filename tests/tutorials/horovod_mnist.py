"""Horovod's MNIST example for PyTorch, on made-up digits.

Changed: `import horovod.torch as hvd`. Nothing was wrong.
"""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import shoal.horovod as hvd


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, kernel_size=3)
        self.fc1 = nn.Linear(36, 16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(functional.max_pool2d(self.conv1(x), 2))
        x = functional.relu(self.fc1(x.flatten(1)))
        return functional.log_softmax(self.fc2(x), dim=1)


def metric_average(value: float, name: str) -> float:
    return hvd.allreduce(torch.tensor(value), name=name).item()


def main() -> None:
    hvd.init()
    torch.manual_seed(42)
    labels = torch.arange(96) % 4
    images = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.3
    images[torch.arange(96), 0, labels, :] += 2.0
    data = TensorDataset(images, labels)
    sampler = DistributedSampler(data, num_replicas=hvd.size(), rank=hvd.rank())
    loader = DataLoader(data, batch_size=8, sampler=sampler)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05 * hvd.size(), momentum=0.5)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), compression=hvd.Compression.none, op=hvd.Average
    )
    for epoch in range(6):
        model.train()
        sampler.set_epoch(epoch)
        for image, target in loader:
            optimizer.zero_grad()
            loss = functional.nll_loss(model(image), target)
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        right = sum(int((model(i).argmax(1) == t).sum()) for i, t in loader) / len(sampler)
    accuracy = metric_average(right, "avg_accuracy")
    weights = sum(p.sum() for p in model.parameters()).item()
    print(f"rank {hvd.rank()}: accuracy {accuracy:.2f}, weights {weights:.9f}")


if __name__ == "__main__":
    main()
