"""Random changes of images: right against independent references, and drawn by seed, epoch and sample alone."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
import torch.nn.functional as F

from lm_train.data.augment import Draws, change, crop_and_flip, mixup_partners
from lm_train.data.images import TrainingImages
from lm_train.recipe import ImageData
from tests.image_data import image_plan, prepared_images, random_images, write_idx_set

EVERYTHING = {"crop": 2, "flip": True, "rotation": 15.0, "scale": 0.2, "erasing": 3, "mixup": 0.4}


def draws_of(n: int, seed: int = 1, epoch: int = 0) -> Draws:
    return Draws(seed, np.arange(n), np.full(n, epoch))


class Given(Draws):
    """Draws that are all the same number."""

    def __init__(self, n: int, number: float) -> None:
        super().__init__(0, np.arange(n), np.zeros(n, dtype=np.int64))
        self.number = number

    def uniform(self, *use: int) -> np.ndarray:
        return np.full(len(self), self.number)


def test_crops_and_flips_are_windows_of_the_mirrored_image() -> None:
    pad, n = 2, 600
    image = random_images(1, 9, 8, channels=3)[0].transpose(2, 0, 1)
    outer = F.pad(torch.from_numpy(image).float(), [pad] * 4, mode="reflect").to(torch.uint8)
    windows = {}
    for y, x, flipped in itertools.product(range(5), range(5), (False, True)):
        window = outer[:, y : y + 9, x : x + 8]
        windows[(window.flip(2) if flipped else window).contiguous().numpy().tobytes()] = (y, x, flipped)
    assert len(windows) == 50
    cropped = crop_and_flip(np.stack([image] * n), ImageData(crop=pad, flip=True), draws_of(n))
    assert cropped.shape == (n, 3, 9, 8)
    seen = Counter(windows[np.ascontiguousarray(c).tobytes()] for c in cropped)
    assert len(seen) == 50, "every window comes"
    assert scipy.stats.chisquare([seen[w] for w in windows.values()]).pvalue > 1e-3


def test_nothing_asked_changes_nothing() -> None:
    images = random_images(4)[:, None]
    assert np.array_equal(crop_and_flip(images.copy(), ImageData(), draws_of(4)), images)
    floats = torch.from_numpy(images).float()
    assert torch.equal(change(floats.clone(), ImageData(), draws_of(4)), floats)


def test_a_quarter_turn() -> None:
    images = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    turned = change(images.clone(), ImageData(rotation=90), Given(2, 1.0))
    back = change(images.clone(), ImageData(rotation=90), Given(2, 0.0))
    torch.testing.assert_close(turned, torch.rot90(images, 1, (2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(back, torch.rot90(images, -1, (2, 3)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("angle", "zoom"), [(30.0, 1.0), (0.0, 1.25), (20.0, 1.4)])
def test_rotation_and_scale_against_scipy(angle: float, zoom: float) -> None:
    """On images that are not square; scipy's bilinear map with the edge continued is the reference."""
    image = np.random.default_rng(0).normal(size=(9, 14)).astype(np.float32)
    section = ImageData(rotation=angle, scale=round(zoom - 1, 6))
    ours = change(torch.from_numpy(image)[None, None].clone(), section, Given(1, 1.0))[0, 0].numpy()
    cosine, sine = math.cos(math.radians(angle)) / zoom, math.sin(math.radians(angle)) / zoom
    matrix, middle = np.array([[cosine, sine], [-sine, cosine]]), (np.array(image.shape) - 1) / 2
    expected = scipy.ndimage.affine_transform(image, matrix, middle - matrix @ middle, order=1, mode="nearest")
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_erased_squares() -> None:
    erased = change(torch.ones(400, 2, 6, 5), ImageData(erasing=3), draws_of(400)) == 0
    assert torch.equal(erased[:, 0], erased[:, 1]), "all channels alike"
    middles = set()
    for mask in erased[:, 0]:
        rows, columns = mask.any(1).nonzero().ravel().tolist(), mask.any(0).nonzero().ravel().tolist()
        assert int(mask.sum()) == len(rows) * len(columns), "one rectangle"
        assert 2 <= len(rows) <= 3
        assert 2 <= len(columns) <= 3
        middles.add((rows[0], len(rows), columns[0], len(columns)))
    assert len(middles) == 30, "a square around each of the 6 x 5 pixels"


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
def test_mixing_shares_are_of_the_beta_distribution(alpha: float) -> None:
    section = ImageData(mixup=alpha)
    partners, shares = mixup_partners(section, draws_of(5000), 7)
    assert scipy.stats.kstest(shares, scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert scipy.stats.chisquare(np.bincount(partners, minlength=7)).pvalue > 1e-3


def test_draws_are_keyed_by_seed_epoch_and_sample() -> None:
    whole = draws_of(100).uniform(3)
    some = Draws(1, np.array([40, 7, 99]), np.zeros(3, dtype=np.int64)).uniform(3)
    assert np.array_equal(some, whole[[40, 7, 99]]), "not by the place in the batch"
    others = [draws_of(100, seed=2).uniform(3), draws_of(100, epoch=1).uniform(3), draws_of(100).uniform(4)]
    for other in others:
        assert abs(np.corrcoef(whole, other)[0, 1]) < 0.35
        assert not (whole == other).any()


def training_images(tmp_path: Path, **options: object) -> TrainingImages:
    labels = [0] * 20 + [1] * 14 + [2] * 6
    write_idx_set(tmp_path / "set", random_images(40, 8, 8), labels)
    plan = image_plan(micro=16, steps=10)
    samples = prepared_images(tmp_path / "set", tmp_path / "run", plan, **options).samples["train"]
    assert isinstance(samples, TrainingImages)
    return samples


@pytest.mark.usefixtures("cache")
def test_a_sample_is_changed_alike_in_any_batch(tmp_path: Path) -> None:
    samples = training_images(tmp_path, **EVERYTHING)
    numbers, epochs = np.array([5, 0, 30, 5]), np.array([0, 0, 1, 2])
    together = samples.batch(numbers, epochs)
    for i in range(4):
        alone = samples.batch(numbers[i : i + 1], epochs[i : i + 1])
        torch.testing.assert_close(alone["inputs"][0], together["inputs"][i], atol=1e-6, rtol=0)
        assert torch.equal(alone["labels"][0], together["labels"][i])
    assert not torch.allclose(together["inputs"][0], together["inputs"][3]), "another epoch, another change"


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_mixup_is_the_mean_of_two_losses(tmp_path: Path, weights: str) -> None:
    """The loss of a mixed batch is s times torch's weighted cross-entropy with the one class plus 1 - s with the other's."""
    samples = training_images(tmp_path, mixup=0.5, class_weights=weights)
    numbers, epochs = np.arange(16), np.zeros(16, dtype=np.int64)
    batch, total = samples.batch(numbers, epochs), samples.total(numbers, epochs)
    partners, shares = mixup_partners(samples.section, Draws(samples.seed, numbers, epochs), len(samples))
    keep = torch.from_numpy(shares)
    plain = samples.normalise(samples.pixels[samples.numbers]).double()
    mixed = keep[:, None, None, None] * plain[numbers] + (1 - keep)[:, None, None, None] * plain[partners]
    torch.testing.assert_close(batch["inputs"].double(), mixed, atol=1e-6, rtol=0)
    assert batch["labels"].shape == (16, 3)
    torch.testing.assert_close(batch["labels"].sum(1), torch.ones(16))

    logits = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.from_numpy(samples.labels), minlength=3)
    weight = len(samples) / (3 * counts) if weights == "balanced" else torch.ones(3)
    own, other = torch.from_numpy(samples.labels[numbers]), torch.from_numpy(samples.labels[partners])
    expected = keep * F.cross_entropy(logits, own, weight=weight, reduction="none")
    expected += (1 - keep) * F.cross_entropy(logits, other, weight=weight, reduction="none")
    expected = expected.sum() / (keep * weight[own] + (1 - keep) * weight[other]).sum()
    ours = F.cross_entropy(logits, batch["labels"], reduction="none") * batch.get("weights", torch.ones(16))
    torch.testing.assert_close((ours.sum() / total).double(), expected, atol=1e-6, rtol=0)
