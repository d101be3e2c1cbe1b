"""Slurm's commands with answers like real ones, for tests without a cluster."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PARTITIONS = """\
PartitionName=cpu AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED State=UP
PartitionName=gpu AllowGroups=ALL AllowAccounts=ai,bio AllowQos=normal Default=YES MaxNodes=4 MaxTime=2-00:00:00 State=UP
PartitionName=empty AllowAccounts=ALL AllowQos=ALL Default=NO MaxNodes=UNLIMITED MaxTime=01:30:00 State=DOWN
"""
NODES = """\
c1|cpu|64|256000|(null)|idle
c2|cpu|64|256000|(null)|allocated
g1|gpu|128|1000000|gpu:h100:8(S:0-1),nvme:1|mixed
g2|gpu|128|1000000|gpu:h100:8(S:0-1),nvme:1|idle
g3|gpu|128|1000000|gpu:h100:8(S:0-1),nvme:1|drained
g4|gpu|128|1000000|gpu:h100:8(S:0-1),nvme:1|down*
g5|gpu|64|500000|gpu:a100:4|idle
e1|empty|4|8000|(null)|drained
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`sinfo`, `scontrol` and `sbatch` first on PATH; returns their folder. `sbatch` notes its words in `submitted`."""
    folder.mkdir()
    for program, text in (("sinfo", NODES), ("scontrol", PARTITIONS)):
        (folder / program).write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
    (folder / "sbatch").write_text(f"#!/bin/sh\necho \"$@\" >'{folder}/submitted'\necho '4711;test'\n")
    for program in ("sinfo", "scontrol", "sbatch"):
        (folder / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    for name in ("SLURM_JOB_PARTITION", "SLURM_JOB_NUM_NODES", "SBATCH_PARTITION", "SBATCH_ACCOUNT", "SBATCH_QOS"):
        monkeypatch.delenv(name, raising=False)
    return folder
