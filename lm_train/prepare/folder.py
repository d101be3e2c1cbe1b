"""The folder that a preparation fills: whose it is, what it was asked for, and how far it has come."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lm_train.data.cache import locked_if_free, write_text, writing
from lm_train.data.shards import MANIFEST, UNFINISHED, Manifest, check_files, read_manifest
from lm_train.errors import DataError, OutputError

_PARTS = ("lines", "units", "shards")


class PreparedFolder:
    """`out=`, with the unfinished work inside until the manifest is written."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.work = out / UNFINISHED
        self.tokenizer = self.work / "tokenizer.json"
        self.repeated = self.work / "repeated.bin"
        self._request = self.work / "request.json"

    @contextmanager
    def owned(self, request: Mapping[str, Any]) -> Iterator[Manifest | None]:
        """Holds the folder for this process; yields the manifest if it has been prepared by the same request already.

        Raises:
            OutputError: if it has something else in it, another request's work, or another process at work, or if it
                cannot be written.
            DataError: if it was prepared by the same request and is damaged.
        """
        finished = self._finished(request)
        if finished is not None:
            yield finished
            return
        self._check_foreign()
        with writing(self.out):
            for part in _PARTS:
                (self.work / part).mkdir(parents=True, exist_ok=True)
        with locked_if_free(self.work / "lock") as free:
            if not free:
                raise OutputError(
                    f"{self.out}: another lm-train prepare is at work on it; wait for it, or give another out=DIR"
                )
            self._claim(request)
            yield None

    def finish(self) -> None:
        """Removes the unfinished work; the manifest stands."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _finished(self, request: Mapping[str, Any]) -> Manifest | None:
        if not (self.out / MANIFEST).exists():
            return None
        try:
            manifest = read_manifest(self.out)
            self._compare(manifest.settings, request, "holds text prepared")
            check_files(self.out, manifest)
        except DataError as error:
            raise DataError(f"{error}; or delete the folder {self.out}") from None
        self.finish()
        return manifest

    def _check_foreign(self) -> None:
        if self.out.is_symlink() and not self.out.exists():
            raise OutputError(f"{self.out}: a link to nothing; give another out=DIR")
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"{self.out}: a file; give a folder as out=DIR")
        if self.out.is_dir() and not self.work.is_dir():
            with writing(self.out):
                first = next(iter(sorted(self.out.iterdir())), None)
            if first is not None:
                raise OutputError(f"{self.out}: has {first.name} in it; give an empty or a new folder as out=DIR")

    def _claim(self, request: Mapping[str, Any]) -> None:
        before: Any = None
        with suppress(OSError, ValueError):
            before = json.loads(self._request.read_text(encoding="utf-8"))
        if before is not None:
            self._compare(before, request, "holds the unfinished work of a preparation")
        else:
            write_text(self._request, json.dumps(request))

    def _compare(self, before: Mapping[str, Any], request: Mapping[str, Any], holds: str) -> None:
        now = json.loads(json.dumps(request))
        if before == now:
            return
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        told = ", ".join(f"{key}={_shown(before.get(key))} (now {_shown(now.get(key))})" for key in keys[:4])
        raise OutputError(
            f"{self.out}: {holds} with other settings: {told}; give another out=DIR, or delete the folder"
        )


def _shown(value: Any) -> str:
    text = "[" + ",".join(map(str, value)) + "]" if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else text[:40] + "\u2026"
