"""Rates by data sheets: a roofline for each operation (Williams et al. 2009), alpha-beta for each collective.

Where a constant below is called an estimate, nobody has measured it for this project: the predictions say so by their wide
interval, and `lm-train calibrate` replaces them.
"""

from __future__ import annotations

from lm_train.clusters.types import Cluster, Device, Link
from lm_train.plan.layout import Layout
from lm_train.plan.rates.base import Collective, Loop, Rates, StrategyCost
from lm_train.plan.work import Op
from lm_train.recipe import AnyOptim

KERNEL_SECONDS = 3e-6
"""Of the device, besides a kernel's work: start and drain. Estimate; it makes small products slow, as they are."""
CPU_OP_SECONDS = 6e-6
"""Of the host, for one operation of torch on a CPU with its share of autograd. Estimate."""
GPU_LAUNCHES = {
    "matmul": (1, 1),
    "attention": (2, 4),
    "convolution": (2, 2),
    "recurrent": (4, 4),
    "normalisation": (1, 2),
    "activation": (1, 1),
    "elementwise": (1, 1),
    "reduction": (1, 1),
    "lookup": (1, 3),
    "loss": (2, 2),
    "copy": (1, 1),
}
"""Kernels of an operation in the forward and in the backward pass. Estimate from traces of eager torch."""
EAGER_FACTOR = 2.0
"""Host time of an operation of eager torch over that of a bare launch: Python, dispatcher, autograd. Estimate."""
ATTENTION_OF_PEAK = {True: (0.35, 0.30), False: (0.60, 0.50)}
"""Share of the 16-bit peak that torch's attention reaches, forward and backward, by whether the device is a Hopper or newer.

FlashAttention-2 reaches up to 73% and 63% on an A100 (Dao 2023, arXiv:2307.08691, section 4.1), and 35% forward on an H100
(Shah et al. 2024, arXiv:2407.08608, section 1); head size and causal masks take some of it."""
CAUSAL = 0.55
"""Of a full attention's work that a causal one does: half, and the blocks on the diagonal whole. Estimate."""
CONVOLUTION_OF_ACHIEVABLE = 0.5
RECURRENT_OF_ACHIEVABLE = 0.3
RECURRENT_STEP_SECONDS = {"gpu": 8e-6, "cpu": 12e-6}
"""Of one time step of one layer, whose products wait for the step before. Estimates, as the two shares above."""
LOOKUP_BACKWARD = 2.0
"""Gradients of an embedding are added at scattered places: so many times a plain pass. Estimate."""
MAKING = {"token": 20e-9, "value": 2e-9}
"""Core seconds until one token of running text, or one value of an augmented image, is in a batch: rounded up from
`lm-train calibrate` and `benchmarks/step_time.py making` on two cores of an AMD EPYC."""
LINK_SHARE = 0.9
"""Of a link's bandwidth, which is without the protocol's overhead already, that large collectives reach. Estimate: 8 A100
show 200 to 230 GB/s of 240 (github.com/NVIDIA/nccl-tests/issues/149 and 178)."""
LINK_STEP_SECONDS = 2e-6
"""A hop's own time in a collective, besides the link's latency. Estimate."""
HOST_BANDWIDTH = 100e9
"""Bytes/s of a node's own memory beside its GPUs. Estimate: eight channels of DDR4-3200 are 205 GB/s."""
CHECKSUM_BANDWIDTH = 0.8e9
"""Bytes/s of BLAKE2b on one core. Estimate."""
STRATEGY_COST = {
    "ddp": StrategyCost(200e-6, 5e-6),
    "fsdp": StrategyCost(500e-6, 300e-6),
    "zero1": StrategyCost(2e-3, 20e-6),
    "zero2": StrategyCost(2e-3, 20e-6),
    "zero3": StrategyCost(2e-3, 200e-6),
    "zero3_offload": StrategyCost(2e-3, 250e-6),
}
"""Estimates."""
COMPILED = 0.5
"""Traffic and launches of what torch.compile fuses, over those of eager torch. Estimate: nanoGPT reports 250 and 135 ms a step
without and with it (github.com/karpathy/nanoGPT, README)."""
FUSED = ("normalisation", "activation", "elementwise", "reduction", "loss", "copy")

UPDATE_PASSES = {"adamw": 7, "adam": 7, "sgd": 5, "adagrad": 5, "rmsprop": 5, "muon": 7}
"""Values read and written for each parameter by one fused kernel: parameter, gradient, state; and back what changes."""
UNFUSED_PASSES = {"adamw": 20, "adam": 20, "sgd": 8, "adagrad": 13, "rmsprop": 13, "muon": 20}
"""The same where every term of the update is an operation of its own: a CPU, and GPUs where torch has no fused kernel."""


class FactRates(Rates):
    """From the figures of a cluster's description."""

    def __init__(self, cluster: Cluster, layout: Layout) -> None:
        device = cluster.device
        self.cluster, self.layout = cluster, layout
        self.on_gpu = device.accelerator == "gpu"
        self.asynchronous = self.on_gpu
        self.source = f"{device.name}: {'data sheets' if device.known else 'conservative guesses, for nobody knows it'}"
        self.relative_error = (0.25, 0.4) if device.known and self.on_gpu else (0.5, 1.0)
        if layout.compile:
            self.relative_error = (max(0.35, self.relative_error[0]), max(0.5, self.relative_error[1]))
        self.overlap, self.interference = (0.9, 0.1) if self.on_gpu else (0.0, 0.0)
        # seen in benchmarks/step_overhead.py: lm_train's step is 0.9 ms above a bare loop's on one core
        self.loop = Loop(step=0.6e-3, micro_batch=0.4e-3, row=2e-3)
        self.making = MAKING
        self._share = 1.0 if self.on_gpu else _share_of_node(cluster, layout)
        self._bandwidth = device.memory_bandwidth * device.achievable_bandwidth
        if not self.on_gpu:
            self._bandwidth *= cluster.devices_per_node / max(cluster.devices_per_node, layout.devices)

    def device(self, op: Op) -> float:
        computing = self._computing(op)
        moving = op.bytes / self._bandwidth * self._traffic(op)
        if not self.on_gpu:
            kernels = 1.0
            return max(computing, moving) + kernels * CPU_OP_SECONDS
        return max(computing, moving) + KERNEL_SECONDS * self._fusion(op)

    def launch(self, op: Op) -> float:
        if not self.on_gpu:
            return 0.0
        kernels = GPU_LAUNCHES[op.kind][op.backward]
        return kernels * self._fusion(op) * EAGER_FACTOR * self.cluster.device.launch_seconds

    def stream(self, size: float) -> float:
        return size / self._bandwidth

    def update(self, optim: AnyOptim, sizes: tuple[tuple[int, int], ...], width: int, on_host: bool = False) -> float:
        elements = sum(size * number for size, number in sizes)
        if on_host:
            moved = UNFUSED_PASSES[optim.kind] * 4 * elements
            return moved / (HOST_BANDWIDTH / self.layout.devices)
        # fp16's gradient scaler cannot clip for a fused kernel; see modules/base.py
        fused = self.on_gpu and self.layout.precision != "16-mixed" and optim.kind in ("adamw", "adam", "sgd", "muon")
        passes = (UPDATE_PASSES if fused else UNFUSED_PASSES)[optim.kind]
        seconds = passes * width * elements / self._bandwidth
        if not self.on_gpu:
            seconds += sum(number for _, number in sizes) * passes / 2 * CPU_OP_SECONDS
        return seconds

    def norm(self, sizes: tuple[tuple[int, int], ...], width: int, clips: bool) -> float:
        elements = sum(size * number for size, number in sizes)
        seconds = (3 if clips else 1) * width * elements / self._bandwidth
        if not self.on_gpu:
            seconds += sum(number for _, number in sizes) * (2 if clips else 1) * CPU_OP_SECONDS
        return seconds

    def collective(self, kind: Collective, size: float) -> float:
        """Ring inside the node, then a ring of the ranks of equal number over the nodes; the slower of the two sets the pace.

        Volumes and steps of a ring as in NVIDIA's nccl-tests (PERFORMANCE.md): 2 (n - 1) / n of the size for an all-reduce,
        half of it for the others.
        """
        passes = 2 if kind == "all_reduce" else 1
        local, nodes = self.layout.devices, self.layout.nodes
        inside = _ring(self.cluster.intra_node, local, size, passes)
        if nodes == 1:
            return sum(inside)
        across = _ring(self.cluster.inter_node or self.cluster.intra_node, nodes, size / local, passes)
        return max(inside[0], across[0]) + inside[1] + across[1]

    def offload(self, size: float) -> float:
        return size / (self.cluster.device.host_bandwidth if self.on_gpu else self._bandwidth)

    def strategy(self, name: str) -> StrategyCost:
        return STRATEGY_COST.get(name, StrategyCost(0.0, 0.0))

    def written(self, size: float) -> float:
        return size / self.cluster.disk_bandwidth + size / self.layout.devices / CHECKSUM_BANDWIDTH

    def _computing(self, op: Op) -> float:
        if op.flops == 0:
            return 0.0
        kind = op.kind
        peak, achievable = _peak(self.cluster.device, op.number, self.layout)
        rate = peak * achievable * self._share
        if kind == "attention" and self.on_gpu and op.number != "fp32":
            capability = self.cluster.device.compute_capability
            rate = peak * ATTENTION_OF_PEAK[capability is None or capability >= (9, 0)][op.backward]
        elif kind in ("attention", "convolution"):
            rate *= CONVOLUTION_OF_ACHIEVABLE
        elif kind == "recurrent":
            steps = op.shape[1] if len(op.shape) > 1 else 1
            waiting = steps * RECURRENT_STEP_SECONDS[self.cluster.device.accelerator]
            return max(op.flops / (rate * RECURRENT_OF_ACHIEVABLE), waiting)
        return op.flops * (CAUSAL if kind == "attention" and op.name.endswith("causal") else 1.0) / rate

    def _traffic(self, op: Op) -> float:
        return LOOKUP_BACKWARD if op.kind == "lookup" and op.backward else self._fusion(op)

    def _fusion(self, op: Op) -> float:
        return COMPILED if self.layout.compile and op.kind in FUSED else 1.0


def _share_of_node(cluster: Cluster, layout: Layout) -> float:
    """Of the description's device that one CPU process has: its threads over the cores behind a device."""
    cores = max(1.0, cluster.cpu_cores_per_node / cluster.devices_per_node)
    available = cluster.cpu_cores_per_node / layout.devices
    return max(1e-3, min(layout.threads_per_rank, available) / cores)


def _peak(device: Device, number: str, layout: Layout) -> tuple[float, float]:
    """FLOP/s by the data sheet, and the share that large products reach, of the type in which they are done.

    Products of fp32 values run as TF32 where precision is mixed anyway (`set_float32_matmul_precision`); what a device has
    no figure for runs as the next wider type that it has.
    """
    wider = {"bf16": ("bf16", "fp16", "tf32", "fp32"), "fp16": ("fp16", "bf16", "tf32", "fp32")}
    plain = ("fp32", "tf32", "bf16") if layout.precision == "32-true" else ("tf32", "fp32", "bf16")
    for name in wider.get(number, plain):
        if name in device.peak_flops:
            return device.peak_flops[name], device.achievable.get(name, 0.6)  # type: ignore[index, call-overload]
    raise AssertionError(f"{device.name} has no peak FLOP/s")


def _ring(link: Link, ranks: int, size: float, passes: int) -> tuple[float, float]:
    """Seconds of the bytes, and of the hops."""
    if ranks == 1:
        return 0.0, 0.0
    moving = passes * (ranks - 1) / ranks * size / (link.bandwidth * LINK_SHARE)
    return moving, passes * (ranks - 1) * (link.latency_seconds + LINK_STEP_SECONDS)
