"""Random changes of training images, a whole batch at a time.

Every draw is keyed by (seed, epoch, sample), so that an image is changed alike at any number of processes and loader workers,
and after a resume. Shapes in comments: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from lm_train.data.batches import Integers
from lm_train.data.order import key_of, mix64
from lm_train.recipe import ImageData

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
_SHIFT_Y, _SHIFT_X, _FLIP, _ANGLE, _SCALE, _ERASE_Y, _ERASE_X, _PARTNER, _SHARE = range(9)
"""What a number is drawn for; each use has its own stream."""


class Draws:
    """Random numbers of the samples of a batch.

    Args:
        seed: the recipe's.
        samples: numbers of the samples, (B,).
        epochs: the epoch of each, (B,).
    """

    def __init__(self, seed: int, samples: Integers, epochs: Integers) -> None:
        keys = mix64(samples.astype(np.uint64) ^ np.uint64(key_of(seed, len("augment"))))
        self._keys = mix64(keys ^ epochs.astype(np.uint64))

    def __len__(self) -> int:
        return len(self._keys)

    def bits(self, *use: int) -> npt.NDArray[np.uint64]:
        """64 random bits for each sample, (B,)."""
        return mix64(self._keys ^ np.uint64(key_of(*use)))

    def uniform(self, *use: int) -> Floats:
        """Numbers from 0 to below 1 on a grid of 2^-53, (B,)."""
        return (self.bits(*use) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def below(self, number: int, *use: int) -> Integers:
        """Whole numbers from 0 to below `number`, (B,)."""
        return (self.uniform(*use) * number).astype(np.int64)

    def beta(self, alpha: float, *use: int) -> Floats:
        """Numbers from the Beta(alpha, alpha) distribution for an alpha up to 1, (B,).

        By rejection (Jöhnk 1964), in logarithms, since a power 1/alpha underflows: at most every second try fails.
        """
        result = np.empty(len(self))
        pending = np.arange(len(self))
        for attempt in range(10_000):
            one = np.log1p(-self.uniform(*use, attempt, 0)[pending]) / alpha
            other = np.log1p(-self.uniform(*use, attempt, 1)[pending]) / alpha
            both = np.logaddexp(one, other)
            taken = both <= 0
            result[pending[taken]] = np.exp(one - both)[taken]
            pending = pending[~taken]
            if not len(pending):
                return result
        raise AssertionError("ten thousand tries in a row failed")


def moves_pixels(section: ImageData) -> bool:
    """Whether crop or flip are asked for."""
    return section.crop > 0 or section.flip


def crop_and_flip(images: Pixels, section: ImageData, draws: Draws) -> Pixels:
    """Random crops of the mirrored-out images, some of them flipped: (B, C, H, W) to the same shape.

    Args:
        images: may be changed.
        section: `crop`, `flip`.
        draws: of these samples.
    """
    if section.crop:
        pad, height, width = section.crop, images.shape[2], images.shape[3]
        windows = sliding_window_view(_mirrored_out(images, pad), (height, width), axis=(2, 3))  # (B, C, y, x, H, W)
        y, x = draws.below(2 * pad + 1, _SHIFT_Y), draws.below(2 * pad + 1, _SHIFT_X)
        images = windows[np.arange(len(images)), :, y, x]
    if section.flip:
        flipped = np.flatnonzero(draws.bits(_FLIP) >> np.uint64(63))
        images[flipped] = images[flipped][..., ::-1]
    return images


def _mirrored_out(images: Pixels, pad: int) -> Pixels:
    """(B, C, H + 2 pad, W + 2 pad), the edge itself not repeated; numpy's own `pad` is several times slower."""
    batch, channels, height, width = images.shape
    result = np.empty((batch, channels, height + 2 * pad, width + 2 * pad), dtype=np.uint8)
    rows = result[:, :, pad : pad + height]
    rows[..., pad : pad + width] = images
    rows[..., :pad] = images[..., pad:0:-1]
    rows[..., pad + width :] = images[..., -2 : -2 - pad : -1]
    result[:, :, :pad] = result[:, :, 2 * pad : pad : -1]
    result[:, :, pad + height :] = result[:, :, pad + height - 2 : height - 2 : -1]
    return result


def change(images: Tensor, section: ImageData, draws: Draws) -> Tensor:
    """Rotates, scales and erases normalised images, (B, C, H, W); 0 is the training set's mean.

    Args:
        images: may be changed.
        section: `rotation`, `scale`, `erasing`.
        draws: of these samples.
    """
    if section.rotation or section.scale:
        images = _turned(images, section, draws)
    return _erased(images, section.erasing, draws) if section.erasing else images


def _turned(images: Tensor, section: ImageData, draws: Draws) -> Tensor:
    """Rotated and scaled around the middle; what comes in from outside continues the edge."""
    angle = (2 * draws.uniform(_ANGLE) - 1) * math.radians(section.rotation)
    zoom = 1 + (2 * draws.uniform(_SCALE) - 1) * section.scale
    height, width = images.shape[2:]
    cosine, sine = np.cos(angle) / zoom, np.sin(angle) / zoom
    # grid_sample's coordinates run from -1 to 1 over either side, whatever its length
    matrix = np.zeros((len(images), 2, 3), dtype=np.float32)
    matrix[:, 0, 0], matrix[:, 0, 1] = cosine, -sine * height / width
    matrix[:, 1, 0], matrix[:, 1, 1] = sine * width / height, cosine
    grid = F.affine_grid(torch.from_numpy(matrix), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _erased(images: Tensor, side: int, draws: Draws) -> Tensor:
    """A square of `side` pixels around a pixel of the image is 0; at the border a part of it lies outside."""
    height, width = images.shape[2:]
    rows = _stretch(draws.below(height, _ERASE_Y), side, height)
    columns = _stretch(draws.below(width, _ERASE_X), side, width)
    erased = rows[:, :, None] & columns[:, None, :]  # (B, H, W)
    return images.masked_fill_(torch.from_numpy(erased)[:, None], 0.0)


def _stretch(centres: Integers, side: int, length: int) -> npt.NDArray[np.bool_]:
    """Which of `length` places lie on a stretch of `side` around each centre, (B, length)."""
    first = (centres - side // 2)[:, None]
    places = np.arange(length)
    return (places >= first) & (places < first + side)


def mixup_partners(section: ImageData, draws: Draws, size: int) -> tuple[Integers, Floats]:
    """For each sample another one of the whole training set, (B,), and the share that the sample itself keeps, (B,)."""
    return draws.below(size, _PARTNER), draws.beta(section.mixup, _SHARE)
