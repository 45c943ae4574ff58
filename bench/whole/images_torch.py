"""A task of bench/images.py as a user of PyTorch would write it. Arguments: the task as JSON. Prints accuracy and seconds."""

import gzip
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

task = json.loads(sys.argv[1])
torch.set_num_threads(task["threads"])
torch.manual_seed(task["seed"])


def read(name):
    """An IDX file of bytes."""
    data = Path(name).read_bytes()
    data = gzip.decompress(data) if name.endswith(".gz") else data
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy())


x, y, x_test, y_test = (read(name) for name in task["files"])
mean, std = x.float().mean() / 255, x.float().std() / 255
y, y_test = y.long(), y_test.long()
moved = any(task[name] for name in ("shift", "rotate", "scale"))


def changed(x):
    """Moved, turned, scaled, mirrored at random, as chainrule's Augment does it."""
    if not moved:
        return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x) if task["flip"] else x
    n, side = len(x), x.shape[-1]
    angle = (2 * torch.rand(n) - 1) * math.radians(task["rotate"])
    factor = 1 + (2 * torch.rand(n) - 1) * task["scale"]
    shift = torch.randint(-task["shift"], task["shift"] + 1, (n, 2)) * (2 / (side - 1))
    mirror = torch.where(torch.rand(n) < 0.5, -1.0, 1.0) if task["flip"] else torch.ones(n)
    a, b = torch.cos(angle) / factor, torch.sin(angle) / factor
    turn = torch.stack([torch.stack([mirror * a, -mirror * b], 1), torch.stack([b, a], 1)], 1)
    theta = torch.cat([turn, -(turn @ shift[..., None])], 2)
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=True), align_corners=True)


def network():
    """LeNet-5, or one hidden layer."""
    dropout = [nn.Dropout(task["dropout"])] if task["dropout"] else []
    if task["network"] == "dense":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 800), nn.ReLU(), *dropout, nn.Linear(800, 10))
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), *dropout, nn.Linear(120, 84), nn.ReLU(), *dropout, nn.Linear(84, 10),
    )  # fmt: skip


net = network()
optimizer = torch.optim.AdamW(net.parameters(), task["learning_rate"], weight_decay=task["weight_decay"], fused=True)
steps = task["epochs"] * -(-len(x) // task["batch"])
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
begun = time.perf_counter()
for _ in range(task["epochs"]):
    for rows in torch.randperm(len(x)).split(task["batch"]):
        optimizer.zero_grad()
        batch = (changed(x[rows, None].float() / 255) - mean) / std
        F.cross_entropy(net(batch), y[rows]).backward()
        optimizer.step()
        schedule.step()
seconds = time.perf_counter() - begun
net.eval()
with torch.no_grad():
    found = torch.cat([net((part[:, None].float() / 255 - mean) / std).argmax(1) for part in x_test.split(1000)])
print((found == y_test).double().mean().item(), seconds)
