"""What the examples share: MNIST's files and the options of every run."""

from __future__ import annotations

import argparse
import gzip
import math
import struct
import zlib
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hyperconv_ext.planner import BACKEND_NAMES

CLASSES = 10
IMAGES_MAGIC = 2051
LABELS_MAGIC = 2049


@dataclass(frozen=True)
class Data:
    """Images `[N, 1, H, W]`, float32 in [0, 1], and labels `[N]`, int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device) -> Data:
        """The same data there."""
        return Data(*(getattr(self, field.name).to(device) for field in fields(self)))


def read_idx(path: Path, magic: int) -> Tensor:
    """The uint8 array of one gzipped idx file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not gzip, its magic number is another, or its length contradicts its header.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a gzipped idx file, found none; put it there")
    try:
        content = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a whole gzip file, got {error}; fetch it again") from error
    header = 4 + 4 * (magic & 0xFF)  # the magic number's last byte counts the axes
    if len(content) < header:
        raise ValueError(
            f"{path}: expected an idx header of {header} bytes, got {len(content)} bytes; fetch it again"
        )
    found, *shape = struct.unpack_from(f">{header // 4}I", content)
    if found != magic:
        raise ValueError(
            f"{path}: expected the magic number {magic}, got {found}; check the file's name"
        )
    expected, got = math.prod(shape), len(content) - header
    if got != expected:
        raise ValueError(
            f"{path}: expected {expected} bytes of data for shape {shape}, got {got}; fetch it again"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


def load_mnist_part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images `[N, 1, H, W]` and labels `[N]` of part `'train'` or `'t10k'`.

    Raises:
        FileNotFoundError, ValueError: from `read_idx`.
        ValueError: the two files disagree in length, or a label is no digit.
    """
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", IMAGES_MAGIC)
    path = folder / f"{part}-labels-idx1-ubyte.gz"
    labels = read_idx(path, LABELS_MAGIC).long()
    if len(labels) != len(images):
        raise ValueError(
            f"{path}: expected {len(images)} labels, one per image, got {len(labels)}; "
            f"take both files from one set"
        )
    largest = max(labels.tolist(), default=None)
    if largest is None or largest >= CLASSES:
        raise ValueError(f"{path}: expected labels 0 to {CLASSES - 1}, got {largest}; check the file")
    return images[:, None].float() / 255, labels


def load_mnist(folder: Path) -> Data:
    """MNIST's 60,000 training and 10,000 held-out images."""
    return Data(*load_mnist_part(folder, "train"), *load_mnist_part(folder, "t10k"))


@dataclass(frozen=True)
class Images:
    """The images and labels of a run; the held-out ones are the last of MNIST's training file.

    What is chosen by the accuracy on them leaves MNIST's test set untouched.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def checksum(self) -> str:
        """Differs where the images or their labels do, except by chance."""
        total = 0
        for part in (self.train, self.train_labels, self.test, self.test_labels):
            total = zlib.crc32(part.cpu().numpy().tobytes(), total)
        return f"{total:08x}"


@lru_cache(maxsize=1)
def load_images(folder: Path, train: int, test: int, device: str) -> Images:
    """The first `train` and the last `test` images of the training file in `folder`, once per process.

    Raises:
        FileNotFoundError, ValueError: from `load_mnist_part`.
        ValueError: there are fewer images.
    """
    images, labels = load_mnist_part(folder, "train")
    if train + test > len(labels):
        raise ValueError(
            f"{folder}: expected {train} + {test} images for training and testing, got {len(labels)}; "
            f"lower --train or --test"
        )
    images, labels = images.to(device), labels.to(device)
    return Images(images[:train], labels[:train], images[-test:], labels[-test:])


def positive(text: str) -> int:
    """An integer of 1 or more, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {value}")
    return value


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """`--seed`, `--threads`, `--device` and `--backend`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batch order")
    parser.add_argument("--threads", type=positive, help="of the CPU; PyTorch's own choice by default")
    parser.add_argument("--device", type=torch.device, default=device, help="where to train")
    parser.add_argument("--backend", choices=BACKEND_NAMES, default="auto", help="of HyperConv2d")


def prepare(args: argparse.Namespace) -> None:
    """Make the process compute with as many threads as asked for."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
