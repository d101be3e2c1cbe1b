"""Secrets are known by their place, their look and the environment, and ordinary words are not taken for them."""

from __future__ import annotations

import pytest

from lm_train.errors import UsageError
from lm_train.recipe import load
from lm_train.redaction import redacted, redacted_values, secrets_in

ENVIRONMENT = {
    "WANDB_API_KEY": "0123456789abcdef",
    "DB_PASSWORD": "correct horse",
    "TOKENIZERS_PARALLELISM": "not-a-secret-1",
    "SSH_KEY": "/home/me/.ssh/id_1",
    "HF_TOKEN": "disabled",
    "MY_TOKEN": "short1",
}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/x", "https://***@host/x"),
        ("to s3://me:p@ss/w0rd@bucket/x failed", "to s3://***@bucket/x failed"),
        ("https://token@host", "https://***@host"),
        ("proxy 'http://me:pw@proxy:3128'", "proxy 'http://***@proxy:3128'"),
        ("https://h/p?X-Amz-Signature=ab12&part=1", "https://h/p?X-Amz-Signature=***&part=1"),
        ("https://h/p?a=1&access_token=ab12#x", "https://h/p?a=1&access_token=***#x"),
        ("key 0123456789abcdef.", "key ***."),
        ("say correct horse", "say ***"),
        (f"hf_{'aB3' * 12}", "***"),
        (f"bad: ghp_{'aB3' * 12}", "bad: ***"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nrest", "***\nrest"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3.c2lnbmF0dXJl", "***"),
    ],
)
def test_hidden(text: str, shown: str) -> None:
    assert redacted(text, ENVIRONMENT) == shown


@pytest.mark.parametrize(
    "text",
    [
        "git@github.com:owner/name",
        "https://host:8080/a@b",
        "runs/gpt_debug-1/checkpoints/step-100",
        "not-a-secret-1",
        "/home/me/.ssh/id_1",
        "disabled",
        "short1",
        "https://h/p?tokenizer=bytes&key=value",
        "3f786850e387550fdab836ed7e6dc881de23001b",
        "hf_hub/sk-learn",
    ],
)
def test_shown_as_it_is(text: str) -> None:
    assert redacted(text, ENVIRONMENT) == text


def test_values_all_the_way_down() -> None:
    values = {"a": ["https://u:p@h", 3, None], "b": {"api_key": "x", "cls_token": "[CLS]"}, "c": ("correct horse",)}
    hidden = {"a": ["https://***@h", 3, None], "b": {"api_key": "***", "cls_token": "[CLS]"}, "c": ["***"]}
    assert redacted_values(values, ENVIRONMENT) == hidden


def test_ordinary_arguments_are_no_secrets() -> None:
    args = {
        "use_cls_token": True,
        "cls_token": "[CLS]",
        "pad_token": "<pad>",
        "tokenizer": "bytes",
        "n_tokens": 4,
        "key_dim": 64,
        "key": "value",
        "token_dropout": 0.1,
        "secret_sauce": "mayonnaise",
        "revision": "3f786850e387550fdab836ed7e6dc881de23001b",
        "passwords": 3,
    }
    assert list(secrets_in({"model": {"args": args}, "name": "password-lstm"}, environ=ENVIRONMENT)) == []


@pytest.mark.parametrize(
    ("word", "canary", "says"),
    [
        ("data.path=https://me:canary71@host/x.txt", "canary71", "data.path: a URL with a password"),
        ("data.path=s3://b/x?sig=canary72", "canary72", "data.path: a URL with a password or a signature"),
        (f"tracking.group=hf_{'canary73' * 5}", "canary73", "tracking.group: it looks like an access token"),
        (
            "tracking.tags=[a, canary74-of-the-environment]",
            "canary74",
            "tracking.tags: it holds the value of MY_API_KEY",
        ),
        (
            "model={kind: custom, factory: 'a:b', args: {password: canary75}}",
            "canary75",
            "model.args.password: what is given",
        ),
        ("api_key=canary76", "canary76", "api_key: no such key; secrets come from the environment"),
        ("runs_dir=https://me:canary77@host/x", "canary77", "runs_dir: a URL with a password"),
        ("https://me:canary78@host/x", "canary78", "expected key=value"),
    ],
)
def test_a_secret_in_a_recipe_is_refused_and_not_shown(
    word: str, canary: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "canary74-of-the-environment")
    with pytest.raises(UsageError) as refused:
        load(["recipe=gpt_debug", word])
    assert len(refused.value.problems) == 1
    assert says in str(refused.value)
    assert canary not in str(refused.value)
