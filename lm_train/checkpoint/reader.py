"""Opens a checkpoint, whoever wrote it, and puts it into a training of any layout. Nothing here unpickles."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_train.checkpoint.randomness import set_random_state
from lm_train.checkpoint.views import BUFFER, PARAM, Views
from lm_train.errors import CheckpointError
from lm_train.saved.manifest import open_manifest, read_state, verify
from lm_train.saved.shards import Shards
from lm_train.strategy.buffers import persistent_buffers


class CheckpointReader:
    """Reads any range of any tensor.

    Args:
        folder: a step-N folder.
        verified: its checksums were compared before, by all ranks together.

    Raises:
        CheckpointError: naming the file that is missing or whose content is not what was written.
    """

    def __init__(self, folder: Path, verified: bool = False) -> None:
        self.folder = folder
        self.manifest = open_manifest(folder)
        if not verified:
            verify(folder, self.manifest, threads=min(4, os.cpu_count() or 1))
        self.state: dict[str, Any] = read_state(folder, self.manifest)
        if type(self.state.get("step")) is not int:
            raise CheckpointError(
                f"{folder / 'state.json'}: expected a number of steps, found {self.state.get('step')!r}"
            )
        self._shards = Shards(folder, self.manifest)
        self.random_states = [metadata.get("rng") for metadata in self._shards.metadata]
        """Of each rank that wrote, as JSON."""

    def copy_to(self, flat: Tensor, name: str, key: str, start: int) -> None:
        """Puts elements start .. start + flat.numel() of a flattened tensor into `flat`, (length,)."""
        stored = self.manifest.tensors.get(name)
        if stored is None or key not in stored.keys or start + flat.numel() > stored.numel:
            raise CheckpointError(f"{self.folder}: {name} {key} has no elements {start} to {start + flat.numel()}")
        dtype = getattr(torch, stored.keys[key])
        for first, raw in self._shards.between(name, key, start, start + flat.numel()):
            piece = torch.frombuffer(raw, dtype=dtype)
            flat[first - start : first - start + piece.numel()].copy_(piece)

    def read(self, name: str, key: str, start: int, length: int) -> Tensor:
        """Elements start .. start+length of a flattened tensor, (length,)."""
        stored = self.manifest.tensors.get(name)
        dtype = getattr(torch, stored.keys.get(key, "float32")) if stored is not None else torch.float32
        flat = torch.empty(length, dtype=dtype)
        self.copy_to(flat, name, key, start)
        return flat

    def fill(self, name: str, tensor: Tensor) -> None:
        """Puts a parameter's saved value into a tensor of its full shape."""
        tensor.copy_(self.read(name, PARAM, 0, tensor.numel()).view(tensor.shape))

    def load(self, views: Views) -> None:
        """Puts the saved values into a network, and into its optimizer where the views have one.

        Raises:
            CheckpointError: if model or optimizer are of another shape or kind.
        """
        self._check_shapes(views)
        keys = {name: set(stored.keys) - {PARAM, BUFFER} for name, stored in self.manifest.tensors.items()}
        if views.optimizer is not None:
            if type(views.optimizer).__name__ != self.manifest.optimizer:
                raise CheckpointError(
                    f"{self.folder}: holds the state of {self.manifest.optimizer}, the recipe asks for "
                    f"{type(views.optimizer).__name__}; keep optim.kind, or start a new run"
                )
            views.make_states(keys, self.manifest.optimizer_step)
        with torch.no_grad():
            for view in views.to_load():
                if view.key != PARAM and view.key not in keys[view.name]:
                    continue  # a state that the changed recipe brings starts at nothing
                self.copy_to(view.flat, view.name, view.key, view.start)
            for name, buffer in persistent_buffers(views.net):
                buffer.copy_(self.read(name, BUFFER, 0, buffer.numel()).view(buffer.shape))
            views.loaded()
        if views.rank < len(self.random_states):
            self._set_random_state(views.rank)

    def _set_random_state(self, rank: int) -> None:
        try:
            set_random_state(json.loads(self.random_states[rank] or ""))
        except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.folder / f'shard-{rank}.safetensors'}: expected the states of the random-number generators, found "
                f"something else ({type(error).__name__})"
            ) from None

    def _check_shapes(self, views: Views) -> None:
        saved = {name: stored.shape for name, stored in self.manifest.tensors.items()}
        wanted = views.shapes() | {name: tuple(b.shape) for name, b in persistent_buffers(views.net)}
        different = [name for name in sorted(saved.keys() | wanted.keys()) if saved.get(name) != wanted.get(name)]
        if different:
            lines = [f"{n}: saved {saved.get(n, 'absent')}, model {wanted.get(n, 'absent')}" for n in different[:5]]
            more = f" (and {len(different) - 5} more)" if len(different) > 5 else ""
            raise CheckpointError(f"{self.folder}: of another model: {'; '.join(lines)}{more}")
