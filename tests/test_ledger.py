"""The ledger: what a line says, how it is read, cut and compared; and that a run which was killed writes the same one."""

from __future__ import annotations

import json
import math
import resource
import struct
from pathlib import Path

import numpy as np
import pytest

from lm_train import ledger
from lm_train.errors import OutputError
from lm_train.ledger import LedgerError, Row

LINE = '{"step":12,"samples":"9c3f01b2a4d5e6f7","loss":"0x1.8p+1","grad_norm":"0x1.2p-3","learning_rate":"0x1.0p-10"}\n'


def rows(*steps: int) -> list[Row]:
    return [Row.of(step, f"{step:016x}", 1 / step, 2 / step, 1e-3) for step in steps]


def written(folder: Path, *steps: int, name: str = "ledger.jsonl") -> Path:
    ledger.append(folder / name, rows(*steps))
    return folder / name


def test_a_line_is_what_the_contract_says() -> None:
    row = Row.of(12, "9c3f01b2a4d5e6f7", 3.0, 0.140625, 2.0**-10)
    assert row.line() == LINE
    assert ledger.parse(LINE) == row
    withheld = Row.of(12, None, math.nan, math.inf, 2.0**-10, "nonfinite")
    assert withheld.line() == (
        '{"step":12,"samples":null,"loss":"nan","grad_norm":"inf","learning_rate":"0x1.0p-10","withheld":"nonfinite"}\n'
    )
    assert ledger.parse(withheld.line()) == withheld


def test_hexadecimal_keeps_every_bit() -> None:
    draw = np.random.default_rng(0)
    bits = draw.integers(0, 2**32, 3000, dtype=np.uint32)
    for value in bits.view(np.float32):
        text = ledger.hexadecimal(float(value))
        if math.isnan(value):
            assert text == "nan"
        else:
            assert struct.pack("<f", float.fromhex(text)) == struct.pack("<f", value)
    assert Row.of(1, None, 0.1, 1e300, 0.1).loss == float(np.float32(0.1)).hex().rstrip("0p-4") + "p-4"
    assert Row.of(1, None, 0.1, 1e300, 0.1).grad_norm == "inf"
    assert float.fromhex(Row.of(1, None, 0.1, 0, 0.1).learning_rate) == 0.1


def test_the_hash_is_of_the_pairs_in_their_order() -> None:
    pairs = np.array([[0, 7], [0, 3], [1, 5]], dtype="<i8")
    one = ledger.hash_of_samples(pairs.tobytes())
    assert len(one) == 16
    assert one == ledger.hash_of_samples(struct.pack("<6q", 0, 7, 0, 3, 1, 5))
    assert one != ledger.hash_of_samples(pairs[::-1].tobytes())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (LINE.replace('"step":12', '"step":0'), "from 1"),
        (LINE.replace('"step":12', '"step":12.0'), "whole number"),
        (LINE.replace('"step":12', '"step":true'), "whole number"),
        (LINE.replace("9c3f01b2a4d5e6f7", "9C3F01B2A4D5E6F7"), "16 hexadecimal digits"),
        (LINE.replace('"0x1.8p+1"', "3.0"), "loss"),
        (LINE.replace("0x1.8p+1", "0x1.80p+1"), "loss"),
        (LINE.replace("0x1.8p+1", "three"), "loss"),
        (LINE.replace('"loss"', '"lost"'), "expected the keys"),
        (LINE.replace("}", ',"withheld":"tired"}'), "nonfinite or spike"),
        (LINE.replace(",", ", "), "not written as"),
        ('{"step":12', "not JSON"),
        ("[1]\n", "not an object"),
    ],
)
def test_what_is_no_line_is_refused(wrong: str, says: str) -> None:
    with pytest.raises(LedgerError, match=says):
        ledger.parse(wrong)


def test_cutting_keeps_the_bytes_of_what_stays(tmp_path: Path) -> None:
    file = written(tmp_path, *range(1, 11))
    lines = file.read_bytes().splitlines(keepends=True)
    assert ledger.last_step(file) == 10
    assert ledger.cut(file, 10) == 10
    assert file.read_bytes() == b"".join(lines)
    assert ledger.cut(file, 7) == 7
    assert file.read_bytes() == b"".join(lines[:7])
    assert ledger.cut(file, 0) is None
    assert file.read_bytes() == b""
    assert ledger.cut(tmp_path / "none.jsonl", 3) is None
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize("left", [1, 30, len(LINE) - 1])
def test_a_torn_last_line_is_dropped(tmp_path: Path, left: int) -> None:
    file = written(tmp_path, 1, 2)
    whole = file.read_bytes()
    with file.open("ab") as opened:
        opened.write(rows(3)[0].line().encode()[:left])
    assert [row.step for row in ledger.read(file)] == [1, 2]
    assert ledger.last_step(file) == 2
    assert ledger.cut(file, 5) == 2
    assert file.read_bytes() == whole


def test_cutting_ends_at_what_is_no_line_and_at_a_gap(tmp_path: Path) -> None:
    file = written(tmp_path, 1, 2)
    with file.open("ab") as opened:
        opened.write(b"\0\0\0\n")
    ledger.append(file, rows(3))
    with pytest.raises(LedgerError, match=":3: not JSON"):
        list(ledger.read(file))
    assert ledger.cut(file, 9) == 2
    ledger.append(file, rows(4))
    with pytest.raises(LedgerError, match="step 4 after step 2"):
        list(ledger.read(file))
    assert ledger.cut(file, 9) == 2


def test_the_first_difference_is_named(tmp_path: Path) -> None:
    one, other = written(tmp_path, 1, 2, 3), written(tmp_path, 1, 2, 3, name="other.jsonl")
    assert ledger.compare(one, other) is None
    lines = other.read_text().splitlines(keepends=True)
    changed = ledger.parse(lines[1])._replace(grad_norm="0x1.000002p+0")
    other.write_text(lines[0] + changed.line() + lines[2])
    found = ledger.compare(one, other)
    assert found == ledger.Difference(2, "grad_norm", "0x1.0p+0", "0x1.000002p+0")
    assert str(found) == "step 2: grad_norm is 0x1.0p+0 in the one, 0x1.000002p+0 in the other"
    assert ledger.compare(one, other, first=3) is None
    other.write_text(lines[0] + lines[1])
    assert ledger.compare(one, other) == ledger.Difference(3, "step", "present", None)
    other.write_text("".join(lines[1:]))
    assert ledger.compare(one, other) == ledger.Difference(1, "step", "1", "2")
    assert ledger.compare(one, tmp_path / "none.jsonl") == ledger.Difference(1, "step", "present", None)


def test_a_file_that_cannot_grow_takes_all_lines_or_none(tmp_path: Path) -> None:
    file = written(tmp_path, 1, 2)
    whole = file.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 200, before[1]))
    try:
        with pytest.raises(OutputError, match="File too large"):
            ledger.append(file, rows(3, 4, 5))  # the limit lies inside of the second
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.read_bytes() == whole
    ledger.append(file, rows(3, 4, 5))
    ledger.sync(file)
    assert [row.step for row in ledger.read(file)] == [1, 2, 3, 4, 5]


def test_lines_are_those_of_json_and_a_reader_elsewhere(tmp_path: Path) -> None:
    """Nothing but a JSON reader and float.fromhex is needed to read one."""
    row = json.loads(written(tmp_path, 3).read_text())
    assert float.fromhex(row["loss"]) == np.float32(1 / 3)
