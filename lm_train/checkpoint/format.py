"""One checkpoint format for every strategy: flat ranges of tensors in safetensors, everything else in JSON, no pickle.

    step-N/shard-R.safetensors   1-D tensors named `parameter|key|start`: what rank R holds of each parameter (key `param`),
                                 optimizer state (its own keys) and buffer (`buffer`), as a range of the flattened tensor;
                                 the rank's random-number states in the header
    step-N/state.json            counters and positions
    step-N/manifest.json         shapes, dtypes, keys; size and BLAKE2 checksum of every other file

Each rank writes its part into a hidden folder beside the final one; when all parts are on disk rank 0 renames it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lm_train.checkpoint.randomness import random_state, set_random_state
from lm_train.checkpoint.views import BUFFER, PARAM, View, Views
from lm_train.errors import CheckpointError, OutputError
from lm_train.strategy.buffers import persistent_buffers

FORMAT = 1


def save(folder: Path, views: Views, state: dict[str, Any]) -> None:
    """Writes `folder`; every rank calls it at the same step boundary.

    Args:
        folder: final name, such as checkpoints/step-100. An existing one is replaced.
        views: of the network and the optimizer that are saved.
        state: JSON values; must hold `step`.

    Raises:
        OutputError: if it cannot be written; an older checkpoint is untouched.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shard = partial / f"shard-{views.rank}.safetensors"
    own = list(views.to_save())
    try:
        if views.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        _barrier(views.world)
        with _no_space_is_an_error(folder):
            tensors = {f"{v.name}|{v.key}|{v.start}": v.flat.contiguous() for v in own if v.flat.numel()}
            save_file(tensors, shard, metadata={"rng": json.dumps(random_state())})
            _sync(shard)
        files = {shard.name: _fingerprint(shard)}
        fault = None
    except OutputError as error:
        files, fault = {}, str(error)
    held = _held(own)
    answers = _gather((files, held, fault), views.world)
    faults = [text for _, _, text in answers if text]
    if faults:
        if views.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise OutputError(faults[0])
    if views.rank == 0:
        with _no_space_is_an_error(folder):
            _write_json(partial / "state.json", state)
            files = {name: entry for shards, _, _ in answers for name, entry in shards.items()}
            files["state.json"] = _fingerprint(partial / "state.json")
            manifest = {
                "format": FORMAT,
                "world_size": views.world,
                "optimizer": type(views.optimizer).__name__,
                "optimizer_step": views.optimizer_step(),
                "tensors": _merged([tensors for _, tensors, _ in answers]),
                "files": files,
            }
            _write_json(partial / "manifest.json", manifest)
            _sync(partial)
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
            _sync(folder.parent)
    _barrier(views.world)


def _held(views: list[View]) -> dict[str, Any]:
    """Shape, and type by key, of each tensor that a rank holds a part of."""
    tensors: dict[str, Any] = {}
    for view in views:
        entry = tensors.setdefault(view.name, {"shape": list(view.shape), "keys": {}})
        entry["keys"][view.key] = str(view.flat.dtype).removeprefix("torch.")
    return tensors


def _merged(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for tensors in ranks:
        for name, entry in tensors.items():
            merged.setdefault(name, {"shape": entry["shape"], "keys": {}})["keys"].update(entry["keys"])
    return merged


class CheckpointReader:
    """Opens a checkpoint, whoever wrote it, and reads any range of any tensor.

    Args:
        folder: a step-N folder.

    Raises:
        CheckpointError: naming the file that is missing or whose content is not what was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = self._json("manifest.json")
        if self.manifest.get("format") != FORMAT:
            raise CheckpointError(f"{folder}: format {self.manifest.get('format')!r}, this version reads {FORMAT}")
        for name, expected in self.manifest["files"].items():
            if Path(name).name != name:
                raise CheckpointError(f"{folder}: the manifest names {name!r}, which is not a file of the checkpoint")
            file = folder / name
            if not file.is_file():
                raise CheckpointError(f"{file}: missing; the checkpoint is not usable")
            found = _fingerprint(file)
            if found != expected:
                raise CheckpointError(
                    f"{file}: damaged: {found['bytes']} bytes with checksum {found['blake2b'][:12]}..., written were "
                    f"{expected['bytes']} bytes with {expected['blake2b'][:12]}..."
                )
        self.state: dict[str, Any] = self._json("state.json")
        self._ranges: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = {}
        self.random_states: list[dict[str, Any]] = []
        for file in sorted(folder.glob("shard-*.safetensors"), key=lambda f: int(f.stem.removeprefix("shard-"))):
            with self._open(file) as shard:
                self.random_states.append(json.loads(shard.metadata()["rng"]))
                for entry in list(shard.keys()):
                    name, key, start = entry.rsplit("|", 2)
                    length = shard.get_slice(entry).get_shape()[0]
                    self._ranges.setdefault((name, key), []).append((int(start), length, file, entry))

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{self.folder / name}: missing; not a checkpoint, or an incomplete one") from None
        except ValueError as error:
            raise CheckpointError(f"{self.folder / name}: not JSON: {error}") from None

    @staticmethod
    @contextlib.contextmanager
    def _open(file: Path) -> Iterator[Any]:
        try:
            with safe_open(file, framework="pt") as shard:
                yield shard
        except SafetensorError as error:
            raise CheckpointError(f"{file}: not a safetensors file: {error}") from None

    def read(self, name: str, key: str, start: int, length: int) -> Tensor:
        """Elements start .. start+length of a flattened tensor, (length,)."""
        pieces = []
        reached = start
        for first, size, file, entry in sorted(self._ranges.get((name, key), [])):
            if first <= reached < min(first + size, start + length):
                end = min(first + size, start + length)
                with self._open(file) as shard:
                    pieces.append(shard.get_slice(entry)[reached - first : end - first])
                reached = end
        if reached < start + length:
            raise CheckpointError(f"{self.folder}: {name} {key} has no elements from {reached} on")
        return torch.cat(pieces) if pieces else torch.empty(0)

    def fill(self, name: str, tensor: Tensor) -> None:
        """Puts a parameter's saved value into a tensor of its full shape."""
        tensor.copy_(self.read(name, PARAM, 0, tensor.numel()).view(tensor.shape))

    def load(self, views: Views) -> None:
        """Puts the saved values into a network, and into its optimizer where the views have one.

        Raises:
            CheckpointError: if model or optimizer are of another shape or kind.
        """
        self._check_shapes(views)
        keys = {name: set(entry["keys"]) - {PARAM, BUFFER} for name, entry in self.manifest["tensors"].items()}
        if views.optimizer is not None:
            if type(views.optimizer).__name__ != self.manifest["optimizer"]:
                raise CheckpointError(
                    f"{self.folder}: holds the state of {self.manifest['optimizer']}, the recipe asks for "
                    f"{type(views.optimizer).__name__}; keep optim.kind, or start a new run"
                )
            views.make_states(keys, self.manifest["optimizer_step"])
        with torch.no_grad():
            for view in views.to_load():
                if view.key != PARAM and view.key not in keys[view.name]:
                    continue  # a state that the changed recipe brings starts at nothing
                view.flat.copy_(self.read(view.name, view.key, view.start, view.flat.numel()))
            for name, buffer in persistent_buffers(views.net):
                buffer.copy_(self.read(name, BUFFER, 0, buffer.numel()).view(buffer.shape))
            views.loaded()
        if views.rank < len(self.random_states):
            set_random_state(self.random_states[views.rank])

    def _check_shapes(self, views: Views) -> None:
        saved = {name: tuple(entry["shape"]) for name, entry in self.manifest["tensors"].items()}
        wanted = views.shapes() | {name: tuple(b.shape) for name, b in persistent_buffers(views.net)}
        different = [name for name in sorted(saved.keys() | wanted.keys()) if saved.get(name) != wanted.get(name)]
        if different:
            lines = [f"{n}: saved {saved.get(n, 'absent')}, model {wanted.get(n, 'absent')}" for n in different[:5]]
            more = f" (and {len(different) - 5} more)" if len(different) > 5 else ""
            raise CheckpointError(f"{self.folder}: of another model: {'; '.join(lines)}{more}")


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
    return {"bytes": file.stat().st_size, "blake2b": digest}


def _write_json(file: Path, value: Any) -> None:
    with file.open("w", encoding="utf-8") as opened:
        json.dump(value, opened, indent=1)
        opened.flush()
        os.fsync(opened.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _no_space_is_an_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        why = "the disk is full; free space there, or name another place with runs_dir=DIR" if full else str(error)
        raise OutputError(f"cannot write the checkpoint {folder}: {why}") from None


def _barrier(world: int) -> None:
    if world > 1:
        dist.barrier()


def _gather(value: Any, world: int) -> list[Any]:
    if world == 1:
        return [value]
    answers: list[Any] = [None] * world
    dist.all_gather_object(answers, value)
    return answers
