"""What lies in a run's `checkpoints` folder: names, checksums, pointers, and the order in which all that is written.

Free of torch: a supervisor looks here before it starts its ranks, and `lm-train checkpoint` needs nothing else.
"""

from lm_train.saved.choice import Choice, newest_good
from lm_train.saved.manifest import FORMAT, Manifest, StoredFile, StoredTensor, open_manifest, read_state, verify
from lm_train.saved.places import BEST, LATEST, checkpoints_in, point, pointed, step_of

__all__ = [
    "BEST",
    "FORMAT",
    "LATEST",
    "Choice",
    "Manifest",
    "StoredFile",
    "StoredTensor",
    "checkpoints_in",
    "newest_good",
    "open_manifest",
    "point",
    "pointed",
    "read_state",
    "step_of",
    "verify",
]
