"""JSON that carries the checksum of its own bytes, so that no flipped bit in it goes unseen.

{
 "checkpoint": "step-100",
 "step": 100,
 "blake2b": "..."          BLAKE2b (32 bytes) of everything before this line's comma
}
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from pathlib import Path
from typing import Any

from lm_train.errors import CheckpointError

MOST_BYTES = 256 << 20
"""A larger file is not ours; the manifest of a hundred thousand tensors takes a tenth of it."""
_SEAL = re.compile(rb',\n "blake2b": "([0-9a-f]{64})"\n\}\n\Z')


def sealed(value: dict[str, Any]) -> str:
    """The text of a sealed file; `value` must hold something."""
    body = json.dumps(value, indent=1).removesuffix("\n}")
    return f'{body},\n "blake2b": "{_digest(body.encode())}"\n}}\n'


def read_sealed(file: Path) -> dict[str, Any]:
    """What was sealed.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: naming the file, what was expected and what was found.
    """
    content = read_small(file)
    seal = _SEAL.search(content[-96:])
    if seal is None:
        raise CheckpointError(
            f"{file}: damaged: expected its own checksum at the end, found {len(content)} bytes without one"
        )
    body = content[: len(content) - len(seal[0])]
    found, written = _digest(body), seal[1].decode()
    if found != written:
        raise CheckpointError(f"{file}: damaged: expected checksum {written[:12]}..., found {found[:12]}...")
    return parse(file, content)


def read_small(file: Path) -> bytes:
    """A file that is plain, and not larger than any of ours.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is something else.
    """
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{file}: expected a plain file, found a link, a folder or a device")
        if status.st_size > MOST_BYTES:
            raise CheckpointError(
                f"{file}: expected at most {MOST_BYTES:,} bytes, found {status.st_size:,}; not a file of ours"
            )
        return file.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None


def parse(file: Path, content: bytes) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected JSON, found something else: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found a {type(value).__name__}")
    return value


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=32).hexdigest()
