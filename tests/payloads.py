"""Files that run code where they are unpickled, built or trusted: each would touch the file `canary`."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch


class _Touches:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def pickled(canary: Path, protocol: int = 4) -> bytes:
    return pickle.dumps({"step": 4, "state": _Touches(canary)}, protocol)


def torch_file(canary: Path) -> bytes:
    """As torch.save writes it: a zip with data.pkl."""
    stream = io.BytesIO()
    torch.save({"state": _Touches(canary)}, stream)
    return stream.getvalue()


def numpy_file(canary: Path) -> bytes:
    """A .npz of an object array."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    header += b" " * (53 - len(header) % 64 + 64) + b"\n"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + pickled(canary)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("arr_0.npy", array)
    return stream.getvalue()


def python_file(canary: Path) -> str:
    return f"import os\nos.system('touch {canary}')\n"


def yaml_texts(canary: Path) -> dict[str, str]:
    """Recipes by the name of what is wrong with them."""
    command = f"touch {canary}"
    bomb = "a: &a [x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    return {
        "yaml object/apply": f"model: !!python/object/apply:os.system ['{command}']\n",
        "yaml object/new": f"data: !!python/object/new:os.system ['{command}']\n",
        "yaml name": "data: !!python/name:os.system\n",
        "yaml module": "data: !!python/module:os\n",
        "yaml own tag": f"data: !include {canary}\n",
        "yaml bytes": "data: !!binary aGVsbG8=\n",
        "yaml alias bomb": bomb,
        "yaml merge key": "a: &a {n_layer: 2}\nmodel: {<<: *a}\n",
        "yaml depth": "data: " + "[" * 5000 + "]" * 5000 + "\n",
        "yaml two documents": f"seed: 1\n---\nmodel: !!python/object/apply:os.system ['{command}']\n",
        "a plugin of its own": "plugins: [evil]\nmodel: {kind: custom, factory: evil:build}\ndata: {kind: embedded}\n",
        "a factory that nobody allowed": "model: {kind: custom, factory: evil:build}\n",
        "a factory of Python": f"model: {{kind: custom, factory: os:system, args: {{command: '{command}'}}}}\n",
        "a factory that is an expression": f'model: {{kind: custom, factory: \'__import__("os").system("{command}"):x\'}}\n',
        "_target_": f"model: {{_target_: os.system, command: '{command}'}}\n",
        "class_path": f"model: {{class_path: os.system, init_args: {{command: '{command}'}}}}\n",
        "auto_map": "model: {kind: hf, config: {model_type: gpt2, auto_map: {AutoConfig: evil.Config}}}\n",
        "trust_remote_code": "model: {kind: hf, config: {model_type: gpt2, trust_remote_code: true}}\n",
        "custom_pipelines": "model: {kind: hf, config: {model_type: gpt2, custom_pipelines: {x: {impl: evil.P}}}}\n",
        "a base that is no recipe": "base: ../../../../../../../../etc/passwd\n",
        "a name that is a path": "name: ../../x\n",
        "a name that is a command": f"name: '$({command})'\n",
    }


def huge_header(claimed: int) -> bytes:
    """A safetensors file whose header says so many bytes of one tensor."""
    header = json.dumps({"x|param|0": {"dtype": "F32", "shape": [claimed // 4], "data_offsets": [0, claimed]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * 64


def safetensors_faults() -> dict[str, bytes]:
    def of(header: bytes, tail: bytes = b"\0" * 64, length: int | None = None) -> bytes:
        return struct.pack("<Q", len(header) if length is None else length) + header + tail

    overlap = {
        "a|param|0": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]},
        "b|param|0": {"dtype": "F32", "shape": [8], "data_offsets": [16, 48]},
    }
    return {
        "a tensor of 1 TB": huge_header(1 << 40),
        "a header of 1 TB": of(b"{}", length=1 << 40),
        "a header of 2^64 - 1": of(b"{}", length=(1 << 64) - 1),
        "overlapping ranges": of(json.dumps(overlap).encode()),
        "a range before the file": of(
            json.dumps({"a|param|0": {"dtype": "F32", "shape": [8], "data_offsets": [-32, 0]}}).encode()
        ),
        "a shape that overflows": of(
            json.dumps({"a|param|0": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 64]}}).encode()
        ),
        "a name that is a path": of(
            json.dumps({"../../x|param|0": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}).encode()
        ),
        "a start that is no number": of(
            json.dumps({"a|param|x": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}).encode()
        ),
        "a header that is a list": of(b"[]"),
        "a deep header": of(b"[" * 100_000 + b"]" * 100_000),
        "an empty file": b"",
        "seven bytes": b"\1" * 7,
    }
