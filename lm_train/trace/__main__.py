"""`python -m lm_train.trace`: a request as JSON on standard input, one line of JSON for each layout on standard output.

A process of its own, since torch must not come into the planner's, and since a fake kernel may end the process it runs in.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

from lm_train.plan.traced import Request
from lm_train.recipe import load
from lm_train.trace.tracing import reason_of, trace


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the user's code prints is no answer
    warnings.simplefilter("ignore")
    request = Request.model_validate_json(sys.stdin.read())
    recipe = load([f"recipe={Path(request.recipe).resolve()}"])
    for layout, sizes in zip(request.layouts, request.sizes, strict=True):
        try:
            answer = trace(recipe, request.facts, layout, sizes).model_dump_json()
        except Exception as error:
            answer = json.dumps({"reason": reason_of(error)})
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # fakes have nothing to tear down
