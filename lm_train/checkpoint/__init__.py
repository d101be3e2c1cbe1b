"""One checkpoint format for every strategy: `views_of` a training, `save` them, `CheckpointReader.load` into others."""

from lm_train.checkpoint.agreement import Group, group_of_all
from lm_train.checkpoint.initial import set_initial_weights
from lm_train.checkpoint.opening import open_agreed
from lm_train.checkpoint.randomness import RandomState, seed_random, set_random_state
from lm_train.checkpoint.reader import CheckpointReader
from lm_train.checkpoint.saving import Published, save, write
from lm_train.checkpoint.snapshot import HostMemory, Snapshot
from lm_train.checkpoint.views import View, Views, views_of
from lm_train.checkpoint.writer import Writer

__all__ = [
    "CheckpointReader",
    "Group",
    "HostMemory",
    "Published",
    "RandomState",
    "Snapshot",
    "View",
    "Views",
    "Writer",
    "group_of_all",
    "open_agreed",
    "save",
    "seed_random",
    "set_initial_weights",
    "set_random_state",
    "views_of",
    "write",
]
