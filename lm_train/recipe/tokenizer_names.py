"""The names that `data.tokenizer` takes, and what is known of their vocabularies without reading a corpus."""

from __future__ import annotations

import json
import re
from pathlib import Path

GPT2_VOCAB_SIZE = 50257
"""Radford et al. 2019, section 2.2: 256 bytes, 50,000 merges, one end-of-text symbol."""
_BPE = re.compile(r"bpe:([1-9][0-9]*)")


def trained_bpe_size(name: str) -> int | None:
    """N of ``bpe:N``, else None."""
    match = _BPE.fullmatch(name)
    return int(match[1]) if match else None


def is_path(name: str) -> bool:
    return "/" in name or name.endswith(".json") or Path(name).exists()


def is_tokenizer_name(name: str) -> bool:
    size = trained_bpe_size(name)
    if size is not None:
        return 300 <= size <= 200_000
    return name in ("bytes", "chars", "gpt2") or is_path(name)


def known_vocab_size(name: str) -> int | None:
    """Size of the vocabulary where it can be told without the corpus; None for `chars` and unreadable files."""
    if name == "bytes":
        return 257
    if name == "gpt2":
        return GPT2_VOCAB_SIZE
    size = trained_bpe_size(name)
    if size is not None or name == "chars":
        return size
    return _size_of_files(Path(name))


def _size_of_files(path: Path) -> int | None:
    for file in (path,) if path.is_file() else (path / "tokenizer.json", path / "encoder.json", path / "vocab.json"):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        vocab = content.get("model", {}).get("vocab", content) if "model" in content else content
        added = [token["id"] for token in content.get("added_tokens", [])] if "model" in content else []
        return max([len(vocab), *(i + 1 for i in added)])
    return None
