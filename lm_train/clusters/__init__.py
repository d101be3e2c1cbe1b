"""Descriptions of clusters: shipped ones, the user's own, and what this machine or Slurm reports."""

from lm_train.clusters.types import Cluster, Device, Link, Numbers, Site

__all__ = ["Cluster", "Device", "Link", "Numbers", "Site"]
