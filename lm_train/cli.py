"""The verbs of `lm-train`. A verb's module is imported only when that verb is called, so that --help stays fast."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from lm_train import __version__
from lm_train.errors import ExitCode, LMTrainError, UsageError
from lm_train.redaction import redacted

HELP = """\
usage: lm-train VERB [key=value ...]

  train     train a model            lm-train train recipe=gpt_debug trainer.max_steps=200
  plan      how to spend a budget    lm-train plan recipe=gpt_small cluster=h100x8 budget.gpu_hours=40 why=true
  prepare   clean, de-duplicate and tokenise text into shards      lm-train prepare recipe=gpt_debug [out=DIR]
  recipes   list the shipped recipes
  show      print a resolved recipe  lm-train show recipe=gpt_small model.n_layer=4 > mine.yaml
  submit    check a job file against its partition and give it to Slurm      lm-train submit job=job.sbatch
            or write it first, with the words of plan       lm-train submit recipe=gpt_small sbatch=job.sbatch
  doctor    check this machine, each problem with its fix
  checkpoint  what a run has saved: do=list, do=verify (65 if damaged), do=convert to plain safetensors
            lm-train checkpoint do=convert run=runs/RUN [step=N|latest|best] [what=model|optimizer|all] [shards=K] [out=DIR]
  verify-resume  train twice, once with kills, and compare every bit   lm-train verify-resume recipe=gpt_debug kills=3
  calibrate measure this machine, so that plans are made by its own figures    lm-train calibrate [out=FILE] [quick=true]

Words: recipe=NAME|PATH  section.key=value  section=KIND  section={key: value}  name=RUN  runs_dir=DIR  seed=N
       resume=auto|never|PATH  allow_change=[data,model,seed]  debug=true  dry_run=true  plugins=PACKAGE (whose code may run)
       data.folds=K (cross-validation: K runs and their mean; data.fold=I one of them)
Sections: model data prepare optim trainer checkpoint tracking budget cluster; `lm-train show recipe=NAME` prints every key.

Exit codes: 0 done; 2 wrong command; 65 bad checkpoint; 66 bad data; 70 our bug; 73 cannot write; 75 stopped early,
start again; 76 no progress over several starts; 130 Ctrl-C, saved."""

VERB_SYNONYMS = {
    "fit": "train",
    "run": "train",
    "start": "train",
    "list": "recipes",
    "ls": "recipes",
    "tokenize": "prepare",
    "tokenise": "prepare",
    "config": "show",
    "print": "show",
    "check": "doctor",
    "sbatch": "submit",
    "checkpoints": "checkpoint",
    "measure": "calibrate",
    "benchmark": "calibrate",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code; every error ends here, as one message."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(words)
        sys.stdout.flush()  # a reader that has gone shows here, not at the interpreter's exit
        return code
    except UsageError as error:
        for problem in error.problems if _speaks(words) else ():
            print(f"lm-train: {_one_line(redacted(problem))}", file=sys.stderr)
        return error.exit_code
    except LMTrainError as error:
        print(f"lm-train: {redacted(str(error))}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has gone, as in `lm-train show ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.DONE
    except OSError as error:
        if error.filename is None or "debug=true" in words:
            return _our_bug(error, words)
        print(f"lm-train: {redacted(_one_line(str(error.filename)))}: {error.strerror}", file=sys.stderr)
        return ExitCode.CANNOT_WRITE
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except Exception as error:
        return _our_bug(error, words)


def _our_bug(error: Exception, words: list[str]) -> int:
    if "debug=true" in words:
        print(redacted(traceback.format_exc()), end="", file=sys.stderr)
    else:
        said = f"{type(error).__name__}: {redacted(str(error))}"
        print(f"lm-train: {said} (our bug; debug=true shows where)", file=sys.stderr)
    return ExitCode.BUG


def _speaks(words: list[str]) -> bool:
    """Whether a wrong command is this process's to report: all tasks of a Slurm step find the same in it."""
    from lm_train.slurm import current_allocation, speaks

    if words[:1] != ["train"] or speaks():
        return True
    from lm_train.attempt import WRONG_S, goes_on_without

    try:
        allocation = current_allocation()
    except UsageError:
        time.sleep(WRONG_S)
        return False
    return allocation is not None and goes_on_without(words, allocation)


def _one_line(text: str) -> str:
    """The text with line breaks and terminal escapes made visible."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _dispatch(words: list[str]) -> int:
    verbs: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "plan": _plan,
        "prepare": _prepare,
        "recipes": _recipes,
        "show": _show,
        "submit": _submit,
        "doctor": _doctor,
        "calibrate": _calibrate,
        "checkpoint": _checkpoint,
        "verify-resume": _verify_resume,
    }
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, file=sys.stdout if words else sys.stderr)
        return ExitCode.DONE if words else ExitCode.USAGE
    if words[0] in ("-V", "--version"):
        print(f"lm-train {__version__}")
        return ExitCode.DONE
    verb, rest = words[0], words[1:]
    if verb not in verbs:
        from lm_train.recipe.explain import name_of, nearest

        if "=" in verb:
            raise UsageError(f"{verb}: a verb comes first; did you mean lm-train train {verb}?")
        near = VERB_SYNONYMS.get(verb.strip("-").lower()) or nearest(verb, verbs)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(verbs)}"
        raise UsageError(f"{name_of((verb,))}: no such verb; {hint}")
    if any(word in ("-h", "--help") for word in rest):
        print(HELP)
        return ExitCode.DONE
    return verbs[verb](rest)


def _train(words: list[str]) -> int:
    from lm_train.recipe import load

    recipe = load(words)
    unread = next((word for word in words if word.startswith("prepare.")), None)
    if unread is not None and _speaks(["train", *words]):
        print(
            f"lm-train: warning: {_one_line(unread)}: only lm-train prepare reads it; data=shards trains on what that wrote",
            file=sys.stderr,
        )
    if recipe.dry_run:
        from lm_train.dry_run import dry_run

        return dry_run(recipe)
    from lm_train.folds import number_of_folds, train_folds
    from lm_train.launch import train
    from lm_train.output import outlive_readers

    outlive_readers()
    return train(recipe) if number_of_folds(recipe) is None else train_folds(recipe)


def _plan(words: list[str]) -> int:
    from lm_train.planning import plan

    return plan(words)


def _prepare(words: list[str]) -> int:
    from lm_train.prepare.run import prepare

    return prepare(words)


def _recipes(words: list[str]) -> int:
    _no_words("recipes", words)
    from lm_train.recipe import shipped_recipes

    for name, file in shipped_recipes().items():
        head = [
            line.lstrip("# ").rstrip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")
        ]
        print(f"{name:<12} {head[0]}")
    return ExitCode.DONE


def _show(words: list[str]) -> int:
    from lm_train.recipe import dump, load

    print(dump(load(words)), end="")
    return ExitCode.DONE


def _submit(words: list[str]) -> int:
    from lm_train.submit import file_of, submit

    written = next((word.removeprefix("sbatch=") for word in words if word.startswith("sbatch=")), None)
    if written is None:
        return submit(file_of(words))
    return _plan(words) or submit(Path(written))


def _doctor(words: list[str]) -> int:
    _no_words("doctor", words)
    from lm_train.doctor import examine

    return examine()


def _calibrate(words: list[str]) -> int:
    from lm_train.calibrate.run import calibrate

    return calibrate(words)


def _checkpoint(words: list[str]) -> int:
    from lm_train.inspection import inspect

    return inspect(words)


def _verify_resume(words: list[str]) -> int:
    from lm_train.verify_resume import verify_resume

    return verify_resume(words)


def _no_words(verb: str, words: list[str]) -> None:
    if words:
        raise UsageError(f"{' '.join(words)}: lm-train {verb} takes no words")
