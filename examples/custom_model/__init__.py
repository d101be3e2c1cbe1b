"""A model of one's own, outside of lm_train: see README.md."""
