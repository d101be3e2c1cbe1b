"""Images with a class each: uint8 pixels mapped from the cache, normalised by the training set, changed at random."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lm_train.data.augment import Draws, change, crop_and_flip, mixup_partners
from lm_train.data.batches import Batch, Integers, Samples, Split
from lm_train.data.classes import balanced_weights, check_classes, total_weight
from lm_train.data.image_cache import StoredImages, StoredSplit, cache_name, stored_images
from lm_train.data.image_source import open_images
from lm_train.data.module import SampleDataModule
from lm_train.data.source import digest_of_parts
from lm_train.data.splits import divide, duplicates
from lm_train.errors import DataError
from lm_train.plan import DataFacts, Plan
from lm_train.recipe import AnyModel, ImageData
from lm_train.runs import RunFolder

Floats = npt.NDArray[np.float64]


class Normalisation:
    """Brings pixels to mean 0 and deviation 1, channel by channel.

    Args:
        mean: of the training set's pixels, (C,).
        deviation: of them; a channel that never changes has 1 in its place, (C,).
        shape: channels, height and width.
    """

    def __init__(self, mean: Floats, deviation: Floats, shape: tuple[int, int, int]) -> None:
        self.mean, self.deviation = mean, deviation
        # whole images, since a broadcast over the last two dimensions takes three times as long
        self._scale = _plane(1 / deviation, shape)
        self._shift = _plane(-mean / deviation, shape)

    @classmethod
    def of(cls, sums: npt.NDArray[np.uint64], shape: tuple[int, int, int]) -> Normalisation:
        """From each image's sums of pixels and of their squares, (n, 2, C): whole numbers, so in any order the same."""
        count = len(sums) * shape[1] * shape[2]
        total, squares = sums.sum(axis=0).tolist()
        variances = [(count * s - t * t) / count**2 for t, s in zip(total, squares, strict=True)]
        deviations = [v**0.5 if v > 0 else 1.0 for v in variances]
        return cls(np.array([t / count for t in total]), np.array(deviations), shape)

    def __call__(self, pixels: npt.NDArray[np.uint8]) -> Tensor:
        """(B, C, H, W) bytes to floats."""
        images = torch.from_numpy(pixels).float()
        return torch.addcmul(self._shift, images, self._scale, out=images)


def _plane(values: Floats, shape: tuple[int, int, int]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))[:, None, None].expand(shape).contiguous()


class ImageSamples(Samples):
    """Some of the images of a stored split.

    Args:
        stored: the split.
        numbers: of its images, those that are meant, (n,).
        normalise: from pixels to what the network takes.
    """

    def __init__(self, stored: StoredSplit, numbers: Integers, normalise: Normalisation) -> None:
        self.pixels, self.numbers, self.normalise = stored.pixels, numbers, normalise
        self.labels = stored.labels[numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    def batch(self, samples: Integers, epochs: Integers | None) -> Batch:
        pixels = self.pixels.take(self.numbers[samples], axis=0)
        return {"inputs": self.normalise(pixels), "labels": torch.from_numpy(self.labels[samples])}


class TrainingImages(ImageSamples):
    """Images that are changed at random, whose classes may be weighted and mixed.

    A mixed sample keeps the share s of itself and has 1 - s of its partner, whose own changes are those of the same epoch.
    Its loss is s times the weighted loss of its own class plus 1 - s times that of its partner's, and so is its part of
    `total`: both are written as one weight and shares of classes that sum to 1.

    Args:
        section: what is to be done to the images.
        seed: keys every draw.
        weights: of each class, (classes,); None weighs all alike.
        n_classes: classes of the set.
    """

    def __init__(
        self,
        stored: StoredSplit,
        numbers: Integers,
        normalise: Normalisation,
        section: ImageData,
        seed: int,
        weights: Floats | None,
        n_classes: int,
    ) -> None:
        super().__init__(stored, numbers, normalise)
        self.section, self.seed, self.weights, self.n_classes = section, seed, weights, n_classes

    def batch(self, samples: Integers, epochs: Integers | None) -> Batch:
        assert epochs is not None
        if self.section.mixup:
            return self._mixed(samples, epochs)
        batch = {"inputs": self._changed(samples, epochs), "labels": torch.from_numpy(self.labels[samples])}
        if self.weights is not None:
            batch["weights"] = torch.from_numpy(self.weights[self.labels[samples]].astype(np.float32))
        return batch

    def total(self, samples: Integers, epochs: Integers) -> float:
        """The sum of the samples' weights."""
        if self.weights is None:
            return float(len(samples))
        own = self.weights[self.labels[samples]]
        if not self.section.mixup:
            return total_weight(own)
        partners, share = self._partners(samples, epochs)
        return total_weight(share * own + (1 - share) * self.weights[self.labels[partners]])

    def _changed(self, samples: Integers, epochs: Integers) -> Tensor:
        draws = Draws(self.seed, samples, epochs)
        pixels = self.pixels.take(self.numbers[samples], axis=0)
        return change(self.normalise(crop_and_flip(pixels, self.section, draws)), self.section, draws)

    def _partners(self, samples: Integers, epochs: Integers) -> tuple[Integers, Floats]:
        return mixup_partners(self.section, Draws(self.seed, samples, epochs), len(self))

    def _mixed(self, samples: Integers, epochs: Integers) -> Batch:
        partners, share = self._partners(samples, epochs)
        both = self._changed(np.concatenate((samples, partners)), np.concatenate((epochs, epochs)))
        own, other = both.split(len(samples))
        kept = torch.from_numpy(share.astype(np.float32))[:, None, None, None]
        classes = self.labels[samples], self.labels[partners]
        one, two = (np.ones(len(samples)) if self.weights is None else self.weights[c] for c in classes)
        weights = share * one + (1 - share) * two
        shares = np.zeros((len(samples), self.n_classes))
        rows = np.arange(len(samples))
        shares[rows, classes[0]] = share * one / weights
        shares[rows, classes[1]] += (1 - share) * two / weights
        batch = {"inputs": torch.lerp(other, own, kept), "labels": torch.from_numpy(shares.astype(np.float32))}
        if self.weights is not None:
            batch["weights"] = torch.from_numpy(weights.astype(np.float32))
        return batch


class ImageDataModule(SampleDataModule):
    """Serves images.

    Args:
        section: the recipe's data section.
        plan: batch sizes, ranks, workers, steps.
        seed: decides the order of samples and every random change.
        folder: the run's, where rank 0 leaves normalisation and class names for later use of the model.
    """

    samples: dict[Split, ImageSamples]

    def __init__(self, section: ImageData, plan: Plan, seed: int, folder: RunFolder) -> None:
        super().__init__(plan, seed)
        self.section, self.folder = section, folder
        self._is_primary = int(os.environ.get("RANK", 0)) == 0

    def prepare(self, model: AnyModel) -> None:
        """Decodes what is not decoded yet, divides it, and measures the training images."""
        section, source = self.section, open_images(self.section)
        stored = stored_images(source, section)
        self.label, self.class_names = source.label, stored.class_names
        parts, rule = self._parts(stored)
        self.fingerprint = digest_of_parts(cache_name(source, section), *rule)
        self.facts = DataFacts(input_shape=stored.shape, n_outputs=len(stored.class_names))
        train, numbers = parts["train"]
        self._check(stored, len(numbers))
        check_classes(stored.class_names, train.labels[numbers], self.label, "images")
        self.normalisation = Normalisation.of(train.sums[numbers], stored.shape)
        labels, k = train.labels[numbers], len(stored.class_names)
        weights = balanced_weights(labels, k) if section.class_weights == "balanced" else None
        self.samples = {split: ImageSamples(*part, self.normalisation) for split, part in parts.items()}
        self.samples["train"] = TrainingImages(train, numbers, self.normalisation, section, self.seed, weights, k)
        if self._is_primary:
            notes = [source.note] if source.note else []
            if "val" in stored.splits and section.folds is not None:
                given = len(stored.splits["val"].labels)
                notes.append(
                    f"{self.label}: its own validation split ({given:,} images) is not used, since data.folds={section.folds} "
                    "validates on parts of the training images"
                )
            _report(notes, parts)

    def _parts(self, stored: StoredImages) -> tuple[dict[Split, tuple[StoredSplit, Integers]], list[str]]:
        """Of each split, where its images lie and which they are; and the rule by which they were chosen."""
        section, splits = self.section, stored.splits
        parts = {split: (part, np.arange(len(part.labels))) for split, part in splits.items()}
        if "val" in parts and section.folds is None:
            return parts, ["given"]
        train = splits["train"]
        chosen, held_out = divide(train.digests, train.labels, section)
        parts["train"], parts["val"] = (train, chosen), (train, held_out)
        if not len(held_out):
            del parts["val"]
        return parts, [str(section.val_fraction), str(section.folds), str(section.fold)]

    def _check(self, stored: StoredImages, n_train: int) -> None:
        section, (_, height, width) = self.section, stored.shape
        if section.crop >= min(height, width):
            raise DataError(
                f"{self.label}: data.crop={section.crop} mirrors more than images of {height} x {width} pixels have; "
                f"at most {min(height, width) - 1}"
            )
        if n_train < self.plan.global_batch_size:
            raise DataError(
                f"{self.label}: {n_train} training images are fewer than data.global_batch_size="
                f"{self.plan.global_batch_size}; lower it, or add images"
            )

    def kept(self) -> dict[str, str]:
        facts = {
            "kind": "images",
            "input_shape": self.facts.input_shape,
            "mean": self.normalisation.mean.tolist(),
            "deviation": self.normalisation.deviation.tolist(),
            "class_names": self.class_names,
        }
        return {self.folder.preprocessing.name: json.dumps(facts, indent=2)}

    def size_in_words(self) -> str:
        return f"{len(self.samples['train']):,} training images"


def _report(notes: list[str], parts: dict[Split, tuple[StoredSplit, Integers]]) -> None:
    for found in duplicates({split: stored.digests[numbers] for split, (stored, numbers) in parts.items()}):
        one, two = (
            parts[split][0].where(int(parts[split][1][number]))
            for split, number in ((found.split, found.sample), (found.other, found.twin))
        )
        notes.append(
            f"{found.shared:,} of {found.size:,} {found.split} images stand in the {found.other} split too, such as {one} = {two}"
        )
    for note in notes:
        print(note, file=sys.stderr, flush=True)
