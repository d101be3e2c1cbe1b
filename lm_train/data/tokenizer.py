"""Tokenizers: loaded, made or trained, always a `tokenizers.Tokenizer`, so that one tokenizer.json holds any of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lm_train.data.hub import download
from lm_train.errors import DataError
from lm_train.recipe.tokenizer_names import made_from_the_corpus

END_OF_TEXT = "<|endoftext|>"
"""GPT-2's symbol between documents."""
_ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "<|eos|>", "<eos>", "</s>")
"""What other families' vocabularies call it."""
PADDING, UNKNOWN = "<pad>", "<unk>"
_PADDINGS = (PADDING, "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
_HUB_GPT2 = "openai-community/gpt2"


def load_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer of that name, or None if it is to be made from the corpus (`chars`, `bpe:N`, `words:N`).

    Raises:
        DataError: if its files are not usable, or the hub is needed and out of reach.
    """
    if made_from_the_corpus(name):
        return None
    if name == "bytes":
        return _byte_level({symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    if name == "gpt2" and not Path(name).exists():
        return _from_file(download(_HUB_GPT2, "tokenizer.json"))
    path = Path(name).expanduser()
    return _from_folder(path) if path.is_dir() else _from_file(path)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016; on bytes: Radford et al. 2019, section 2.2) with `vocab_size` ids at most."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_word_tokenizer(texts: Iterable[str], most_words: int, min_frequency: int = 1) -> Tokenizer:
    """One id for each of the most frequent words of `texts`; words are split at white space and around punctuation.

    Before them come the symbols for padding, unknown words and the end of a text.
    """
    tokenizer = Tokenizer(models.WordLevel({}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    symbols = [PADDING, UNKNOWN, END_OF_TEXT]
    trainer = trainers.WordLevelTrainer(
        vocab_size=most_words + len(symbols),
        min_frequency=min_frequency,
        special_tokens=symbols,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_char_tokenizer(texts: Iterable[str], symbols: tuple[str, ...] = ()) -> Tokenizer:
    """One id for each distinct character of `texts`, in code-point order, as nanoGPT's character data sets.

    Args:
        texts: all that is to be expressible, unless there is a symbol for what is not.
        symbols: come before the characters, such as PADDING and UNKNOWN.

    Raises:
        DataError: if there is no text.
    """
    found: set[str] = set()
    for text in texts:
        found.update(text)
    if not found:
        raise DataError("data.tokenizer=chars: there is no text to take the characters from")
    characters = sorted(found)
    vocabulary = {c: i for i, c in enumerate((*symbols, *characters))}
    unknown = UNKNOWN if UNKNOWN in symbols else characters[0]
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.add_special_tokens(list(symbols))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"(?m:.)"), "isolated"
    )  # Oniguruma's m: a dot is any character
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int | None:
    """The id between documents, or None if the vocabulary has none (characters)."""
    return next((i for i in map(tokenizer.token_to_id, _ENDS_OF_TEXT) if i is not None), None)


def padding_id(tokenizer: Tokenizer) -> int:
    """The id that fills short texts up: the vocabulary's own, else the end of text, else 0; no network of ours sees it."""
    named = next((i for i in map(tokenizer.token_to_id, _PADDINGS) if i is not None), None)
    return named if named is not None else end_of_text_id(tokenizer) or 0


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id of what is not in the vocabulary, or None if everything is."""
    return next((i for i in map(tokenizer.token_to_id, (UNKNOWN, "[UNK]")) if i is not None), None)


def join_pairs(tokenizer: Tokenizer) -> None:
    """Makes the tokenizer put a separator between the two texts of a pair, unless it has a way of its own.

    Raises:
        DataError: if the vocabulary has no symbol that could separate.
    """
    if tokenizer.post_processor is not None:
        return
    number = end_of_text_id(tokenizer)
    if number is None:
        raise DataError(
            "data.pair_column: the tokenizer has no end-of-text symbol to separate the texts; try words:20000"
        )
    symbol = tokenizer.id_to_token(number)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair=f"$A {symbol} $B:1", special_tokens=[(symbol, number)]
    )


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id; ids need not be without gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _from_folder(folder: Path) -> Tokenizer:
    """tokenizer.json, or GPT-2's own pair encoder.json + vocab.bpe, or the hub's vocab.json + merges.txt."""
    if (folder / "tokenizer.json").exists():
        return _from_file(folder / "tokenizer.json")
    for vocab_name, merges_name in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        vocab_file, merges_file = folder / vocab_name, folder / merges_name
        if not vocab_file.exists():
            continue
        try:
            vocab = json.loads(vocab_file.read_text(encoding="utf-8"))
            lines = merges_file.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise DataError(f"data.tokenizer: {folder}: {error}") from None
        merges = [
            (a, b) for a, sep, b in (line.partition(" ") for line in lines if not line.startswith("#version")) if sep
        ]
        try:
            return _byte_level(vocab, merges)
        except Exception as error:  # tokenizers raises plain Exception
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"data.tokenizer: {vocab_file} and {merges_file} do not fit each other: {reason}") from None
    raise DataError(
        f"data.tokenizer: {folder} has neither tokenizer.json, nor encoder.json and vocab.bpe, nor vocab.json and merges.txt"
    )


def _from_file(file: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"data.tokenizer: {file} is not a tokenizer.json: {error}") from None
    # meant for a network's input, they would cut every document of a corpus, or fill it up
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
