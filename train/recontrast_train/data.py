"""Good images as training batches, the same ones for the same seed wherever training starts.

order = batches(len(paths), 16, seed=111, start=0, stop=2000)
loader = make_loader(Augmentation(GoodImages(paths, input_spec), recipe), order, start=0)
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recontrast_edge.datasets import Sample
from recontrast_edge.errors import InputError
from recontrast_edge.images import read_image
from recontrast_edge.preprocess import Image, preprocess
from recontrast_edge.spec import InputSpec
from recontrast_edge.tiling import canvas, tiles
from recontrast_train.distributed import rank, world_size

CACHE_BYTES = 2 * 1024**3
"""Preprocessed images are kept in memory up to this size; beyond, they are read again each time."""

PREFETCH = 4
"""Batches each worker prepares ahead: enough to bridge a slow one."""


class GoodImages(Dataset[Tensor]):
    """Preprocessed good images, or the tiles that they are cut into: what the network is trained on.

    Args:
        paths: image files.
        spec: how they become network input.
        categories: of each image, for class-balanced batches; None where there is one.
    """

    def __init__(self, paths: Sequence[Path], spec: InputSpec, *, categories: Sequence[str] | None = None) -> None:
        self.paths = list(paths)
        self._tiles = spec.n_tiles
        self.categories = [name for name in categories or [""] * len(paths) for _ in range(self._tiles)]
        self.spec = spec
        width, height = spec.map_wh
        pixel_bytes = 3 if spec.is_tiled else 3 * 4
        fits = len(self.paths) * pixel_bytes * width * height <= CACHE_BYTES
        self._cache: dict[int, Tensor | Image] | None = {} if fits else None

    def __len__(self) -> int:
        return len(self.paths) * self._tiles

    def path(self, index: int) -> Path:
        """Of the image that is, or holds, what ``[index]`` gives."""
        return self.paths[index // self._tiles]

    def load(self, threads: int) -> None:
        """Read all images now, if they are kept in memory.

        Raises:
            InputError: an image that cannot be used.
        """
        if self._cache is not None:
            with ThreadPoolExecutor(threads) as pool:
                for _ in pool.map(self._read, range(len(self.paths))):
                    pass

    def __getitem__(self, index: int) -> Tensor:
        """(3, H, W) float32."""
        number, tile = divmod(index, self._tiles)
        read = self._read(number)
        if isinstance(read, Tensor):
            return read
        return torch.from_numpy(preprocess(tiles(read, self.spec)[tile], self.spec.of_tile))

    def _read(self, number: int) -> Tensor | Image:
        """One image as it is kept: preprocessed, or uncut, which takes less memory than its tiles."""
        if self._cache is not None and number in self._cache:
            return self._cache[number]
        path = self.paths[number]
        try:
            image = read_image(path)
            read = canvas(image, self.spec) if self.spec.is_tiled else torch.from_numpy(preprocess(image, self.spec))
        except InputError as error:
            # Reading names the file itself; a wrong ROI does not.
            raise error if str(path) in str(error) else InputError(f"{path}: {error}") from None
        if self._cache is not None:
            # A view would keep the whole image.
            self._cache[number] = read if isinstance(read, Tensor) else np.ascontiguousarray(read)
        return read


class Draw(NamedTuple):
    """What makes a batch, or one process's share of it.

    Attributes:
        iteration: the batch is for.
        indices: of the whole batch's images.
        rank, ranks: the process and how many there are; the images are dealt out like cards.
    """

    iteration: int
    indices: tuple[int, ...]
    rank: int = 0
    ranks: int = 1

    @property
    def places(self) -> range:
        """Places in the whole batch of the images that are this process's."""
        return range(self.rank, len(self.indices), self.ranks)


def batches(count: int, size: int, *, seed: int, start: int, stop: int) -> Iterator[list[int]]:
    """Image indices of the iterations ``start`` to ``stop``.

    The shuffled epochs are laid end to end and cut into batches of one size, so that no batch is ever too small for its
    BatchNorm, and iteration i's batch follows from the seed alone: a resumed training sees what an unbroken one sees.
    """
    epoch, order = -1, np.empty(0, np.int64)
    for iteration in range(start, stop):
        batch: list[int] = []
        for position in range(iteration * size, (iteration + 1) * size):
            if position // count != epoch:
                epoch = position // count
                order = np.random.default_rng([seed, epoch]).permutation(count)
            batch.append(int(order[position % count]))
        yield batch


def balanced_batches(categories: Sequence[str], size: int, *, seed: int, start: int, stop: int) -> Iterator[list[int]]:
    """As ``batches``, with each category drawn equally often.

    A round has one image of each category, in shuffled order; a category's images come from its own shuffled epochs.
    Rounds are laid end to end and cut into batches.

    Args:
        categories: of each image.
    """
    members = [np.flatnonzero(np.array(categories) == category) for category in dict.fromkeys(categories)]
    for iteration in range(start, stop):
        batch: list[int] = []
        for position in range(iteration * size, (iteration + 1) * size):
            round_, slot = divmod(position, len(members))
            category = int(_shuffled(len(members), seed, 2, round_)[slot])
            images = members[category]
            epoch, place = divmod(round_, images.size)
            batch.append(int(images[_shuffled(images.size, seed, 3, category, epoch)[place]]))
        yield batch


def _shuffled(count: int, *key: int) -> NDArray[np.int64]:
    return np.random.default_rng(key).permutation(count)


def make_loader(
    images: Dataset[Any], order: Iterator[list[int]], *, start: int, workers: int, pin: bool
) -> DataLoader[Any]:
    """What ``images`` gives for each draw, in order, read ahead by ``workers`` processes.

    Args:
        images: takes a ``Draw`` for an index.
        order: image indices of each iteration, of the whole batch; each process of a training gets its share.
        start: the first iteration's number.
        workers: processes; 0 prepares each batch when it is asked for.
        pin: page-locked memory, which copies to a GPU while that computes.
    """
    draws = [Draw(iteration, tuple(indices), rank(), world_size()) for iteration, indices in enumerate(order, start)]
    # One pass over the draws is the whole training, so the workers live as long as it does.
    return DataLoader(
        images,
        sampler=draws,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=pin,
        worker_init_fn=_start_worker,
        # Forked workers share the images that are in memory already.
        multiprocessing_context="fork" if workers else None,
    )


def _start_worker(number: int) -> None:
    # Ctrl-C reaches all processes of a terminal, but a worker that ends first would be taken for a crash. SIGTERM is
    # how a process that ends stops its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # The threads of the parent's OpenCV are not there in a forked process.
    cv2.setNumThreads(0)


def split_holdout(
    samples: Sequence[Sample], fraction: float, *, seed: int, parts: Sequence[str]
) -> tuple[list[Sample], list[Sample]]:
    """Set good images aside for calibration.

    Args:
        samples: all good images.
        fraction: share of the parts to hold out, 0 <= fraction < 1.
        seed: of the draw.
        parts: the part that each image shows; images of one part stay together, because pictures of a part that was
            trained on are no fresh evidence.

    Returns:
        (training, held out), both in the given order.

    Raises:
        InputError: nothing would be left to train on.
    """
    if fraction == 0.0:
        return list(samples), []
    names = sorted(set(parts))
    count = max(1, round(len(names) * fraction))
    if count >= len(names):
        raise InputError(f"holding out {fraction:.0%} of {len(names)} parts leaves none to train on; give more images")
    drawn = {names[index] for index in np.random.default_rng([seed, 1]).permutation(len(names))[:count]}
    train = [sample for sample, part in zip(samples, parts, strict=True) if part not in drawn]
    held = [sample for sample, part in zip(samples, parts, strict=True) if part in drawn]
    return train, held
