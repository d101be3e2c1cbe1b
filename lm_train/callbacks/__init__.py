"""What happens around the steps: stopping, saving, measuring, showing."""

from lm_train.callbacks.anomalies import Anomalies
from lm_train.callbacks.budget import BudgetGuard
from lm_train.callbacks.checkpoints import Checkpoints
from lm_train.callbacks.debugging import DebugChecks
from lm_train.callbacks.evaluation import Evaluation
from lm_train.callbacks.heartbeats import Heartbeats
from lm_train.callbacks.ledger import Ledger
from lm_train.callbacks.metrics import Metrics
from lm_train.callbacks.progress import Progress
from lm_train.callbacks.replicas import Replicas
from lm_train.callbacks.sample import Sample
from lm_train.callbacks.stopping import StopAgreement

__all__ = [
    "Anomalies",
    "BudgetGuard",
    "Checkpoints",
    "DebugChecks",
    "Evaluation",
    "Heartbeats",
    "Ledger",
    "Metrics",
    "Progress",
    "Replicas",
    "Sample",
    "StopAgreement",
]
