"""What follows when updates are withheld: they are counted and told, and after several in a row the run goes back."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as L

from lm_train import anomalies
from lm_train.anomalies import AGAIN_STEPS, RollBackRow, Streak
from lm_train.data import DataModule
from lm_train.data.batches import Integers
from lm_train.errors import NoProgressError, OutputError, RollBack
from lm_train.ledger import Row
from lm_train.plan import Plan
from lm_train.recipe import TrainerSection
from lm_train.runs import RunFolder

_NAMED_SAMPLES = 8


class Anomalies(L.Callback):
    """Hears the ledger's rows, which every rank has alike, and so decides alike on every rank.

    `nonfinite_patience` updates in a row withheld for values that are not finite, or `spike_patience` for either reason, end
    the ranks; their supervisor starts them again from the run's newest checkpoint, and the batches of those steps are left
    out from then on. How late the host hears of it does not matter: the steps after them that were made are done again, and
    what is left out are those steps' batches. If it comes again soon after, the run ends.

    Args:
        folder: of the run.
        section: the recipe's trainer section.
        plan: ranks, batch sizes, precision.
        data: prepared; names the samples.
        rollbacks: of the run's earlier starts.
        state: of the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        folder: RunFolder,
        section: TrainerSection,
        plan: Plan,
        data: DataModule,
        rollbacks: Sequence[RollBackRow] = (),
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.file, self.section, self.plan, self.data, self.rollbacks = folder.anomalies, section, plan, data, rollbacks
        state = state or {}
        self.withheld = int(state.get("withheld", 0))
        self.streak = Streak.of(state.get("streak"))
        self._writes = False
        self._has_warned = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._writes = trainer.is_global_zero
        if self._writes:
            anomalies.cut(self.file, trainer.global_step)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"withheld": self.withheld, "streak": None if self.streak is None else self.streak._asdict()}

    def metrics(self) -> dict[str, float]:
        return {"anomalies/withheld": self.withheld} if self.withheld else {}

    def hear(self, rows: Sequence[Row], ranks: Mapping[int, Sequence[int]]) -> None:
        """Takes in finished steps.

        Args:
            rows: of the ledger.
            ranks: whose own loss was not finite, by step.

        Raises:
            RollBack: if the run is to go back.
            NoProgressError: if it has gone back before without getting over it.
        """
        for row in rows:
            if not row.withheld:
                self.streak = None
                continue
            self.withheld += 1
            if self.plan.precision == "16-mixed" and math.isfinite(float.fromhex(row.loss)) and row.withheld != "spike":
                continue  # how the gradient scaler finds its scale
            self._note(row, ranks.get(row.step, ()))
            first, in_all, nonfinite = self.streak or Streak(row.step, 0, 0)
            self.streak = Streak(first, in_all + 1, nonfinite + (row.withheld == "nonfinite"))
            if self.streak.patience_is_over(self.section.nonfinite_patience, self.section.spike_patience):
                self._go_back(row)

    def _note(self, row: Row, ranks: Sequence[int]) -> None:
        if not self._writes:
            return
        samples = self._samples(row.step, ranks)
        listed = None if samples is None else samples.tolist()
        loss, norm = (str(value) if not math.isfinite(value) else value for value in map(float.fromhex, row[2:4]))
        with contextlib.suppress(OutputError):  # a full disk; the ledger says it too
            anomalies.append(
                self.file,
                {
                    "step": row.step,
                    "what": row.withheld,
                    "loss": loss,
                    "grad_norm": norm,
                    "ranks": list(ranks),
                    "samples": listed,
                },
            )
        if self._has_warned:
            return
        self._has_warned = True
        if row.withheld == "spike":
            what = f"the loss, {loss:.6g}, stands out of those before it"
        elif ranks:
            what = f"the loss is not finite on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        else:
            what = "the gradient is not finite"
        names = "unknown" if listed is None else " ".join(f"{e}:{s}" for e, s in listed[:_NAMED_SAMPLES])
        more = " ..." if listed is not None and len(listed) > _NAMED_SAMPLES else ""
        print(
            f"lm-train: warning: step {row.step}: {what}; no rank makes this update. Samples (epoch:id): {names}{more}; this and "
            f"further ones in {self.file}",
            file=sys.stderr,
            flush=True,
        )

    def _samples(self, step: int, ranks: Sequence[int]) -> Integers | None:
        """Epochs and ids of a step's samples, (n, 2); of some ranks alone, where the order is the one they are dealt out in."""
        ids = self.data.sample_ids(step - 1)
        if ids is None or not ranks:
            return ids
        size, world, micros = self.plan.micro_batch_size, self.plan.world_size, self.plan.accumulate_grad_batches
        firsts = [(micro * world + rank) * size for micro in range(micros) for rank in ranks]
        return ids[[first + i for first in firsts for i in range(size)]]

    def _go_back(self, row: Row) -> None:
        assert self.streak is not None
        first, step = self.streak.first, row.step
        which = f"the updates of steps {first} to {step} were withheld ({row.withheld})"
        before = next((r for r in self.rollbacks if r.first <= first <= r.step + AGAIN_STEPS), None)
        if before is not None:
            raise NoProgressError(
                f"{which}, after the run had gone back and left out the data of steps {before.first} to {before.step}: not the "
                f"data's doing. See {self.file}; lower optim.learning_rate or trainer.gradient_clip_val, or go on without such "
                "updates with trainer.nonfinite_patience=null trainer.spike_patience=null"
            )
        positions = self.data.passed(first - 1), self.data.passed(step - 1) + self.plan.global_batch_size
        found = RollBackRow(row.withheld, first, step, (positions,))
        if self._writes:
            anomalies.append(self.file, found.row())
            print(
                f"lm-train: {which}: going back to the newest checkpoint, without the data of these steps",
                file=sys.stderr,
                flush=True,
            )
        raise RollBack(f"{which}: going back")
