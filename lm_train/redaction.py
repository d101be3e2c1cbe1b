"""What must reach neither a file nor the screen: passwords in URLs, secret environment values, tokens known by their look."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
SHORTEST = 8
"""Characters of an environment value from which on it is looked for: a shorter one stands in ordinary text by accident."""

_USER_INFO = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^/\s:@'\"<>]+:(?!\d+/)[^\s'\"<>]*|[^/\s'\"<>]*)@")
"""Also where a password holds @ or / as it stands, which a URL should not."""
_SIGNED = re.compile(
    r"([?&;][\w.-]*(?:token|sig|signature|api_?key|access_?key|secret|passw\w*|credential|auth)=)[^&\s#'\"<>]+", re.I
)
"""Parts of a URL's query that let whoever has it in."""
_LOOKS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|(?:sk|rk)-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|xox[abeprs]-[\w-]{10,}|A[KS]IA[0-9A-Z]{16}|AIza[\w-]{35}|wandb_v1_\w{20,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----|.*)",
    re.S,
)
"""Tokens of Hugging Face, OpenAI and others, GitHub, GitLab, Slack, AWS, Google, W&B; JSON web tokens; private keys."""
_SECRET_NAME = re.compile(
    r"(?:^|[_.-])(?:api_?key|access_?key|secret_?key|private_?key|(?:api|auth|access|refresh|bearer|hub|hf)_?token|secret"
    r"|password|passwd|passphrase|passcode)$",
    re.I,
)
"""Names under which only a secret is given. `cls_token`, `n_tokens`, `key_dim`, `tokenizer` are none."""
_SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:\w*key|\w*token|jwt|credentials?|connection_string)$|secret|passw|passphrase", re.I
)
_ORDINARY = re.compile(r"[a-z_-]{1,15}|[~.]?/.*", re.I | re.S)
"""A word such as `disabled`, or the path of a file that has the secret."""


def redacted(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text with `***` for every secret in it that is known by its place, its look or the environment."""
    for value in _secret_values(environ):
        text = text.replace(value, HIDDEN)
    text = _LOOKS.sub(HIDDEN, text)
    if "://" in text:
        text = _SIGNED.sub(rf"\1{HIDDEN}", _USER_INFO.sub(rf"\1{HIDDEN}@", text))
    return text


def redacted_values(values: Any, environ: Mapping[str, str] = os.environ) -> Any:
    """The same of every text in a JSON value; under a name that only secrets have nothing is left."""
    if isinstance(values, Mapping):
        return {
            redacted(str(key), environ): HIDDEN if _secret_under(key, part) else redacted_values(part, environ)
            for key, part in values.items()
        }
    if isinstance(values, list | tuple):
        return [redacted_values(part, environ) for part in values]
    return redacted(values, environ) if isinstance(values, str) else values


def secrets_in(
    values: Any, path: tuple[str, ...] = (), environ: Mapping[str, str] = os.environ
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Where a secret stands in what a person wrote: the keys that lead there, and what gives it away."""
    if isinstance(values, Mapping):
        for key, part in values.items():
            if len(path) > 1 and _secret_under(key, part):  # above, a recipe has its own keys only
                yield (*path, str(key)), f"what is given as {key} is a secret by its name"
            else:
                yield from secrets_in(part, (*path, str(key)), environ)
    elif isinstance(values, list | tuple):
        for part in values:
            yield from secrets_in(part, path, environ)
    elif isinstance(values, str):
        name = next((name for name, value in _secret_variables(environ) if value in values), None)
        if name is not None:
            yield path, f"it holds the value of {name}"
        elif _LOOKS.search(values):
            yield path, "it looks like an access token or a key"
        elif redacted(values, {}) != values:
            yield path, "a URL with a password or a signature in it"


def _secret_under(key: Any, value: Any) -> bool:
    return isinstance(value, str) and bool(value) and _SECRET_NAME.search(str(key)) is not None


def _secret_variables(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name, value in environ.items():
        if len(value) >= SHORTEST and _SECRET_VARIABLE.search(name) and not _ORDINARY.fullmatch(value):
            yield name, value


def _secret_values(environ: Mapping[str, str]) -> list[str]:
    """Longest first: one may hold another."""
    return sorted({value for _, value in _secret_variables(environ)}, key=len, reverse=True)
