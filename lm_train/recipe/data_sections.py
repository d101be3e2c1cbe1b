"""The `data` section: one class for each kind of data."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from lm_train.recipe.base import (
    Auto,
    Count,
    Dropout,
    Factory,
    Fraction,
    FreeMapping,
    PositiveInt,
    PositiveIntOrAuto,
    Section,
    Text,
)
from lm_train.recipe.tokenizer_names import is_tokenizer_name, trained_bpe_size, word_vocabulary_size


class DataSection(Section):
    """The keys that every kind of data shares."""

    global_batch_size: PositiveIntOrAuto = 16
    """Samples (for text: sequences of model.block_size tokens) between two optimizer steps, over all processes; `auto`: by
    the rule of the critical batch size, for running text."""
    micro_batch_size: PositiveIntOrAuto = "auto"
    """Samples that one process sends through the network at a time."""
    num_workers: Count | Auto = "auto"
    """Loader processes of each rank."""


def _tokenizer(value: Any) -> Any:
    if isinstance(value, str) and not is_tokenizer_name(value):
        raise ValueError(
            "expected bytes, chars, bpe:N (N from 300 to 200000, trained on the corpus), words:N (the most frequent "
            "words), gpt2, or the path of a "
            f"tokenizer.json or of a folder with encoder.json and vocab.bpe; got {value[:80]!r}"
        )
    return value


Tokenizer = Annotated[str, BeforeValidator(_tokenizer)]


class LanguageData(DataSection):
    """Running text for language models, packed into sequences of model.block_size tokens."""

    mask_fraction: Fraction = 0.15
    """Share of the tokens that a masked language model guesses (Devlin et al. 2019)."""


class EmbeddedData(LanguageData):
    """The source files of the Python standard library: real text that every machine with Python has."""

    kind: Literal["embedded"] = "embedded"
    tokenizer: Tokenizer = "bpe:2048"


class TextData(LanguageData):
    """Text from plain files, jsonl, csv, parquet, a folder of them, or a data set of the Hugging Face hub."""

    kind: Literal["text"] = "text"
    path: Text
    """File, folder, or hub name (owner/name)."""
    subset: Text | None = None
    """The hub data set's configuration, such as sample-10BT."""
    tokenizer: Tokenizer = "bpe:2048"
    text_column: Text = "text"
    """Column that holds the text, where rows have columns."""
    val_path: Text | None = None
    """File of validation text; else the source's own validation split, else val_fraction of the training text."""
    test_path: Text | None = None
    val_fraction: Fraction = 0.1
    """Share that validates where the source has no validation split: the end of a single text file, else a
    pseudo-random choice of documents."""
    streaming: bool = False
    """Train while the corpus is still being tokenised, instead of after; the tokens are cached either way."""
    val_tokens: PositiveInt = 1_000_000
    """With streaming and no validation split: so many tokens from the start of the stream validate."""


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str | int | float) else value


class ShardSource(Section):
    """One of several folders of prepared text."""

    path: Text
    """Folder, or URL of one."""
    weight: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Share of the samples, in relation to the other sources' weights; null, in all of them: by their tokens."""


class ShardData(LanguageData):
    """Text that lm-train prepare has cleaned, tokenised and packed into shards: on disk, or fetched over a network."""

    kind: Literal["shards"] = "shards"
    path: Annotated[tuple[Text, ...], BeforeValidator(_one_or_more), Field(strict=False)] = ()
    """Folder that lm-train prepare wrote, or its URL (s3://..., https://...); several are mixed by their tokens."""
    sources: Annotated[tuple[ShardSource, ...], Field(strict=False)] = ()
    """Several folders with a weight each, in place of path."""
    document_boundaries: bool = False
    """Attention, recurrent state and loss stay within a document, as if each were trained on alone."""
    verify: Literal["once", "always", "none"] = "once"
    """When a block of 1 MiB is compared with its checksum, at its first use: once on this machine as long as its file does not
    change, in every start anew, or never (names and sizes are always looked at)."""
    on_damage: Literal["stop", "skip"] = "stop"
    """What becomes of samples in a missing or damaged part: the run ends, or others take their place and are counted."""
    shuffle_mb: PositiveInt | Literal["auto", "all"] = "auto"
    """Mebibytes of tokens that are shuffled together: all, or pieces of 8 MiB drawn at random and mixed, so that few pieces are
    in use at a time; `auto`: all on disk, 256 over a network."""
    cache_gb: Annotated[float, Field(gt=0, le=1e6)] = 20.0
    """Room on each machine for pieces fetched over a network, in 10^9 bytes."""

    @property
    def wanted(self) -> tuple[tuple[str, float | None], ...]:
        """Folder and weight of each source."""
        return tuple((path, None) for path in self.path) or tuple((each.path, each.weight) for each in self.sources)

    def conflicts(self) -> list[tuple[tuple[str, ...], str]]:
        found: list[tuple[tuple[str, ...], str]] = []
        if bool(self.path) == bool(self.sources):
            found.append(
                (("path", "sources"), "give data.path=FOLDER, or data.sources=[{path: FOLDER, weight: 1}, ..]")
            )
        weights = [source.weight for source in self.sources]
        if any(weight is None for weight in weights) and any(weight is not None for weight in weights):
            found.append(
                (("sources",), "give every one of data.sources a weight, or none, to mix them by their tokens")
            )
        paths = [path for path, _ in self.wanted]
        if len(set(paths)) < len(paths):
            twice = next(path for path in paths if paths.count(path) > 1)
            found.append((("path", "sources"), f"{twice:.200} is named twice; give it once, with its weight"))
        remote = any("://" in path for path in paths)
        if remote and isinstance(self.shuffle_mb, int) and self.cache_gb * 1e9 < 2 * (self.shuffle_mb << 20):
            least = -(-2 * (self.shuffle_mb << 20) // 10**8) / 10
            found.append(
                (
                    ("cache_gb", "shuffle_mb"),
                    f"data.cache_gb={self.cache_gb:g} holds no two windows of data.shuffle_mb={self.shuffle_mb}; try "
                    f"data.cache_gb={least:g}",
                )
            )
        return found


class LabelledData(DataSection):
    """Samples with a target, small enough to be held: what labelled texts, images and tables share."""

    path: Text | None = None
    """File, folder, or hub name (owner/name); null: a small real set that needs no file."""
    val_path: Text | None = None
    """File or folder of validation samples; else the source's own validation split, else val_fraction of the training one."""
    test_path: Text | None = None
    val_fraction: Fraction = 0.1
    """Share of the training samples that validates where there is no validation split; of each class alike, and at least one of
    each class that has two."""
    folds: Annotated[int, Field(ge=2, le=100)] | None = None
    """Cross-validation: so many runs, each validating on another part of the training samples; a class of one sample trains in
    all of them, and a validation split of the source's own is not used."""
    fold: PositiveInt | None = None
    """The one fold that this run validates on, from 1; null with folds: all, one after another."""

    def conflicts(self) -> list[tuple[tuple[str, ...], str]]:
        if self.fold is not None and (self.folds is None or self.fold > self.folds):
            way_out = "give data.folds too" if self.folds is None else f"try data.fold={self.folds}"
            return [
                (
                    ("fold", "folds"),
                    f"data.fold={self.fold} of data.folds={'null' if self.folds is None else self.folds}; {way_out}",
                )
            ]
        if self.folds is not None and self.val_path is not None:
            return [
                (("folds", "val_path"), "data.folds makes its own validation parts; drop data.val_path, or data.folds")
            ]
        return []


class ClassData(LabelledData):
    """Samples with a class each."""

    label_column: Text | None = None
    """Column that holds the class, where rows have columns; null: label, labels, class, target, whichever is there."""
    label_smoothing: Dropout = 0.0
    """Share of the target that is spread over all classes (Szegedy et al. 2016, arXiv:1512.00567)."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weight of each class in the loss: balanced makes rare classes count as much as frequent ones."""


CleaningStep = Literal["html", "control", "unicode", "nfkc", "whitespace", "lowercase"]


def _cleaning(value: Any) -> Any:
    steps = get_args(CleaningStep)
    for step in value if isinstance(value, list | tuple) else [value]:
        if step not in steps:
            raise ValueError(f"expected a list of {', '.join(steps)}; got {step!r:.80}")
    return value


class TextClassData(ClassData):
    """Labelled texts: csv, tsv, jsonl or parquet with a text and a label column, or a folder for each class."""

    kind: Literal["text_classes"] = "text_classes"
    text_column: Text = "text"
    pair_column: Text | None = None
    """Column of a second text, for classes of pairs."""
    cleaning: Annotated[tuple[CleaningStep, ...], BeforeValidator(_cleaning), Field(strict=False)] = (
        "control",
        "unicode",
        "whitespace",
    )
    """Steps in their order: html (tags and entities go), control (control characters go), unicode (NFC), nfkc, whitespace (runs
    become one space), lowercase."""
    missing: Literal["error", "drop", "empty"] = "error"
    """What becomes of rows without text, or of which cleaning leaves none; `drop` also drops rows without a label."""
    tokenizer: Tokenizer = "words:20000"
    min_frequency: PositiveInt = 2
    """A `words:N` vocabulary leaves out rarer words."""
    max_length: PositiveInt = 256
    """Tokens of a text (of both, in a pair) beyond this are cut off."""
    token_dropout: Dropout = 0.0
    """Share of the training tokens that are replaced by the unknown symbol (Iyyer et al. 2015; Bowman et al. 2016)."""

    def conflicts(self) -> list[tuple[tuple[str, ...], str]]:
        found = super().conflicts()
        way_out = "set data.tokenizer=words:20000, or drop"
        if self.min_frequency != 2 and word_vocabulary_size(self.tokenizer) is None:
            message = f"data.min_frequency is for words:N, not for {self.tokenizer}; {way_out} data.min_frequency"
            found.append((("min_frequency", "tokenizer"), message))
        if self.token_dropout and (self.tokenizer in ("bytes", "gpt2") or trained_bpe_size(self.tokenizer) is not None):
            message = f"data.token_dropout: {self.tokenizer} has no unknown symbol; {way_out} data.token_dropout"
            found.append((("token_dropout", "tokenizer"), message))
        return found


class ImageData(ClassData):
    """Images with a class each: idx files, parquet in the hub's layout, or a folder for each class."""

    kind: Literal["images"] = "images"
    subset: Text | None = None
    """The hub data set's configuration."""
    image_column: Text | None = None
    """Column that holds the image, where rows have columns; null: image or img, whichever is there."""
    image_size: PositiveInt | None = None
    """Height and width to which every image is brought; null: they all have one size already."""
    channels: Literal[1, 3] | Auto = "auto"
    """1 turns every image grey, 3 to red, green and blue; auto: as the images are."""
    crop: Count = 0
    """Training images are mirrored outwards by so many pixels, and a random part of their own size is cut out."""
    flip: bool = False
    """Half of the training images are seen in a mirror, left for right."""
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Training images are turned by up to so many degrees to either side."""
    scale: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """Training images are made larger or smaller by up to this share: 0.1 is 0.9 to 1.1."""
    erasing: Count = 0
    """Side in pixels of a square that is set to the training set's mean, anywhere in a training image (DeVries & Taylor
    2017, "Improved Regularization of Convolutional Neural Networks with Cutout", arXiv:1708.04552)."""
    mixup: Annotated[float, Field(ge=0, le=1)] = 0.0
    """alpha of the Beta distribution by which a training image is mixed with another one, and their classes alike (Zhang
    et al. 2018, "mixup: Beyond Empirical Risk Minimization", arXiv:1710.09412); 0: not at all."""

    def conflicts(self) -> list[tuple[tuple[str, ...], str]]:
        found = super().conflicts()
        if self.path is None:
            for key in ("val_path", "test_path", "subset"):
                if getattr(self, key) is not None:
                    found.append(
                        ((key, "path"), f"data.{key} without data.path; give data.path too, or drop data.{key}")
                    )
        if self.image_size is not None and self.crop >= self.image_size:
            found.append(
                (
                    ("crop", "image_size"),
                    f"data.crop={self.crop} mirrors more than data.image_size={self.image_size} pixels; try data.crop="
                    f"{max(0, self.image_size // 8)}",
                )
            )
        return found


Columns = Annotated[tuple[Text, ...], BeforeValidator(_one_or_more), Field(strict=False)]


class TableData(LabelledData):
    """Rows of numbers and categories with a target: csv, tsv, jsonl or parquet. A column of texts becomes one number for each
    of its values, 1 where the row has it and 0 elsewhere."""

    kind: Literal["table"] = "table"
    task: Literal["classification", "regression"] = "classification"
    target: Annotated[Columns, Field(min_length=1)] | None = None
    """Target column, of a regression also several; null: the last one."""
    drop_columns: Columns = ()
    """Columns that the network does not see, such as a row's number."""
    missing: Literal["mean", "median", "drop", "error"] = "mean"
    """Of missing numbers: the training rows' mean or median takes their place, their rows are left out, or the run ends. A
    missing text counts as a value that is not known. Missing is an empty cell, and one that holds ?, NA, N/A, NaN, null or
    None, in upper or lower case; in the target of a classification an empty cell alone, as `none` may be a class."""
    outliers: Literal["keep", "clip", "drop"] = "keep"
    """Of numbers far from the others: brought to the limit, or, of training rows, left out."""
    outlier_rule: Literal["deviations", "iqr"] = "deviations"
    """Far is so many standard deviations from the mean, or so many interquartile ranges from the nearer quartile."""
    outlier_limit: Annotated[float, Field(gt=0)] = 4.0
    scaling: Literal["standard", "minmax", "robust", "none"] = "standard"
    """Numbers get mean 0 and deviation 1, or lie between 0 and 1, or get median 0 and interquartile range 1, or stay."""
    max_categories: PositiveInt = 20
    """Most different values of a column of texts."""

    def conflicts(self) -> list[tuple[tuple[str, ...], str]]:
        found = super().conflicts()
        targets = self.target or ()
        if self.task == "classification" and len(targets) > 1:
            found.append(
                (
                    ("target", "task"),
                    f"a classification has one target, not {', '.join(targets)}; name one, or set data.task=regression",
                )
            )
        for key in ("val_path", "test_path"):
            if self.path is None and getattr(self, key) is not None:
                found.append(((key, "path"), f"data.{key} without data.path; give data.path too, or drop data.{key}"))
        both = sorted(set(targets) & set(self.drop_columns))
        if both:
            found.append(
                (("target", "drop_columns"), f"column {both[0]} is named in data.target and data.drop_columns")
            )
        return found


class PairData(LabelledData):
    """Pairs of texts, such as a sentence and its translation: csv, tsv, jsonl or parquet with two text columns."""

    kind: Literal["pairs"] = "pairs"
    source_column: Text = "source"
    """Column of the text that is read."""
    target_column: Text = "target"
    """Column of the text that is written."""
    tokenizer: Tokenizer = "chars"
    """Of both sides; three ids are added, which start, end and fill up."""
    longer: Literal["drop", "cut"] = "drop"
    """What becomes of pairs with more than model.block_size tokens on a side."""


class CustomData(DataSection):
    """A LightningDataModule of the user's own, with its own loaders."""

    kind: Literal["custom"] = "custom"
    factory: Factory
    """`package.module:function`; the package must also be allowed by `plugins=package`."""
    args: FreeMapping = Field(default={})
    """Keyword arguments of the factory."""
    task: Literal["classification", "regression"] | None = None
    """What a network learns from its batches; null: a LightningModule of the user's own knows."""


AnyData = Annotated[
    EmbeddedData | TextData | ShardData | TextClassData | ImageData | TableData | PairData | CustomData,
    Field(discriminator="kind"),
]
