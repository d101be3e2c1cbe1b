"""The names that `data.tokenizer` takes, and what is known of their vocabularies without reading a corpus."""

from __future__ import annotations

import json
import re
from pathlib import Path

GPT2_VOCAB_SIZE = 50257
"""Radford et al. 2019, section 2.2: 256 bytes, 50,000 merges, one end-of-text symbol."""
TOKENIZER_NAMES = ("bytes", "chars", "gpt2", "bpe:2048", "words:20000")
"""For a suggestion; any `bpe:N` and `words:N` will do."""
MASKS = ("[MASK]", "<mask>")
"""What vocabularies call the symbol that hides a token; the first is added where there is none."""
PAIR_SYMBOLS = ("<pad>", "<s>", "</s>")
"""What fills up, starts and ends the texts of pairs; added where they are missing."""
_PLAIN_VOCABULARIES = ("encoder.json", "vocab.json")
"""Files that map each token to its id, and nothing else: GPT-2's own, and the hub's."""
_BPE = re.compile(r"bpe:([1-9][0-9]*)")
_WORDS = re.compile(r"words:([1-9][0-9]*)")


def trained_bpe_size(name: str) -> int | None:
    """N of ``bpe:N``, else None."""
    match = _BPE.fullmatch(name)
    return int(match[1]) if match else None


def word_vocabulary_size(name: str) -> int | None:
    """N of ``words:N``, else None."""
    match = _WORDS.fullmatch(name)
    return int(match[1]) if match else None


def made_from_the_corpus(name: str) -> bool:
    """Whether the vocabulary is made from the training text: `chars`, `bpe:N`, `words:N`."""
    return name == "chars" or trained_bpe_size(name) is not None or word_vocabulary_size(name) is not None


def exists(path: str) -> bool:
    """Whether there is such a file or folder; a name that no file can have (too long, a NUL) has none."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # RuntimeError: ~nobody
        return False


def is_path(name: str) -> bool:
    """Whether the name means files; a folder that happens to be called chars does not hide the tokenizer."""
    if name == "bytes" or made_from_the_corpus(name):
        return False
    return "/" in name or name.endswith(".json") or exists(name)


def is_tokenizer_name(name: str) -> bool:
    size = trained_bpe_size(name)
    if size is not None:
        return 300 <= size <= 200_000
    words = word_vocabulary_size(name)
    if words is not None:
        return 2 <= words <= 10_000_000
    return name in ("bytes", "chars", "gpt2") or is_path(name)


def known_vocab_size(name: str) -> int | None:
    """Size of the vocabulary where it can be told without the corpus; None for `chars`, `words:N` and unreadable
    files."""
    if name == "bytes":
        return 257
    if name == "gpt2" and not exists(name):
        return GPT2_VOCAB_SIZE
    if made_from_the_corpus(name):
        return trained_bpe_size(name)
    return _size_of_files(Path(name).expanduser()) if exists(name) else None


def has_symbol(name: str, symbols: tuple[str, ...]) -> bool:
    """Whether the tokenizer's file has one of the symbols; a made vocabulary, and GPT-2's, have none."""
    if not is_path(name) or not exists(name):
        return False
    path = Path(name).expanduser()
    try:
        content = json.loads((path / "tokenizer.json" if path.is_dir() else path).read_text(encoding="utf-8"))
        added = [token["content"] for token in content.get("added_tokens", [])]
        vocab = content["model"]["vocab"]
        return any(symbol in added or (isinstance(vocab, dict) and symbol in vocab) for symbol in symbols)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def _size_of_files(path: Path) -> int | None:
    for file in (path,) if path.is_file() else [path / name for name in ("tokenizer.json", *_PLAIN_VOCABULARIES)]:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if file.name in _PLAIN_VOCABULARIES and file != path:  # "model" is also a word of GPT-2's vocabulary
                return len(content) if isinstance(content, dict) else None
            added = [token["id"] for token in content.get("added_tokens", [])]
            return max([len(content["model"]["vocab"]), *(i + 1 for i in added)])
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
    return None
