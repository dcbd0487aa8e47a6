"""What people would write without DVC and MLflow: LeNet on Fashion-MNIST in plain PyTorch, tested after each epoch.

    python benchmarks/plain.py DIR

DIR/FashionMNIST/raw holds torchvision's copy of the data; missing files are downloaded. Prints a line of JSON after
each epoch. The reference for benchmarks/run.py, it uses nothing else of the project. Without torchvision, as on some
GPU machines, a class below reads the same files, faster than torchvision does.
"""

import argparse
import json
import os
import re
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

try:
    from torchvision import datasets, transforms
except ImportError:
    datasets = None


class RawFashionMNIST(torch.utils.data.Dataset):
    """The items of torchvision's FashionMNIST with ToTensor: float32 (1, 28, 28) in 0..1, and the label."""

    def __init__(self, folder: str, prefix: str) -> None:
        raw = Path(folder, "FashionMNIST", "raw")
        images = bytearray((raw / f"{prefix}-images-idx3-ubyte").read_bytes()[16:])
        self.images = torch.frombuffer(images, dtype=torch.uint8).view(-1, 1, 28, 28)
        self.labels = list((raw / f"{prefix}-labels-idx1-ubyte").read_bytes()[8:])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index].float() / 255, self.labels[index]


class LeNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 6, kernel_size=5),
            nn.Sigmoid(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5),
            nn.Sigmoid(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 120),
            nn.Sigmoid(),
            nn.Linear(120, 84),
            nn.Sigmoid(),
            nn.Linear(84, 10),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="data folder")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="workers of each DataLoader")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    if datasets:
        sets = [
            datasets.FashionMNIST(args.data, train, transforms.ToTensor(), download=True) for train in (True, False)
        ]
    else:
        sets = [RawFashionMNIST(args.data, prefix) for prefix in ("train", "t10k")]
    training, test = (
        DataLoader(dataset, batch_size=64, shuffle=shuffle, num_workers=args.workers, pin_memory=args.device == "cuda")
        for dataset, shuffle in zip(sets, (True, False), strict=True)
    )
    model = LeNet().to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loss_function = nn.CrossEntropyLoss()

    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        model.train()
        loss_sum, correct = 0.0, 0
        for images, labels in training:
            images, labels = images.to(args.device), labels.to(args.device)
            optimizer.zero_grad()
            logits = model(images)
            loss = loss_function(logits, labels)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(labels)
            correct += (logits.argmax(1) == labels).sum().item()
        trained = time.perf_counter()
        train_metrics = {"train_loss": loss_sum / len(sets[0]), "train_accuracy": correct / len(sets[0])}
        model.eval()
        correct = 0
        with torch.no_grad():
            for images, labels in test:
                predicted = model(images.to(args.device)).argmax(1)
                correct += (predicted == labels.to(args.device)).sum().item()
        line = {
            "epoch": epoch,
            **train_metrics,
            "train_seconds": trained - start,
            "epoch_seconds": time.perf_counter() - start,
            "test_accuracy": correct / len(sets[1]),
            "peak_mib": float(re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
