"""Train large models on PyTorch Lightning: one recipe, one command, any machine.

Importing the package imports nothing heavy; ``lm_train.recipe`` and ``lm_train.plan`` stay free of torch.
"""

__version__ = "0.1.0"
