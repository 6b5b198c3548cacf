"""Lines for machines: JSON, one for each search, with names and numbers and no words."""

import json
import logging
from collections.abc import Iterator
from io import StringIO
from logging.config import dictConfig

import pytest

from server import logs
from tests.server.test_gateway_fleet import BODY, CHAT, before, upstream


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[StringIO]:
    """What is logged as JSON."""
    monkeypatch.setattr("sys.stderr", said := StringIO())
    logs.begin()
    yield said
    logging.captureWarnings(False)
    quiet = {"handlers": [], "level": "NOTSET", "propagate": True}
    dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "loggers": dict.fromkeys(logs.LINES["loggers"], quiet),
        }
    )


async def test_a_search_is_one_line(heard: StringIO):
    headers = {"X-Request-Id": "mine\nand more", "Authorization": "Bearer sk-secret"}
    async with before([upstream()]) as (client, _):
        body = BODY | {"messages": [{"role": "user", "content": "a secret question"}]}
        reply = await client.post(CHAT, json=body, headers=headers)
        assert reply.status_code == 200, reply.text
    [line] = heard.getvalue().splitlines()
    assert "secret" not in line
    said = json.loads(line)
    assert said["run"] == reply.json()["mull"]["run"]
    assert said["request_id"] == "mine\nand more"
    assert (said["strategy"], said["stopped"], said["tokens"]) == (
        "self_consistency",
        "samples",
        10,
    )
    assert said["seconds"] > 0


def test_a_failure_keeps_to_its_line(heard: StringIO):
    try:
        raise ValueError("what\nhappened")
    except ValueError:
        logging.getLogger("server.any").exception("it %s", "broke")
    logs.announce("ready")
    failed, ready = map(json.loads, heard.getvalue().splitlines())
    assert (failed["levelname"], failed["message"]) == ("ERROR", "it broke")
    assert "ValueError: what\nhappened" in failed["exc_info"]
    assert (ready["levelname"], ready["message"]) == ("INFO", "ready")


async def test_text_says_nothing_of_what_went_well(capsys: pytest.CaptureFixture[str]):
    async with before([upstream()]) as (client, _):
        await client.post(CHAT, json=BODY)
    assert capsys.readouterr().err == ""
    logs.announce("ready")
    assert capsys.readouterr().err == "mull: ready\n"
