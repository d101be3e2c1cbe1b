"""What the user asked for: typed, frozen, complete. Free of torch."""

from lm_train.recipe.files import shipped_recipes
from lm_train.recipe.load import dump, load
from lm_train.recipe.sections import (
    GPT,
    AnyData,
    AnyModel,
    AnyOptim,
    CheckpointSection,
    EmbeddedData,
    Llama,
    Recipe,
    TextData,
    TrackingSection,
    TrainerSection,
)

__all__ = [
    "GPT",
    "AnyData",
    "AnyModel",
    "AnyOptim",
    "CheckpointSection",
    "EmbeddedData",
    "Llama",
    "Recipe",
    "TextData",
    "TrackingSection",
    "TrainerSection",
    "dump",
    "load",
    "shipped_recipes",
]
