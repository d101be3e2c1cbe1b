"""A real classification set that every machine with Python has: documentation strings of the standard library by area."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lm_train import signals
from lm_train.data.batches import Split
from lm_train.data.rows import PlacedRow, Rows, RowSource
from lm_train.data.source import digest_of_parts
from lm_train.data.splits import digest_of
from lm_train.errors import DataError

AREAS = {
    "concurrency": "asyncio concurrent multiprocessing queue sched subprocess threading",
    "data types": "_weakrefset array bisect calendar collections copy dataclasses datetime _pydatetime enum graphlib heapq "
    "reprlib types weakref zoneinfo",
    "files": "_pyio bz2 filecmp fileinput fnmatch glob gzip io lzma mimetypes netrc ntpath os pathlib plistlib posixpath "
    "shelve shutil tarfile tempfile zipfile",
    "language": "ast code codeop dis importlib inspect linecache modulefinder pickle pickletools pkgutil pyclbr runpy symtable "
    "token tokenize traceback typing",
    "mathematics": "_pydecimal colorsys fractions numbers random statistics",
    "networking": "email ftplib http imaplib ipaddress mailbox poplib selectors smtplib socket socketserver ssl urllib wsgiref "
    "xmlrpc",
    "testing": "bdb doctest pdb profile pstats timeit trace tracemalloc unittest",
    "text": "argparse codecs configparser csv difflib gettext html json locale optparse re shlex string textwrap",
}
"""Modules and packages by area."""
_FEWEST_WORDS = 6
_TEST_SHARE = 0.2


def documentation() -> RowSource:
    """Rows with `text` and `label`: each documentation string of six words and more, and its module's area.

    The sources are read, never imported. Which fifth of them tests is decided by the strings themselves; a string that
    stands in several places counts once.

    Raises:
        DataError: where Python came without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = {
        file: area for area, modules in AREAS.items() for module in modules.split() for file in _files_of(root / module)
    }
    if not sources:
        raise DataError(f"{root}: no source files of the standard library; give data.path=FILES")
    fingerprint = digest_of_parts(
        *(f"{area}:{file.relative_to(root)}:{digest_of(file.read_bytes())}" for file, area in sources.items())
    )

    @cache
    def rows() -> list[tuple[PlacedRow, bool]]:  # parsing all of them takes seconds
        return list(_rows(sources))

    splits: dict[Split, Rows] = {
        "train": lambda: (row for row, tests in rows() if not tests),
        "test": lambda: (row for row, tests in rows() if tests),
    }
    label = "documentation of the Python standard library"
    return RowSource(label, fingerprint, splits, ("text", "label"))


def _files_of(module: Path) -> list[Path]:
    if module.is_dir():
        skipped = {"test", "tests", "__pycache__"}
        return [f for f in sorted(module.rglob("*.py")) if not skipped.intersection(f.relative_to(module).parts)]
    file = module.with_name(f"{module.name}.py")
    return [file] if file.exists() else []


def _rows(sources: dict[Path, str]) -> Iterator[tuple[PlacedRow, bool]]:
    """Each row, and whether it tests."""
    seen: set[str] = set()
    for file, area in sources.items():
        signals.check()
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError:  # a file that shows one, or of another version
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            text = ast.get_docstring(node)
            if text is None or text in seen or len(text.split()) < _FEWEST_WORDS:
                continue
            seen.add(text)
            tests = digest_of(text.encode("utf-8", "replace")) < _TEST_SHARE * 2**64
            yield ({"text": text, "label": area}, f"{file} line {getattr(node, 'lineno', 1)}"), tests
