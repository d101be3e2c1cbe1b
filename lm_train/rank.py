"""Entry point of one rank: `python -m lm_train.rank RUN_FOLDER [CHECKPOINT]`, started by the supervisor.

Signals only set a flag from here on; an error becomes a file in the run folder, which the supervisor reads, so that a
person sees one message and not one a rank.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from lm_train import heartbeat, signals
from lm_train.errors import ExitCode, LMTrainError, RollBack, StopRequested
from lm_train.output import outlive_readers
from lm_train.redaction import redacted
from lm_train.runs import RunFolder, write_atomically


def main() -> int:
    signals.die_with_parent()
    signals.listen()
    heartbeat.join()
    outlive_readers()
    folder = RunFolder(sys.argv[1])
    checkpoint = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    try:
        from lm_train.train import train  # torch and lightning take seconds: after the signal handlers

        return train(folder, checkpoint)
    except StopRequested as stop:
        return signals.OUTSIDE_THE_LOOP + stop.exit_code
    except RollBack:
        return signals.ROLL_BACK
    except LMTrainError as error:
        _report(folder, str(error), error.exit_code)
        # a process that ends with the code of an agreed stop has not failed
        return error.exit_code if error.exit_code != ExitCode.REQUEUE else ExitCode.BUG
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        code = _code_of(error, folder)
        _report(folder, f"{place}{error.strerror or error}", code)
        return code
    except BaseException as error:
        _report(folder, f"{type(error).__name__}: {error}", ExitCode.BUG)
        return ExitCode.BUG


def _code_of(error: OSError, folder: RunFolder) -> ExitCode:
    """A full or read-only disk, or what this user may not write in the run folder, may not read elsewhere."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return ExitCode.CANNOT_WRITE
    if error.errno in (errno.EACCES, errno.EPERM):
        inside = str(error.filename).startswith(str(folder.root))
        return ExitCode.CANNOT_WRITE if inside else ExitCode.BAD_DATA
    return ExitCode.BUG


def _report(folder: RunFolder, message: str, code: int) -> None:
    rank = os.environ.get("RANK", "0")
    content: dict[str, Any] = {
        "rank": int(rank),
        "exit_code": int(code),
        "message": redacted(message),
        **heartbeat.here(),
        "traceback": redacted(traceback.format_exc()),
    }
    try:
        (folder.errors / f"rank-{rank}.traceback").write_text(content["traceback"], encoding="utf-8")
        write_atomically(folder.errors / f"rank-{rank}.json", json.dumps(content))
    except OSError:  # a full disk is often the very error
        print(f"lm-train: rank {rank}: {redacted(message)}", file=sys.stderr)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # a rank that failed may share a process group with one that waits in a collective: leave without its teardown
    os._exit(code)
