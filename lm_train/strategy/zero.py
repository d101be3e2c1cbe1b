"""DeepSpeed's ZeRO stages (Rajbhandari et al. 2020, arXiv:1910.02054) under Lightning, on GPUs and on the CPU.

What is done otherwise than in Lightning 2.6 and DeepSpeed 0.19, and why:
  * Lightning and DeepSpeed both divide the loss by the accumulated micro batches; here Lightning alone does.
  * ZeRO-3 replaces `torch.nn.functional.linear` for the whole process (`memory_efficient_linear`); here it does not.
  * On a CPU DeepSpeed compiles an operation for collectives in shared memory, which serves inference only: it is left
    out, so that no compiler is needed.
  * Initial weights are drawn in fp32, also where parameters are kept in 16 bits, and under stage 3 one parameter at a time.

DeepSpeed 0.19 itself, in the one step of about 1000 in which fp16's loss scale grows, unscales the gradient by the new
scale: that update is half as large and clipped at twice the threshold (read in its source and seen).

DeepSpeed itself reads values on the host in every optimizer step, which waits for the device: five in stages 1 and 2, one
in stage 3 (norm and overflow; counted on the CPU with 0.19.8 in the tests, the same without lm_train).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn

from lm_train.plan import Plan
from lm_train.rendezvous import COLLECTIVE_TIMEOUT
from lm_train.strategy.weights import Weights
from lm_train.strategy.withholding import MADE, NONFINITE, SPIKE, host_value

LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's DynamicLossScaler changes as it goes."""


class _Precision(DeepSpeedPrecision):
    scaler: Any = None
    """DeepSpeed's, under 16-mixed."""

    def state_dict(self) -> dict[str, Any]:
        """Where fp16's loss scale stands; Lightning leaves that to DeepSpeed's own checkpoints."""
        return {} if self.scaler is None else {key: getattr(self.scaler, key) for key in LOSS_SCALE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self.scaler, key, value)

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        model.trainer.model.backward(tensor, *args, scale_wrt_gas=False, **kwargs)


class Zero(DeepSpeedStrategy):
    """ZeRO: optimizer state (1), gradients too (2), parameters too (3) are divided among the ranks.

    `zero3_offload` keeps parameters and optimizer state in host memory between their uses and updates there.
    """

    def __init__(self, plan: Plan, weights: Weights) -> None:
        self.on_cpu = plan.accelerator == "cpu"
        self.weights = weights
        self.low = {"32-true": torch.float32, "16-mixed": torch.float16}.get(plan.precision, torch.bfloat16)
        if self.on_cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is first imported, below
        offload = plan.strategy == "zero3_offload"
        super().__init__(
            stage=int(plan.strategy.removeprefix("zero")[0]),
            offload_optimizer=offload,
            offload_parameters=offload,
            process_group_backend="gloo" if self.on_cpu else "nccl",
            timeout=COLLECTIVE_TIMEOUT,
            precision_plugin=_Precision(plan.precision),
            logging_batch_size_per_gpu=plan.micro_batch_size,
        )
        config: Any = self.config
        config["zero_optimization"]["memory_efficient_linear"] = False
        config["zero_force_ds_cpu_optimizer"] = False  # torch's own, whose state every strategy can read

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)  # without Lightning's demand for CUDA

    def setup_distributed(self) -> None:
        if not self.on_cpu:
            super().setup_distributed()
            return
        # by its full name: the attribute `torch` of deepspeed.comm is torch itself
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        self._init_config_if_needed()
        yield  # without zero.Init, which would draw initial weights in 16 bits; see `shard`

    def shard(self, net: nn.Module) -> None:
        """Stage 3: cuts up a network that was built on the meta device, so that no rank ever holds it whole; one that someone
        else has built is whole, and DeepSpeed cuts it up itself.

        Each full parameter exists for a moment, one at a time, in fp32.
        """
        if not any(parameter.is_meta for parameter in net.parameters()):
            return
        import deepspeed

        with self.weights(net) as fill:
            for prefix, module in net.named_modules():
                own = dict(module.named_parameters(recurse=False))
                for name, parameter in own.items():
                    full = torch.empty(parameter.shape, dtype=torch.float32)
                    fill(f"{prefix}.{name}", full)
                    setattr(module, name, nn.Parameter(full.to(self.low)))
                if own:
                    deepspeed.zero.Init(module=module, config_dict_or_path=self.config)

    def init_deepspeed(self) -> None:
        super().init_deepspeed()
        if not self.optimizers:
            return
        optimizer: Any = self.optimizers[0]
        if self.low == torch.float16:
            self.precision_plugin.scaler = optimizer.loss_scaler
        update = optimizer._optimizer_step
        optimizer._optimizer_step = lambda group: None if self._left_out else update(group)

    _left_out = False

    def leave_out(self, flag: Tensor) -> None:
        """That DeepSpeed is not to make the update of this step if the flag, (), is set."""
        self._left_out = bool(host_value(flag))

    @property
    def withheld(self) -> float:
        """What became of the last update: DeepSpeed itself withholds those of a norm that is not finite."""
        optimizer: Any = self.optimizers[0]
        return NONFINITE if optimizer.overflow else SPIKE if self._left_out else MADE

    def teardown(self) -> None:
        """As Lightning's, but for moving the module to the CPU: what follows works on the parameters that stage 3 holds."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0) if self.on_cpu else super().root_device

    @property
    def grad_norm(self) -> Tensor:
        """Norm of the last step's gradient, before clipping."""
        norm = self.deepspeed_engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.root_device)
