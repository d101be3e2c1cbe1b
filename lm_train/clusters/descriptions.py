"""Descriptions of clusters and devices in YAML files: shipped inside the package, or the user's own.

A description may begin with `base:`, the name of a shipped one or the path of another file, and then says only what
differs. A cluster's `device:` is the name of a shipped device, or its facts, which may have a `base:` as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ValidationError

from lm_train.clusters.types import Cluster, Device, Link, Numbers, Site
from lm_train.errors import UsageError
from lm_train.recipe.checks import near_path
from lm_train.recipe.explain import name_of, nearest, shown, wrong_value
from lm_train.recipe.text import parse_yaml

Raw = dict[str, Any]
KeyPath = tuple[str, ...]
_HERE = Path(__file__).resolve().parent
_SUFFIXES = (".yaml", ".yml")
_MAX_BYTES = 1 << 20
_PARTS: dict[KeyPath, type[BaseModel]] = {
    (): Cluster,
    ("device",): Device,
    ("intra_node",): Link,
    ("inter_node",): Link,
    ("site",): Site,
}
_OURS = {(): ("here",), ("device",): ("known", "warning")}
"""Fields that no file gives."""
_NO_FACTS = ("name", "sources", "accelerator")
"""Fields without a source."""
_SYNONYMS = {
    "gpu": "device",
    "gpus": "devices_per_node",
    "gpus_per_node": "devices_per_node",
    "num_nodes": "nodes",
    "cpus": "cpu_cores_per_node",
    "cpus_per_node": "cpu_cores_per_node",
    "memory": "memory_bytes",
    "gpu_memory": "memory_bytes",
    "price": "price_per_gpu_hour",
    "cost": "price_per_gpu_hour",
    "cost_per_gpu_hour": "price_per_gpu_hour",
    "tdp": "power_watts",
    "watts": "power_watts",
    "flops": "peak_flops",
    "tflops": "peak_flops",
    "latency": "latency_seconds",
    "nvlink": "intra_node",
    "interconnect": "inter_node",
    "infiniband": "inter_node",
    "queue": "partition",
    "slurm": "site",
    "time_limit": "max_hours",
}


class _Kind(NamedTuple):
    word: Literal["cluster", "device"]
    folder: Path

    def shipped(self) -> dict[str, Path]:
        return {file.stem: file for file in sorted(self.folder.glob("*.yaml"))}


_CLUSTERS = _Kind("cluster", _HERE)
_DEVICES = _Kind("device", _HERE / "devices")


@cache
def shipped_clusters() -> tuple[str, ...]:
    """Names of the shipped clusters."""
    return tuple(_CLUSTERS.shipped())


@cache
def shipped_devices() -> tuple[str, ...]:
    """Names of the shipped devices."""
    return tuple(_DEVICES.shipped())


@cache
def device_named(name: str) -> Device:
    """The facts of a shipped device."""
    return Device.model_validate(_plain(_Reader().chain(name, _DEVICES, _HERE, ())))


def is_path(asked: str) -> bool:
    """Whether a cluster is asked for by a file's path."""
    return "/" in asked or asked.endswith(_SUFFIXES)


def cluster_named(asked: str) -> Cluster:
    """The description of a shipped name, or of a file.

    Raises:
        UsageError: with every fault of the name or of the file, one line each.
    """
    reader = _Reader()
    raw = reader.chain(asked, _CLUSTERS, Path.cwd(), ())
    if reader.problems:
        raise UsageError(list(dict.fromkeys(reader.problems)))
    raw.setdefault("name", Path(asked).stem if is_path(asked) else asked)
    cluster = reader.validated(raw, name_of((asked,)))
    if cluster.nodes > 1 and cluster.inter_node is None:
        raise UsageError(
            f"cluster: {name_of((asked,))} has {cluster.nodes} nodes and nothing between them; give "
            "inter_node: {name: ..., bandwidth: BYTES_PER_SECOND, latency_seconds: ...}"
        )
    return cluster


class _Reader:
    """Reads one description with all that it is based on."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.lines: dict[KeyPath, str] = {}
        """Where each key was written last, as `file:line`."""

    def chain(
        self, asked: str, kind: _Kind, folder: Path, seen: tuple[Path, ...], label: str = "", at: str = ""
    ) -> Raw:
        """The facts of `asked`, laid over its base's, and so on; faults go to `problems`, under the key `label`."""
        prefix: KeyPath = ("device",) if kind is _DEVICES else ()
        label = label or kind.word
        file = _find(asked, kind, folder)
        if isinstance(file, str):
            self.problems.append(f"{label}: {file}{at}")
            return {}
        if file in seen:
            way = " -> ".join(f.name for f in (*seen, file))
            self.problems.append(f"{label}: {name_of((asked,))} leads back to itself: {way}{at}")
            return {}
        where = _shown(file)
        try:
            raw, numbers = parse_yaml(_read(file, where), where)
            if not isinstance(raw, dict):
                raise UsageError(f"{where}:1: expected facts such as device: and nodes:; got {shown(raw)}")
        except UsageError as error:
            self.problems += error.problems
            return {}
        lines = {tuple(map(str, path)): f"{where}:{number}" for path, number in numbers.items()}
        result: Raw = {}
        base = raw.pop("base", None)
        if base is not None and not isinstance(base, str):
            expected = f"expected the name or the path of a {kind.word}"
            self.problems.append(f"base: {expected}; got {shown(base)} ({lines[('base',)]})")
        elif base is not None:
            result = self.chain(base, kind, file.parent, (*seen, file), "base", f" ({lines[('base',)]})")
            if kind is _CLUSTERS:
                result.pop("name", None)
        if kind is _CLUSTERS and "device" in raw:
            self._device(raw, result, lines, file)
        _name_sources(raw, lines)
        self.lines |= {(*prefix, *path): line for path, line in lines.items()}
        _merge(result, raw)
        return result

    def _device(self, raw: Raw, result: Raw, lines: Mapping[KeyPath, str], file: Path) -> None:
        """Replaces the name of a device, or the base of its facts, by the facts."""
        given = raw["device"]
        facts = dict(given) if isinstance(given, Mapping) else {}
        base = facts.pop("base", None) if isinstance(given, Mapping) else given
        key = ("device", "base") if isinstance(given, Mapping) else ("device",)
        if isinstance(base, str):
            result["device"] = self.chain(base, _DEVICES, file.parent, (), ".".join(key), f" ({lines[key]})")
            for source in [source for source in result.get("sources", {}) if source.startswith("device.")]:
                del result["sources"][source]
        elif base is not None:
            expected = f"expected the name of a GPU ({', '.join(shipped_devices())}), or its facts as keys and values"
            self.problems.append(f"{'.'.join(key)}: {expected}; got {shown(base)} ({lines[key]})")
        if facts:
            raw["device"] = facts
        else:
            del raw["device"]

    def validated(self, raw: Raw, what: str) -> Cluster:
        """The cluster, or every fault of its facts at once."""
        for part, fields in _OURS.items():
            values = raw if not part else raw.get(part[0])
            for field in fields:
                if isinstance(values, Mapping) and field in values:
                    self.problems.append(self._unknown((*part, field)))
        try:
            cluster = Cluster.model_validate(_plain(raw))
        except ValidationError as error:
            faults = error.errors(include_url=False)
            self.problems += [self._told(fault) for fault in faults if fault["type"] != "missing"]
            self.problems += self._missing([tuple(map(str, f["loc"])) for f in faults if f["type"] == "missing"], what)
        if self.problems:
            raise UsageError(list(dict.fromkeys(self.problems)))
        return cluster

    def _missing(self, paths: list[KeyPath], what: str) -> list[str]:
        """One line for each part of the description that lacks something."""
        told = []
        for part in dict.fromkeys(path[:-1] for path in paths):
            names = [path[-1] for path in paths if path[:-1] == part]
            base = {(): ", or begin with base: h100x8", ("device",): ", or give it a base: h100"}.get(part, "")
            there = f"{'.'.join(part)}: " if part else f"{what}: "
            told.append(
                f"{there}{', '.join(names)} missing; give {'it' if len(names) == 1 else 'them'}{base}{self._where(part)}"
            )
        return told

    def _told(self, fault: Any) -> str:
        path = tuple(str(part) for part in fault["loc"] if part != "[key]")
        parent, leaf, given = path[:-1], path[-1], fault["input"]
        key, where = ".".join(path), self._where(path)
        if fault["type"] == "extra_forbidden":
            return self._unknown(path)
        if path == ("currency",):
            return f"{key}: expected an ISO 4217 code such as USD; got {shown(given)}{where}"
        if parent[-1:] in (("peak_flops",), ("achievable",)):
            numbers = get_args(Numbers)
            if leaf not in numbers:
                near = nearest(leaf, numbers)
                hint = f"did you mean {near}?" if near else f"there are {', '.join(numbers)}"
                return f"{key}: no such type of numbers; {hint}{where}"
            most = " and at most 1" if parent[-1] == "achievable" else ""
            return f"{key}: expected a number above 0{most}; got {shown(given)}{where}"
        if path in _PARTS or leaf in ("peak_flops", "achievable", "sources"):
            return f"{key}: expected keys and values; got {shown(given)}{where}"
        if parent in _PARTS:
            return wrong_value(key, _PARTS[parent], leaf, given, fault["msg"]) + where
        return f"{key}: {fault['msg'][:1].lower()}{fault['msg'][1:]}; got {shown(given)}{where}"

    def _unknown(self, path: KeyPath) -> str:
        parent, leaf = path[:-1], path[-1]
        own = [field for field in _PARTS[parent].model_fields if field not in _OURS.get(parent, ())]
        word = leaf.lower().replace("-", "_")
        word = _SYNONYMS.get(word, word)
        places = sorted((p for p, model in _PARTS.items() if word in model.model_fields), key=lambda p: p != parent)
        if places and (*places[0], word) != path:
            meant: str | None = ".".join((*places[0], word))
        else:
            near = nearest(leaf, own, cutoff=0.7) or _SYNONYMS.get(nearest(leaf, _SYNONYMS, cutoff=0.75) or "")
            meant = ".".join((*parent, near)) if near in own else None
        hint = f"did you mean {meant}?" if meant else f"there are {', '.join(own)}"
        return f"{name_of(path)}: no such fact; {hint}{self._where(path)}"

    def _where(self, path: KeyPath) -> str:
        """` (file:line)` of the key, else of the nearest one around it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f" ({self.lines[path[:length]]})"
        return ""


def _find(asked: str, kind: _Kind, folder: Path) -> Path | str:
    """The file of a description, or what is wrong with the name."""
    names = kind.shipped()
    plain = name_of((asked,))
    if not is_path(asked):
        if asked in names:
            return names[asked]
        near = nearest(asked, names)
        known = ", ".join(names) if kind is _DEVICES else f"auto, {', '.join(names)}"
        own = "its facts as keys and values" if kind is _DEVICES else "a YAML file of your own by its path"
        hint = f"did you mean {near}? There are" if near else "there are"
        return f"{plain}: no such {kind.word}; {hint} {known}, or {own}"
    try:
        file = Path(asked).expanduser()
        file = file if file.is_absolute() else folder / file
        if file.is_file():
            if asked.endswith(_SUFFIXES):
                return file.resolve()
            return f"{plain}: expected a file that ends in .yaml or .yml"
        if file.exists():
            return f"{plain}: not a plain file; expected a .yaml file"
    except (OSError, ValueError, RuntimeError):  # no name of a file: too long, a NUL, ~nobody
        return f"{plain}: no such file"
    stem = Path(asked).stem
    return f"{plain}: no such file" + (f"; did you mean {stem}?" if stem in names else near_path(asked, folder))


def _read(file: Path, where: str) -> str:
    try:
        with file.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise UsageError(f"{where}:1: larger than {_MAX_BYTES:,} bytes; a description is a page at most")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{where}: cannot read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not UTF-8 (byte {error.start})") from None


def _shown(file: Path) -> str:
    for folder in (Path.cwd(), _HERE.parent.parent):
        if file.is_relative_to(folder):
            return str(file.relative_to(folder))
    return str(file)


def _name_sources(raw: Raw, lines: Mapping[KeyPath, str]) -> None:
    """Where a file gives a fact without its source, the file itself is the source."""
    given = raw.get("sources", {})
    if not isinstance(given, Mapping):
        return
    facts: list[KeyPath] = [(key,) for key in raw if key not in (*_NO_FACTS, "site", "device")]
    if isinstance(raw.get("device"), Mapping):
        facts += [("device", str(key)) for key in raw["device"] if key not in _NO_FACTS]
    raw["sources"] = {**{".".join(fact): lines[fact] for fact in facts if fact in lines}, **given}


def _merge(raw: Raw, over: Mapping[str, Any]) -> None:
    """Lays `over` onto `raw`, mappings key by key."""
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(raw.get(key), dict):
            _merge(raw[key], value)
        else:
            raw[key] = dict(value) if isinstance(value, Mapping) else value


def _plain(value: Any) -> Any:
    """Written numbers stay as they are; this copies the mappings, so that no two descriptions share one."""
    return {key: _plain(part) for key, part in value.items()} if isinstance(value, Mapping) else value
