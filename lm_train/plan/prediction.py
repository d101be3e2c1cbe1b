"""What a plan foretells, each figure with the interval in which it is expected."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Interval(_Frozen):
    """`low` to `high` is where about nine of ten outcomes are expected."""

    low: float
    value: float
    high: float

    @classmethod
    def around(cls, value: float, below: float, above: float) -> Interval:
        """With relative errors, such as 0.1 for 10%."""
        return cls(low=value * (1 - below), value=value, high=value * (1 + above))

    def times(self, factor: float) -> Interval:
        return Interval(low=self.low * factor, value=self.value * factor, high=self.high * factor)

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


class MemoryPrediction(_Frozen):
    """Bytes at the worst moment of the rank with most, by part; a GPU's own memory, on a CPU what is resident.

    The parts add up to the peak: a part is what it holds at that moment, not its own maximum.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    """Logits, and what the loss makes of them."""
    buffers: int
    """Communication: buckets, gathered parameters, what a reduction works on."""
    copy_to_save: int = 0
    """On a CPU: of what a save writes while the training goes on; on a GPU that is the host's."""
    reserve: int
    """What the runtime holds besides: context, libraries, the allocator's rounding and fragments."""
    moment: str
    """When: the forward or backward pass, the update, a validation, a checkpoint."""
    host: int
    """Bytes of host memory that offloading and pinned buffers take, besides the process itself."""
    relative_error: tuple[float, float]
    """The peak is expected within these shares below and above the sum."""
    capacity: int
    """Bytes that the device has; 0: unknown."""
    host_capacity: int = 0
    """Bytes of host memory that are a GPU's share; 0: unknown, or the same memory as the device's."""

    @property
    def total(self) -> int:
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.buffers
            + self.copy_to_save
            + self.reserve
        )

    @property
    def low(self) -> int:
        """The lower end of what is expected."""
        return round(self.total * (1 - self.relative_error[0]))

    @property
    def high(self) -> int:
        """The upper end of what is expected: this must fit."""
        return round(self.total * (1 + self.relative_error[1]))

    @property
    def fits(self) -> bool:
        return self.missing <= 0

    @property
    def missing(self) -> int:
        """Bytes over what there is, of the device's memory or where that lacks more of the host's; 0 or less: it fits."""
        return max(self.high - self.capacity if self.capacity else 0, self.missing_on_host)

    @property
    def missing_on_host(self) -> int:
        """The same of host memory alone."""
        return max(0, self.host - self.host_capacity) if self.host_capacity else 0


class TimePrediction(_Frozen):
    """Seconds of one optimizer step, by part; the parts add up to the step."""

    compute: float
    communication: float
    """Exposed: what the computation does not hide."""
    optimizer: float
    data: float
    """Waiting for samples."""
    host: float
    """What the host needs beyond the device's work: launching operations, the loop around them."""
    relative_error: tuple[float, float]
    """The step is expected within these shares below and above the sum."""
    source: str
    """What the rates come from: data sheets, or a calibration, by name."""

    @property
    def seconds(self) -> float:
        return self.compute + self.communication + self.optimizer + self.data + self.host

    @property
    def interval(self) -> Interval:
        return Interval.around(self.seconds, *self.relative_error)


class Prediction(_Frozen):
    """Of the whole run."""

    memory: MemoryPrediction
    step: TimePrediction
    samples_per_second: float
    mfu: float | None
    """None where FLOPs or the device's peak are unknown."""
    start_seconds: float
    validation_seconds: float
    """Of one validation."""
    checkpoint_bytes: int
    checkpoint_seconds: Interval
    """Of one save, until it is published."""
    checkpoint_stall: Interval | None = None
    """For which the training stands still for it; None: all of that."""
    hours: Interval
    """Of the whole run: start, steps, validations, saves."""
    gpu_hours: Interval
    money: Interval | None
    """None where nobody has said the price."""
    currency: str
    kwh: Interval
    final_loss: Interval | None
    """By a scaling law fitted to other people's models: a prior, not a promise. None where none applies."""
