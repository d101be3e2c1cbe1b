"""The ledger of a run, `ledger.jsonl`: one line an optimizer step, and by it the proof that two runs are the same. Free of torch.

    {"step":12,"samples":"9c3f01b2a4d5e6f7","loss":"0x1.8p+1","grad_norm":"0x1.2p-3","learning_rate":"0x1.0p-10"}

    step           optimizer steps done, from 1
    samples        BLAKE2b (8 bytes) over the global batch: the epoch and the id of each sample as little-endian 64-bit
                   integers, in global order; null where the data cannot know their ids
    loss           mean over the global batch, the float32 value in hexadecimal
    grad_norm      2-norm of the global batch's gradient before clipping, likewise
    learning_rate  of the step's update, float64
    withheld       only where the update was not made: "nonfinite" or "spike"

Hexadecimal, so that a line says every bit and no decimal rounding comes between. Two runs are the same when their ledgers
are the same bytes. Lines are appended; those of steps that a checkpoint holds are on disk before the checkpoint is published,
and a start that goes on from a checkpoint drops the lines beyond its step and a last line that a kill has torn.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from lm_train.errors import LMTrainError, OutputError

WITHHELD = ("", "nonfinite", "spike")
"""Why an update was not made, by the number under which the reason is kept on the device; 0: it was made."""
_STEP = re.compile(rb'^\{"step":(\d+),.*\}\n$')


class LedgerError(LMTrainError, ValueError):
    """A line that no ledger has."""


class Row(NamedTuple):
    """One optimizer step, as it stands in the file."""

    step: int
    samples: str | None
    loss: str
    grad_norm: str
    learning_rate: str
    withheld: str = ""

    @classmethod
    def of(
        cls, step: int, samples: str | None, loss: float, grad_norm: float, learning_rate: float, withheld: str = ""
    ) -> Row:
        """A row of numbers; loss and norm are rounded to float32."""
        bits = hexadecimal(_float32(loss)), hexadecimal(_float32(grad_norm)), hexadecimal(learning_rate)
        return cls(step, samples, *bits, withheld)

    def line(self) -> str:
        samples = "null" if self.samples is None else f'"{self.samples}"'
        withheld = f',"withheld":"{self.withheld}"' if self.withheld else ""
        return (
            f'{{"step":{self.step},"samples":{samples},"loss":"{self.loss}","grad_norm":"{self.grad_norm}",'
            f'"learning_rate":"{self.learning_rate}"{withheld}}}\n'
        )


def hexadecimal(value: float) -> str:
    """`0x1.8p+1` for 3.0: Python's and C's form without trailing zeros; nan, inf and -inf by their names."""
    if not math.isfinite(value):
        return str(value)
    mantissa, exponent = value.hex().split("p")
    mantissa = mantissa.rstrip("0")
    return f"{mantissa}{'0' if mantissa.endswith('.') else ''}p{exponent}"


_FLOAT32 = struct.Struct("<f")


def _float32(value: float) -> float:
    try:
        return float(_FLOAT32.unpack(_FLOAT32.pack(value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def hash_of_samples(pairs: bytes) -> str:
    """16 hexadecimal digits for the (epoch, sample id) pairs of a global batch, little-endian int64, one after another."""
    return hashlib.blake2b(pairs, digest_size=8).hexdigest()


def parse(line: str) -> Row:
    """The row of one line.

    Raises:
        LedgerError: saying what is wrong with it.
    """
    try:
        values = json.loads(line)
    except ValueError:
        raise LedgerError(f"not JSON: {line[:80]!r}") from None
    if not isinstance(values, dict):
        raise LedgerError(f"not an object: {line[:80]!r}")
    expected = Row._fields if "withheld" in values else Row._fields[:-1]
    if tuple(values) != expected:
        raise LedgerError(f"expected the keys {', '.join(expected)} in this order, found {', '.join(map(str, values))}")
    row = Row(**values)
    if type(row.step) is not int or row.step < 1:
        raise LedgerError(f"step is {row.step!r}; expected a whole number from 1")
    if row.samples is not None and not re.fullmatch("[0-9a-f]{16}", str(row.samples)):
        raise LedgerError(f"samples is {row.samples!r}; expected 16 hexadecimal digits, or null")
    for name in ("loss", "grad_norm", "learning_rate"):
        text = getattr(row, name)
        try:
            same = isinstance(text, str) and hexadecimal(float.fromhex(text)) == text
        except (ValueError, OverflowError):
            same = False
        if not same:
            raise LedgerError(f"{name} is {text!r}; expected a hexadecimal number such as 0x1.8p+1")
    if "withheld" in values and row.withheld not in WITHHELD[1:]:
        raise LedgerError(f"withheld is {row.withheld!r}; expected {' or '.join(WITHHELD[1:])}")
    if row.line() != (line if line.endswith("\n") else line + "\n"):
        raise LedgerError(f"not written as a ledger's line is: {line[:80]!r}")
    return row


def read(file: Path) -> Iterator[Row]:
    """The rows of a ledger, strictly: every line must be one, and steps must follow one another.

    A last line without an end, which a kill has torn or another process is writing, is left out. A file that is not there
    has no rows.

    Raises:
        LedgerError: naming file and line.
    """
    before: int | None = None
    for number, line in enumerate(_lines(file), start=1):
        try:
            row = parse(line.decode("utf-8", "replace"))
        except LedgerError as error:
            raise LedgerError(f"{file}:{number}: {error}") from None
        if before is not None and row.step != before + 1:
            raise LedgerError(f"{file}:{number}: step {row.step} after step {before}; expected {before + 1}")
        before = row.step
        yield row


def last_step(file: Path) -> int | None:
    """The step of the last whole line, found from the file's end; None without one."""
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, size - 4096))
            lines = opened.read().splitlines(keepends=True)
    except OSError:
        return None
    return next((int(found[1]) for line in reversed(lines) if (found := _STEP.match(line))), None)


def cut(file: Path, step: int) -> int | None:
    """Drops the lines after optimizer step `step`, and from the first torn or foreign line on.

    What stays is not written anew: the file only ends earlier, on disk when this returns.

    Returns:
        The last step that stays, or None.

    Raises:
        OutputError: if the file cannot be written.
    """
    length, kept = 0, None
    for line in _lines(file):
        found = _STEP.match(line)
        if found is None or int(found[1]) > step or (kept is not None and int(found[1]) != kept + 1):
            break
        length, kept = length + len(line), int(found[1])
    try:
        if file.exists() and file.stat().st_size != length:
            with file.open("r+b") as opened:
                opened.truncate(length)
                os.fsync(opened.fileno())
    except OSError as error:
        raise _cannot_write(file, error) from None
    return kept


def append(file: Path, rows: Iterable[Row]) -> None:
    """Adds lines: all of them, or none.

    Args:
        file: a ledger; made if it is not there.
        rows: in the order of their steps.

    Raises:
        OutputError: if they cannot be written.
    """
    text = "".join(row.line() for row in rows).encode()
    try:
        with file.open("ab", buffering=0) as opened:
            before = opened.tell()
            try:
                while text:
                    text = text[opened.write(text) :]
            except OSError:
                with contextlib.suppress(OSError):
                    opened.truncate(before)
                raise
    except OSError as error:
        raise _cannot_write(file, error) from None


def sync(file: Path) -> None:
    """All lines are on disk when this returns.

    Raises:
        OutputError: if they cannot be written there.
    """
    try:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    except OSError as error:
        raise _cannot_write(file, error) from None


def _cannot_write(file: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {file}: {error.strerror}; free space there, then start again")


class Difference(NamedTuple):
    """Where two ledgers part."""

    step: int
    key: str
    """`loss`, `samples`, ...; `step` where one of them has no such step."""
    one: str | None
    other: str | None
    """What they say there; None: nothing."""

    def __str__(self) -> str:
        return (
            f"step {self.step}: {self.key} is {self.one or 'absent'} in the one, {self.other or 'absent'} in the other"
        )


def compare(one: Path, other: Path, first: int = 1) -> Difference | None:
    """The first difference between two ledgers, or None where they are the same.

    Args:
        one, other: files; one that is not there has no rows.
        first: rows before this step are left out, for runs that begin on the way.

    Raises:
        LedgerError: naming file and line of what is no ledger's row.
    """
    rows = ((row for row in read(file) if row.step >= first) for file in (one, other))
    for a, b in itertools.zip_longest(*rows):
        if a == b:
            continue
        if a is None or b is None:
            return Difference((a or b).step, "step", _present(a), _present(b))
        if a.step != b.step:
            return Difference(min(a.step, b.step), "step", str(a.step), str(b.step))
        key = next(key for key in Row._fields if getattr(a, key) != getattr(b, key))
        return Difference(a.step, key, getattr(a, key), getattr(b, key))
    return None


def _present(row: Row | None) -> str | None:
    return None if row is None else "present"


def _lines(file: Path) -> Iterator[bytes]:
    """Whole lines, with their ends."""
    try:
        with file.open("rb") as opened:
            yield from (line for line in opened if line.endswith(b"\n"))
    except FileNotFoundError:
        return
