"""The work of any model by running it without values in a process of its own: the front of `lm_train.trace`. Free of torch.

For networks that no formula knows (transformers' and the user's own), and beside the formulas in the tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from lm_train import plugins
from lm_train.errors import UsageError
from lm_train.interpreter import python
from lm_train.plan.counts import Shapes
from lm_train.plan.facts import DataFacts
from lm_train.plan.layout import Layout
from lm_train.plan.work import Kind, Number, Op, Stage, Work
from lm_train.recipe import Recipe, dump

TIMEOUT_S = 120.0
"""For one trace, start of the process included."""
SIZES = (16, 32)
"""Micro batches that are traced; any other of at least 2 samples follows from them. One sample is traced by itself, since
tensors with a dimension of 1 are laid out, and so copied, otherwise. Of fewer than 16 samples torch takes other convolutions."""
_PACKAGES = ("torch", "lightning", "transformers", "torchmetrics")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Request(_Frozen):
    """What the tracing process is asked."""

    recipe: str
    """A file."""
    facts: DataFacts
    layouts: tuple[Layout, ...]
    sizes: tuple[tuple[int, int], ...]
    """Of each layout."""


class Line(_Frozen):
    """Bytes (or FLOPs) as a function of a micro batch's samples, and how many of them are logits'."""

    start: float
    slope: float
    logits_start: float = 0.0
    logits_slope: float = 0.0

    def at(self, size: int) -> float:
        return self.start + self.slope * size

    def logits_at(self, size: int) -> float:
        return self.logits_start + self.logits_slope * size


class TracedOp(_Frozen):
    """`lm_train.plan.work.Op` for any size."""

    name: str
    kind: Kind
    backward: bool
    flops: Line
    bytes: Line
    shape: tuple[tuple[float, float], ...]
    """Start and slope of each dimension."""
    number: Number
    times: int


class TracedStage(_Frozen):
    """`lm_train.plan.work.Stage` for any size; the highest of the lines counts."""

    name: str
    parameters: int
    before: Line
    forward: tuple[Line, ...]
    backward: tuple[Line, ...]
    with_gradients: tuple[Line, ...]
    accumulating: tuple[Line, ...]
    """The backward pass of a later micro batch: the new gradients lie beside the sums of those before until they are added."""


class TracedWork(_Frozen):
    """What a trace tells, for any size of a micro batch."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    trained: int
    """Parameters that are trained."""
    ops: tuple[TracedOp, ...]
    stages: tuple[TracedStage, ...]
    evaluation: tuple[Line, ...]
    batch: Line

    def work(self, layout: Layout) -> Work:
        """Of the layout's micro batch, its gradients added to earlier ones where the layout does so."""
        size, adds = layout.micro_batch_size, adds_gradients(layout)
        return Work(
            ops=tuple(
                Op(
                    op.name,
                    op.kind,
                    op.backward,
                    op.flops.at(size),
                    op.bytes.at(size),
                    tuple(round(start + slope * size) for start, slope in op.shape),
                    op.number,
                    op.times,
                )
                for op in self.ops
            ),
            stages=tuple(_stage(stage, size, adds) for stage in self.stages),
            evaluation_peak=_peak(self.evaluation, size)[0],
            batch_bytes=round(self.batch.at(size)),
        )


def adds_gradients(layout: Layout) -> bool:
    """Whether what a backward pass makes of a parameter is added to what is there; ddp copies it into its bucket."""
    several = layout.accumulate_grad_batches > 1
    return layout.strategy == "ddp" or (several and layout.strategy in ("single", "zero1"))


def _stage(stage: TracedStage, size: int, adds: bool) -> Stage:
    forward, forward_logits = _peak(stage.forward, size)
    backward, backward_logits = _peak(stage.accumulating if adds else stage.backward, size)
    return Stage(
        name=stage.name,
        parameters=stage.parameters,
        forward_peak=forward,
        backward_peak=backward,
        forward_logits=forward_logits,
        backward_logits=backward_logits,
        backward_peak_with_gradients=backward if adds else _peak(stage.with_gradients, size)[0],
        kept_before=round(stage.before.at(size)),
    )


def _peak(lines: tuple[Line, ...], size: int) -> tuple[int, int]:
    highest = max(lines, key=lambda line: line.at(size))
    return round(highest.at(size)), round(highest.logits_at(size))


@dataclass(frozen=True)
class Untraceable:
    """Why a model cannot be traced; nothing can be foretold of it then."""

    reason: str


def traced_work(
    recipe: Recipe, facts: DataFacts, layout: Layout, timeout_s: float = TIMEOUT_S
) -> tuple[Shapes, Work] | Untraceable:
    """Name and shape of each parameter, and the work of one micro batch.

    Args:
        recipe: of any model.
        facts: of the data; what is missing must have been assumed before.
        layout: decides the micro batch, precision, recomputation and pieces of the loss.
        timeout_s: for a trace that is not known yet.
    """
    found = trace_of(recipe, facts, layout, timeout_s)
    if isinstance(found, Untraceable):
        return found
    return [(name, shape) for name, shape in found.shapes], found.work(layout)


def trace_of(
    recipe: Recipe, facts: DataFacts, layout: Layout, timeout_s: float = TIMEOUT_S
) -> TracedWork | Untraceable:
    """The trace for every size of a micro batch, from the cache where it is known; arguments as in `traced_work`."""
    return traces_of(recipe, facts, [layout], timeout_s)[0]


def traces_of(
    recipe: Recipe, facts: DataFacts, layouts: Sequence[Layout], timeout_s: float = TIMEOUT_S
) -> list[TracedWork | Untraceable]:
    """Of several layouts at once: what is not known yet is traced by one process, where starting it takes most of the time.

    Layouts that differ only in what a trace does not depend on (ranks, strategies that compute alike, micro batches from 2 on)
    share one trace.
    """
    try:
        plugins.allow(recipe.plugins)
        plugins.check(recipe)
    except UsageError as error:
        return [Untraceable(str(error)) for _ in layouts]
    context = _context(recipe, facts)
    wanted = [(_decisive(recipe, layout), (1, 1) if layout.micro_batch_size == 1 else SIZES) for layout in layouts]
    files = {case: _file(context, *case) for case in wanted}
    known: dict[_Case, TracedWork | Untraceable] = {}
    for case, file in files.items():
        with contextlib.suppress(OSError, ValidationError):
            known[case] = TracedWork.model_validate_json(file.read_text(encoding="utf-8"))
    missing = [case for case in files if case not in known]
    if missing:
        for case, answer in zip(missing, _ask(recipe, facts, missing, timeout_s), strict=True):
            known[case] = answer
            if isinstance(answer, TracedWork):
                _keep(files[case], answer)
    return [known[case] for case in wanted]


_Case = tuple[Layout, tuple[int, int]]


def _ask(recipe: Recipe, facts: DataFacts, cases: Sequence[_Case], timeout_s: float) -> list[TracedWork | Untraceable]:
    """One answer for each case."""
    layouts, sizes = zip(*cases, strict=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(dump(recipe), encoding="utf-8")
        request = Request(recipe=str(file), facts=facts, layouts=layouts, sizes=sizes)
        try:
            done = subprocess.run(
                [*python(), "-m", "lm_train.trace"],
                input=request.model_dump_json().encode(),
                capture_output=True,
                timeout=timeout_s,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            )
        except subprocess.TimeoutExpired as late:
            output, why = late.stdout or b"", f"the network took more than {timeout_s:.0f} s to run without values"
        else:
            said = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()] or [
                "no message"
            ]
            output, why = (
                done.stdout,
                f"the tracing process ended with code {done.returncode}: {said[-1].strip()[:300]}",
            )
    answers = [_answer(line) for line in output.decode().splitlines(keepends=True) if line.endswith("\n")]
    return answers + [Untraceable(why)] * (len(cases) - len(answers))


def _answer(line: str) -> TracedWork | Untraceable:
    answer = json.loads(line)
    return Untraceable(answer["reason"]) if "reason" in answer else TracedWork.model_validate(answer)


def _decisive(recipe: Recipe, layout: Layout) -> Layout:
    """The layout with everything that a trace does not depend on brought to one value."""
    casts = layout.precision.endswith("-mixed") and layout.strategy not in ("single", "ddp")
    recomputed, chunks = layout.activation_checkpointing, layout.cross_entropy_chunks
    if recipe.model.kind == "hf":
        recomputed, chunks = "full" if recomputed == "full" else "none", 1
    elif recipe.model.kind in ("custom", "mlp", "cnn", "resnet"):
        recomputed, chunks = "none", 1
    return dataclasses.replace(
        layout,
        nodes=1,
        devices=1,
        strategy="zero3" if casts else "single",
        micro_batch_size=1,
        accumulate_grad_batches=1,
        activation_checkpointing=recomputed,
        cross_entropy_chunks=chunks,
        num_workers=0,
        compile=False,
        threads_per_rank=1,
        accelerator="cpu",
    )


# ---- cache


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lm_train" / "traces"


def _context(recipe: Recipe, facts: DataFacts) -> str:
    """A key of what decides a trace besides the layout: network and data, versions, and code that may change under them."""
    parts = {
        "model": recipe.model.model_dump(mode="json"),
        "data": recipe.data.model_dump(mode="json", exclude={"global_batch_size", "micro_batch_size", "num_workers"}),
        "facts": dataclasses.asdict(facts),
        "versions": {name: _version(name) for name in _PACKAGES},
        "code": [_digest(folder) for folder in _sources(recipe)],
    }
    return json.dumps(parts, sort_keys=True)


def _file(context: str, layout: Layout, sizes: tuple[int, int]) -> Path:
    case = json.dumps([dataclasses.asdict(layout), sizes])
    return _cache_folder() / f"{hashlib.sha256((context + case).encode()).hexdigest()}.json"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _sources(recipe: Recipe) -> list[Path]:
    """Our own networks, and the packages or folder that the recipe names."""
    own = Path(__file__).parent.parent
    found = [own / "models", own / "modules", own / "trace"]
    for section in (recipe.model, recipe.data):
        factory: str | None = getattr(section, "factory", None)
        if factory is not None:
            spec = importlib.util.find_spec(factory.partition(":")[0].split(".")[0])
            if spec is not None and spec.origin is not None:
                package = Path(spec.origin)
                found.append(package.parent if package.name == "__init__.py" else package)
    path: str | None = getattr(recipe.model, "path", None)
    return found + ([Path(path).expanduser() / "config.json"] if path is not None else [])


def _digest(source: Path) -> str:
    files = sorted(source.rglob("*.py")) if source.is_dir() else [source]
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(f"{file.name}\0".encode() + file.read_bytes())
        except OSError:
            digest.update(b"-")  # a model of the hub
    return digest.hexdigest()


def _keep(file: Path, work: TracedWork) -> None:
    """A cache that cannot be written is no reason to fail."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(work.model_dump_json(), encoding="utf-8")
        partial.replace(file)
    except OSError:
        pass
