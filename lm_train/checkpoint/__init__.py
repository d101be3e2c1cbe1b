"""One checkpoint format for every strategy: `views_of` a training, `save` them, `CheckpointReader.load` into others."""

from lm_train.checkpoint.format import CheckpointReader, save
from lm_train.checkpoint.initial import set_initial_weights
from lm_train.checkpoint.randomness import random_state, set_random_state
from lm_train.checkpoint.views import View, Views, views_of

__all__ = [
    "CheckpointReader",
    "View",
    "Views",
    "random_state",
    "save",
    "set_initial_weights",
    "set_random_state",
    "views_of",
]
