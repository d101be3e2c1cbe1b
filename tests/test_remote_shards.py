"""Shards behind URLs: the same batches as on disk, a cache that keeps to its room, servers that stumble or die."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from lm_train.data import TextDataModule, remote
from lm_train.data.remote import PieceCache, without_secrets
from lm_train.data.shard_files import DamagedShard
from lm_train.errors import DataError, ExitCode, OutputError
from tests.test_shard_stream import batches_of, counting_folder, firsts, module_of, own_cache  # noqa: F401
from tests.text_data import plan_of

BLOCK, PIECE = 1 << 10, 1 << 12


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("shards", "shard_files", "remote"):
        monkeypatch.setattr(f"lm_train.data.{name}.BLOCK_BYTES", BLOCK)
    monkeypatch.setattr("lm_train.data.shard_files._BLOCK_BITS", 10)
    monkeypatch.setattr(remote, "PIECE_BYTES", PIECE)
    monkeypatch.setattr("lm_train.data.shard_stream._CHUNK_BYTES", PIECE)
    monkeypatch.setattr(remote, "_PAUSES_S", (0.01,) * 5)


class Server:
    """Serves a folder over HTTP with ranges, and counts what it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: Counter[tuple[str, str]] = Counter()
        self.faults = 0
        """So many requests for tokens fail before one is answered."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                file, wanted = folder / self.path.rpartition("/")[2], self.headers.get("Range", "")
                if file.suffix == ".bin":
                    server.asked[(file.name, wanted)] += 1
                    if server.faults:
                        server.faults -= 1
                        self.send_error(500)
                        return
                if not file.is_file():
                    self.send_error(404)
                    return
                content = file.read_bytes()
                if bounds := re.fullmatch(r"bytes=(\d+)-(\d+)", wanted):
                    content = content[int(bounds[1]) : int(bounds[2]) + 1]
                self.send_response(206 if wanted else 200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/a"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    counting_folder(tmp_path / "a", [9000, 5000, 6000])
    server = Server(tmp_path / "a")
    yield server
    if server.thread.is_alive():
        server.stop()


PIECES = -(-18000 // PIECE) + -(-10000 // PIECE) + -(-12000 // PIECE)
PLAN = plan_of(micro=8, steps=150, block_size=16)


def of_url(url: str, **options: Any) -> TextDataModule:
    return module_of(url, PLAN, **{"shuffle_mb": "all", **options})


def test_batches_are_those_of_the_folder_and_each_piece_is_fetched_once(server: Server, tmp_path: Path) -> None:
    wanted = firsts(list(batches_of(module_of(tmp_path / "a", PLAN), 0)))
    module = of_url(server.url)
    assert module.may_wait
    assert firsts(list(batches_of(module, 0))) == wanted
    again = of_url(server.url)
    assert firsts(list(batches_of(again, 0))) == wanted
    assert len(server.asked) == PIECES, "nothing is fetched that is in the cache"
    assert set(server.asked.values()) == {1}
    assert module.fingerprint == module_of(tmp_path / "a", PLAN).fingerprint, "wherever it lies"


def test_loader_processes_share_the_cache(server: Server, tmp_path: Path) -> None:
    wanted = list(batches_of(module_of(tmp_path / "a", PLAN), 0))
    module = of_url(server.url)
    module.plan = PLAN.model_copy(update={"num_workers": 2})
    found = list(module.train_dataloader())
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(found, wanted, strict=True))
    assert set(server.asked.values()) == {1}


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_other_file_systems(scheme: str, tmp_path: Path) -> None:
    folder = counting_folder(tmp_path / "a", [3000])
    url = f"{scheme}://{folder}"
    if scheme == "memory":
        fsspec.filesystem("memory").put(str(folder), "/b", recursive=True)
        url = "memory://b"
    assert firsts(list(batches_of(of_url(url), 0))) == firsts(list(batches_of(module_of(folder, PLAN), 0)))
    (folder / "train-00000.bin").write_bytes(b"12")
    if scheme == "file":
        with pytest.raises(DamagedShard, match=r"file://.*/train-00000.bin: 2 bytes, expected 6,000"):
            batches_of(of_url(url), 0)


def size_of(file: Path) -> int:
    """Bytes of a piece; the thread that fetches ahead may drop it at any moment."""
    try:
        return file.stat().st_size if file.is_file() else 0
    except FileNotFoundError:
        return 0


def test_the_cache_keeps_to_its_room(server: Server, tmp_path: Path) -> None:
    room = 3 * PIECE
    wanted = firsts(list(batches_of(module_of(tmp_path / "a", PLAN), 0)))
    most = 0
    found: list[int] = []
    for batch in list(batches_of(of_url(server.url, cache_gb=room / 1e9), 0)):
        found += firsts([batch])
        most = max(most, sum(map(size_of, (tmp_path / "cache/lm_train/pieces").iterdir())))
    assert found == wanted
    assert 0 < most <= room


def test_a_windowed_order_needs_each_piece_about_once_however_small_the_cache(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_OPEN_PIECES", 4)
    parts = module_of(tmp_path / "a", PLAN, shuffle_mb=1).corpus.tokens("train").parts()
    assert parts[0].chunk == PIECE // 32
    module = of_url(server.url, shuffle_mb=1, cache_gb=0.003)
    tokens = module.corpus.tokens("train")
    monkeypatch.setattr(tokens, "parts", lambda: [parts[0].__class__(20_000, 1.0, PIECE // 32, 2)])
    samples = firsts(list(batches_of(module, 0)))
    assert len(set(samples)) == len(samples) == 1200
    assert server.asked.total() <= 2 * PIECES


def test_a_cache_evicts_what_was_not_looked_at_for_longest(tmp_path: Path) -> None:
    cache = PieceCache(tmp_path / "cache", 300)
    for name in ("a", "b", "c"):
        with cache.filling(name, 100, waits=True) as put:
            assert put is not None
            put(name.encode() * 100)
        time.sleep(0.01)
    PieceCache(cache.folder, 300).open("a", 100)
    with cache.filling("d", 100, waits=True) as put:
        assert put is not None
        put(b"d" * 100)
    assert [cache.has(name, 100) for name in "abcd"] == [True, False, True, True]
    with cache.filling("d", 100, waits=True) as put:
        assert put is None
    with pytest.raises(OutputError, match=r"data.cache_gb=3e-07 has no room for one piece of 400 bytes"):
        cache._put("e", b"e" * 400)


def test_a_server_that_stumbles_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.faults = 4
    module = of_url(server.url)
    assert (
        firsts(list(batches_of(module, 0)))[:100] == firsts(list(batches_of(module_of(tmp_path / "a", PLAN), 0)))[:100]
    )


def test_a_dead_server_ends_the_run_with_one_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    module = of_url(server.url)
    batches = batches_of(module, 0)
    server.stop()
    with pytest.raises(
        DataError, match=r"^http://127.0.0.1:\d+/a/train-0000\d.bin: out of reach after 6 tries in \d+ s"
    ) as dead:
        batches[0]
    assert dead.value.exit_code == ExitCode.BAD_DATA
    assert "\n" not in str(dead.value)
    with pytest.raises(DataError, match=r"manifest.json: out of reach after 6 tries"):
        of_url(server.url)


def test_a_server_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting_folder(tmp_path / "a", [3000])
    monkeypatch.setattr(remote, "_ANSWER_S", 0.05)
    monkeypatch.setattr(remote, "_PAUSES_S", (0.01,))
    folder = remote.RemoteFolder(f"file://{tmp_path / 'a'}", 1.0)
    gate = threading.Event()
    monkeypatch.setattr(folder.fs, "cat_file", lambda *args, **options: gate.wait(10))
    with pytest.raises(DataError, match=r"out of reach after \d tries in \d s \(TimeoutError: no answer in 0.05 s\)"):
        folder.read("manifest.json")
    gate.set()


def test_damage_on_the_way_and_in_the_cache(server: Server, tmp_path: Path) -> None:
    whole = firsts(list(batches_of(of_url(server.url), 0)))
    piece = sorted(f for f in (tmp_path / "cache/lm_train/pieces").iterdir() if f.is_file())[0]
    piece.write_bytes(piece.read_bytes()[:-1] + b"?")
    assert firsts(list(batches_of(of_url(server.url), 0))) == whole, "fetched again"
    piece.unlink()
    file = tmp_path / "a/train-00000.bin"
    content = bytearray(file.read_bytes())
    content[700] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedShard, match=r"http://.*/train-00000.bin: bytes 0 to 1,024 have the checksum"):
        list(batches_of(of_url(server.url), 0))
    rest = list(batches_of(of_url(server.url, on_damage="skip"), 0))
    assert sum(batch.get("replaced", 0) for batch in rest) > 0


def test_what_is_needed_next_is_fetched_beforehand(server: Server) -> None:
    batches = batches_of(of_url(server.url), 0)
    assert batches[0]["tokens"].shape == (8, 16)
    until = time.monotonic() + 20
    while len(server.asked) < PIECES and time.monotonic() < until:
        time.sleep(0.02)
    assert len(server.asked) == PIECES
    server.stop()
    assert len(list(batches)) == 150, "nothing more is asked for"


def test_a_late_resume_asks_for_no_more_than_an_early_one(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote.Prefetcher, "follow", lambda self, position: None)
    asked = []
    for start in (1, 148):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache-{start}"))
        server.asked.clear()
        assert batches_of(of_url(server.url), 0, start)[0]["tokens"].shape == (8, 16)
        asked.append(server.asked.total())
    assert max(asked) <= 8, "at most one piece a sample, however late"


def test_no_secret_is_shown() -> None:
    assert without_secrets("https://me:pw@host/a?token=x") == "https://host/a"
    assert without_secrets("s3://bucket/a") == "s3://bucket/a"
    with pytest.raises(DataError, match=r"^s9://host/a: cannot be read") as caught:
        remote.RemoteFolder("s9://me:secret@host/a", 1.0)
    assert "secret" not in str(caught.value)
