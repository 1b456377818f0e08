"""A command that ends says so to an address of the user's; nothing that goes wrong there changes what the command did."""

from __future__ import annotations

import pytest
from support.command import run_cli
from support.pictures import write_store

from tlbatch.cli.notify import form_of, notifying
from tlbatch.errors import ConfigError, LeaseHeldError

REPORT = {
    "run_id": "r",
    "output": "/o",
    "listed": 5,
    "predicted": 4,
    "failed": 1,
    "seconds": 2.0,
    "failed_by_kind": {"empty": 1},
}


def test_the_end_of_a_command_is_posted(receiver, monkeypatch):
    address, posted = receiver
    monkeypatch.setenv("TLBATCH_HOOK", f"{address}/secret-path")
    with notifying("${TLBATCH_HOOK}", "classify", "/o") as tell:
        tell(REPORT, 3)
    assert posted[0]["text"] == "tlbatch: /o: 5 listed, 4 predicted, 1 failed."
    assert (posted[0]["exit_code"], posted[0]["run_id"], posted[0]["failed_by_kind"]) == (3, "r", {"empty": 1})


def test_an_error_is_posted_with_its_exit_code_and_goes_on(receiver):
    address, posted = receiver
    with pytest.raises(LeaseHeldError), notifying(address, "classify", "/o"):
        raise LeaseHeldError("Run x has been working on this output since 2.")
    assert (posted[0]["exit_code"], posted[0]["text"]) == (
        4,
        "tlbatch classify of /o: Run x has been working on this output since 2.",
    )
    with pytest.raises(KeyboardInterrupt), notifying(address, "classify", "/o"):
        raise KeyboardInterrupt
    assert posted[1]["exit_code"] == 4


def test_what_cannot_be_sent_changes_nothing_and_the_address_is_not_logged(receiver, caplog):
    address, _ = receiver
    for where in (f"{address}/broken", "http://127.0.0.1:9/hidden-token"):
        with notifying(where, "classify", "/o") as tell:
            tell(REPORT, 0)
    assert caplog.text.count("could not be sent") == 2
    assert "hidden-token" not in caplog.text


def test_chats_get_the_sentence_as_they_take_it():
    message = {"text": "tlbatch: /a<b>&c: 5 listed.", "exit_code": 0}
    assert form_of("https://hooks.slack.com/services/T/B/x", message) == {"text": "tlbatch: /a&lt;b&gt;&amp;c: 5 listed."}
    discord = form_of("https://discord.com/api/webhooks/1/x", {"text": "@everyone " + "long " * 1_000})
    assert len(discord["content"]) <= 2_000
    assert discord["allowed_mentions"] == {"parse": []}, "a folder's name calls nobody"
    for other in ("https://slack.com.example.org/hook", "https://mattermost.example.org/hooks.slack.com/x"):
        assert form_of(other, message) is message


@pytest.mark.parametrize("url", ["ftp://x", "${NOT_SET_ANYWHERE}", "x"])
def test_an_address_that_is_none_is_a_sentence_before_any_work(url):
    with pytest.raises(ConfigError, match="notify: write an http"), notifying(url, "classify", "/o"):
        raise AssertionError("the work began")


def test_the_commands_themselves(receiver, bundle_url, tmp_path):
    address, posted = receiver
    store = write_store(tmp_path / "store", 2)
    arguments = ["classify", "--images", store, "--bundle", bundle_url, "--output", tmp_path / "out", "--notify", address]
    assert run_cli(*arguments).returncode == 0
    assert posted[-1]["predicted"] == 6
    assert address not in "".join(path.read_text() for path in (tmp_path / "out").rglob("*.json")), "it may be a secret"
    (tmp_path / "out" / "latest.json").write_text("{}")
    assert run_cli(*arguments).returncode == 1
    assert (posted[-1]["exit_code"], "is damaged" in posted[-1]["text"]) == (1, True)
