"""One checkpoint format for every strategy: flat ranges of tensors in safetensors, everything else in JSON, no pickle.

    step-N/shard-R.safetensors   1-D tensors named `parameter|key|start`: what rank R holds of each parameter (key `param`),
                                 optimizer state (its own keys) and buffer (`buffer`), as a range of the flattened tensor;
                                 the rank's random-number states in the header
    step-N/state.json            counters and positions
    step-N/manifest.json         shapes, dtypes, keys; size and BLAKE2 checksum of every other file

Each rank writes its part into a hidden folder beside the final one; when all parts are on disk rank 0 renames it.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lm_train.errors import CheckpointError, OutputError

FORMAT = 1
PARAM, BUFFER = "param", "buffer"


class View(NamedTuple):
    """What this rank holds of one tensor, as a live flat view."""

    name: str
    key: str
    start: int
    flat: Tensor
    shape: tuple[int, ...]


def _slice_of(tensor: Tensor, rank: int, world: int) -> tuple[int, Tensor]:
    flat = tensor.detach().reshape(-1)
    start, end = rank * flat.numel() // world, (rank + 1) * flat.numel() // world
    return start, flat[start:end]


def replicated_views(net: nn.Module, optimizer: torch.optim.Optimizer, rank: int, world: int) -> Iterator[View]:
    """Views under single and ddp, where every rank holds everything: rank r answers for the r-th part of each tensor."""
    for name, parameter in net.named_parameters():
        tensors = {PARAM: parameter.data} | {
            key: value
            for key, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor) and value.shape == parameter.shape
        }
        for key, tensor in tensors.items():
            yield View(name, key, *_slice_of(tensor, rank, world), tuple(parameter.shape))
    for name, buffer in _persistent_buffers(net):
        yield View(name, BUFFER, *_slice_of(buffer, rank, world), tuple(buffer.shape))


def _persistent_buffers(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    saved = net.state_dict().keys()
    return ((name, buffer) for name, buffer in net.named_buffers() if name in saved)


def save(
    folder: Path,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    rank: int = 0,
    world: int = 1,
) -> None:
    """Writes `folder`; every rank calls it at the same step boundary.

    Args:
        folder: final name, such as checkpoints/step-100. An existing one is replaced.
        net: whose parameters and buffers are saved.
        optimizer: whose state is saved.
        state: JSON values; must hold `step`.
        rank: of this process.
        world: number of processes.

    Raises:
        OutputError: if it cannot be written; an older checkpoint is untouched.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shard = partial / f"shard-{rank}.safetensors"
    views = list(replicated_views(net, optimizer, rank, world))
    try:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        _barrier(world)
        with _no_space_is_an_error(folder):
            tensors = {f"{v.name}|{v.key}|{v.start}": v.flat.contiguous() for v in views if v.flat.numel()}
            save_file(tensors, shard, metadata={"rng": json.dumps(random_state())})
            _sync(shard)
        own = {shard.name: _fingerprint(shard)}
        fault = None
    except OutputError as error:
        own, fault = {}, str(error)
    answers = _gather((own, fault), world)
    faults = [text for _, text in answers if text]
    if faults:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise OutputError(faults[0])
    if rank == 0:
        with _no_space_is_an_error(folder):
            files = {name: entry for shards, _ in answers for name, entry in shards.items()}
            _write_json(partial / "state.json", state)
            files["state.json"] = _fingerprint(partial / "state.json")
            _write_json(partial / "manifest.json", _manifest(views, net, optimizer, files, world))
            _sync(partial)
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
            _sync(folder.parent)
    _barrier(world)


def _manifest(
    views: list[View], net: nn.Module, optimizer: torch.optim.Optimizer, files: dict[str, Any], world: int
) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for view in views:
        entry = tensors.setdefault(view.name, {"shape": list(view.shape), "keys": {}})
        entry["keys"][view.key] = str(view.flat.dtype).removeprefix("torch.")
    return {
        "format": FORMAT,
        "world_size": world,
        "optimizer": type(optimizer).__name__,
        "optimizer_step": _optimizer_step(optimizer),
        "tensors": tensors,
        "files": files,
    }


def _optimizer_step(optimizer: torch.optim.Optimizer) -> int | None:
    """The step that drives bias correction, the same for every parameter; None for optimizers without one."""
    steps = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    assert len(steps) <= 1, f"parameters at different steps: {steps}"
    return steps.pop() if steps else None


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

    def load(self, net: nn.Module, optimizer: torch.optim.Optimizer | None, rank: int = 0) -> None:
        """Puts the saved values into a network, and into its optimizer unless that is None (under single and ddp).

        Raises:
            CheckpointError: if model or optimizer are of another shape or kind.
        """
        self._check_shapes(net)
        if optimizer is not None and type(optimizer).__name__ != self.manifest["optimizer"]:
            raise CheckpointError(
                f"{self.folder}: holds the state of {self.manifest['optimizer']}, the recipe asks for "
                f"{type(optimizer).__name__}; keep optim.kind, or start a new run"
            )
        for name, parameter in net.named_parameters():
            shape, numel = parameter.shape, parameter.numel()
            with torch.no_grad():
                parameter.copy_(self.read(name, PARAM, 0, numel).view(shape))
            if optimizer is None or not parameter.requires_grad:
                continue
            keys = self.manifest["tensors"][name]["keys"].keys() - {PARAM}
            for key in keys:
                value = self.read(name, key, 0, numel).view(shape)
                optimizer.state[parameter][key] = value.to(parameter.device)
            # a momentum alone (Muon's part of its optimizer) has no bias to correct
            if self.manifest["optimizer_step"] is not None and keys != {"momentum_buffer"}:
                fused = any(group.get("fused") for group in optimizer.param_groups)
                device = parameter.device if fused else torch.device("cpu")
                optimizer.state[parameter]["step"] = torch.tensor(float(self.manifest["optimizer_step"]), device=device)
        for name, buffer in _persistent_buffers(net):
            buffer.copy_(self.read(name, BUFFER, 0, buffer.numel()).view(buffer.shape))
        if rank < len(self.random_states):
            set_random_state(self.random_states[rank])

    def _check_shapes(self, net: nn.Module) -> None:
        saved = {name: tuple(entry["shape"]) for name, entry in self.manifest["tensors"].items()}
        wanted = {name: tuple(p.shape) for name, p in [*net.named_parameters(), *_persistent_buffers(net)]}
        different = [name for name in sorted(saved.keys() | wanted.keys()) if saved.get(name) != wanted.get(name)]
        if different:
            lines = [f"{n}: saved {saved.get(n, 'absent')}, model {wanted.get(n, 'absent')}" for n in different[:5]]
            more = f" (and {len(different) - 5} more)" if len(different) > 5 else ""
            raise CheckpointError(f"{self.folder}: of another model: {'; '.join(lines)}{more}")


def random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators as JSON values."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }
    if torch.cuda.is_available():
        state["cuda"] = base64.b64encode(torch.cuda.get_rng_state().numpy().tobytes()).decode()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes_tensor(state["cuda"]))


def _bytes_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


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
