"""What a classification has learnt, class by class: kept at every evaluation, shown at the end of the run."""

from __future__ import annotations

import json
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.loggers import WandbLogger

from lm_train.data.batches import Split
from lm_train.loop import StepTrainer
from lm_train.metrics import ClassScores
from lm_train.metrics.drawing import draw_confusion
from lm_train.modules import Classification
from lm_train.runs import RunFolder

SPLITS: tuple[Split, ...] = ("val", "test")


class Evaluation(L.Callback):
    """Writes `evaluation/val.json` and `evaluation/test.json` as each evaluation ends; rank 0 only.

    `show` reads these files, so that it also serves a start that finds everything done already. This callback must stand
    before the metrics' own: a validation that is in metrics.jsonl is here, too.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: StepTrainer, pl_module: L.LightningModule) -> None:
        if trainer.stop_code is None:
            self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: StepTrainer, pl_module: L.LightningModule) -> None:
        if trainer.stop_code is None:
            self._write(trainer, pl_module, "test")

    def _write(self, trainer: StepTrainer, module: L.LightningModule, split: Split) -> None:
        if trainer.is_global_zero and isinstance(module, Classification) and module.scores is not None:
            self.folder.evaluation.mkdir(exist_ok=True)
            loss = float(trainer.callback_metrics[f"{split}/loss"])
            module.scores.write(self._file(split), split=split, step=trainer.global_step, loss=loss)

    def _file(self, split: Split) -> Any:
        return self.folder.evaluation / f"{split}.json"

    def show(self, trainer: StepTrainer) -> None:
        """Prints the tables of the last evaluations on standard output, draws them, and gives both to W&B."""
        if not trainer.is_global_zero:
            return
        for split in SPLITS:
            try:
                content = json.loads(self._file(split).read_text(encoding="utf-8"))
            except FileNotFoundError:
                continue
            scores, step = ClassScores.read(content), content["step"]
            head = f"{split} split, {content['samples']:,} samples, step {step:,}, loss {content['loss']:.4f}"
            print(f"--- evaluation: {head} ---\n{scores.text()}\n--- end of evaluation ---", flush=True)
            images = []
            if scores.confusion is not None:
                picture = self.folder.evaluation / f"confusion_{split}.png"
                draw_confusion(scores, picture, f"{self.folder.name}: {split} split, accuracy {scores.accuracy:.2%}")
                images = [str(picture)]
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    columns = ["class", "precision", "recall", "f1", "samples"]
                    logger.log_table(f"{split}/classes", columns, [list(row) for row in scores.rows()], step=step)
                    if images:
                        logger.log_image(f"{split}/confusion", images, step=step)
