"""Descriptions of clusters: shipped ones, the user's own, and what this machine or Slurm reports."""

from lm_train.clusters.descriptions import cluster_named, device_named, shipped_clusters, shipped_devices
from lm_train.clusters.devices import device_of, peak_flops
from lm_train.clusters.find import check_here, find
from lm_train.clusters.machine import this_cluster
from lm_train.clusters.types import Cluster, Device, Link, Numbers, Site

__all__ = [
    "Cluster",
    "Device",
    "Link",
    "Numbers",
    "Site",
    "check_here",
    "cluster_named",
    "device_named",
    "device_of",
    "find",
    "peak_flops",
    "shipped_clusters",
    "shipped_devices",
    "this_cluster",
]
