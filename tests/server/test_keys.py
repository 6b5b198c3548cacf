"""Keys by their digests, the file that holds them, and what each name may use."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from server import cli
from server.keys import keyring
from server.keys.accounts import Account, Bucket, Tab
from server.keys.keyring import Key, Keyring, changing, digest, make, read
from server.settings import Settings
from strategies.core.errors import Busy, Forbidden, Unauthorized


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def add(file: Path, name: str, **more: object) -> str:
    key = make()
    with changing(file) as keys:
        keys.append(Key.model_validate({"name": name, "digest": digest(key), **more}))
    return key


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def ring(file: Path, **more: object) -> Keyring:
    found = Keyring(file, **more)  # pyright: ignore[reportArgumentType]
    await found.look()
    return found


async def test_a_key_is_accepted_where_each_client_puts_it(file: Path):
    key = add(file, "ann")
    keys = await ring(file)
    for headers in (bearer(key), {"authorization": f"bearer  {key}"}, {"x-api-key": key}):
        assert keys.admit(headers, "client").name == "ann"
    basic = {"authorization": "Basic of-a-proxy", "x-api-key": key}
    assert keys.admit(basic, "client").name == "ann"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer(""),
        bearer("mull-guess"),
        {"authorization": "Bearer"},
        {"x-api-key": ""},
        bearer(digest("")),
        {"x-api-key": "\xff" * 9},
    ],
)
async def test_what_is_no_key_is_refused(file: Path, headers: dict[str, str]):
    add(file, "ann")
    keys = await ring(file)
    with pytest.raises(Unauthorized):
        keys.admit(headers, "client")


async def test_a_digest_is_no_key(file: Path):
    kept = digest(add(file, "ann"))
    keys = await ring(file)
    with pytest.raises(Unauthorized):
        keys.admit(bearer(kept), "client")


async def test_scopes_and_expiry(file: Path):
    client, admin = add(file, "ann"), add(file, "root", scopes=["admin"])
    past = datetime.now(UTC) - timedelta(seconds=1)
    over = add(file, "gone", expires=past.isoformat())
    keys = await ring(file)
    with pytest.raises(Forbidden):
        keys.admit(bearer(client), "admin")
    with pytest.raises(Forbidden):
        keys.admit(bearer(admin), "client")
    assert keys.admit(bearer(client) | {"x-mull-admin-key": admin}, "admin").name == "root"
    with pytest.raises(Unauthorized, match="expired"):
        keys.admit(bearer(over), "client")


async def test_keys_in_words_stand_beside_those_of_the_file(file: Path):
    add(file, "ann")
    keys = await ring(file, admin=SecretStr("an-admin-key"), clients=[SecretStr("plain")])
    assert keys.admit(bearer("an-admin-key"), "admin")
    assert keys.admit(bearer("plain"), "client")
    with pytest.raises(Forbidden):
        keys.admit(bearer("plain"), "admin")
    assert not Keyring(None).administered
    assert not Keyring(None, admin=SecretStr("an-admin-key")).demanded


async def test_keys_rotate_under_load(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keyring, "_STALE_SECONDS", 0)
    old = add(file, "ann")
    keys = await ring(file)
    new = add(file, "ann")
    await keys.look()
    assert keys.admit(bearer(old), "client").name == keys.admit(bearer(new), "client").name
    with changing(file) as known:
        known[:] = [one for one in known if one.digest != digest(old)]
    await keys.look()
    assert keys.admit(bearer(new), "client")
    with pytest.raises(Unauthorized):
        keys.admit(bearer(old), "client")


async def test_a_file_that_breaks_leaves_keys_as_they_were(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(keyring, "_STALE_SECONDS", 0)
    key = add(file, "ann")
    keys = await ring(file)
    file.write_text('{"keys": [{"name": "ann", "digest": "mull-a-secret"}]}')  # noqa: ASYNC240
    for _ in range(3):
        await keys.look()
    file.unlink()  # noqa: ASYNC240
    await keys.look()
    assert keys.admit(bearer(key), "client")
    assert len(caplog.records) == 2  # each change once
    assert "mull-a-secret" not in caplog.text


async def test_a_file_is_looked_at_now_and_then_only(file: Path, monkeypatch: pytest.MonkeyPatch):
    add(file, "ann")
    keys = await ring(file)
    asked: list[Path] = []
    monkeypatch.setattr(Keyring, "_read", lambda self, file: asked.append(file))
    for _ in range(9):
        await keys.look()
    assert asked == []


def test_the_file_never_holds_a_key(file: Path):
    key = add(file, "ann")
    assert key not in file.read_text()
    assert digest(key) in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o640)
    add(file, "ben")
    assert file.stat().st_mode & 0o777 == 0o640
    assert [one.name for one in read(file)] == ["ann", "ben"]
    assert os.listdir(file.parent) == [file.name]
    assert len({make() for _ in range(99)}) == 99


def test_a_server_does_not_start_without_its_keys(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MULL_KEYS", str(file))
    with pytest.raises(ValueError, match=r"MULL_KEYS: .*cannot be read"):
        Settings.read()
    file.write_text('{"keys": [{"name": "ann", "digest": "mull-a-secret"}]}')
    with pytest.raises(ValueError, match=r"MULL_KEYS: .*keys\.0\.digest") as wrong:
        Settings.read()
    assert "mull-a-secret" not in str(wrong.value)


def test_the_command_makes_lists_and_revokes(file: Path, monkeypatch, capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["mull", "keys", "--file", str(file), *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(str(ended.value.code)), out, err

    budgets = ("--requests-per-minute", "9", "--tokens-per-minute", "900", "--concurrent", "3")
    status, key, _ = run("add", "ann", "--scopes", "client", "admin", "--days", "30", *budgets)
    assert (status, key.strip()[:5]) == (0, "mull-")
    [kept] = read(file)
    assert kept.digest == digest(key.strip())
    assert (kept.requests_per_minute, kept.tokens_per_minute, kept.concurrent) == (9, 900, 3)
    assert kept.expires is not None
    assert timedelta(days=29) < kept.expires - datetime.now(UTC) <= timedelta(days=30)
    status, listed, _ = run("list")
    assert (status, kept.id in listed, "900" in listed) == (0, True, True)
    assert key.strip() not in listed
    assert run("add", "ann")[0] == 0
    assert run("revoke", kept.id)[0] == 0
    assert len(read(file)) == 1
    assert run("revoke", "ann")[0] == 0
    assert read(file) == ()
    for wrong in (("revoke", "ann"), ("add", "a b"), ("add", "ann", "--concurrent", "0")):
        status, out, err = run(*wrong)
        assert (status, out, len(err.splitlines())) == (2, "", 1)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(
    per_minute=st.integers(1, 1000),
    waits=st.lists(st.floats(0, 30, allow_nan=False), max_size=60),
)
def test_no_window_has_more_requests_than_a_bucket_and_what_flowed_in(per_minute, waits):
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    taken: list[float] = []
    for seconds in waits:
        clock.now += seconds
        if bucket.wait() == 0:
            bucket.take(1)
            taken.append(clock.now)
    for first, began in enumerate(taken):
        for last in range(first, len(taken)):
            flowed = (taken[last] - began) * per_minute / 60
            assert last - first + 1 <= per_minute + flowed + 1e-3


@given(
    per_minute=st.integers(1, 1000),
    asked=st.lists(st.tuples(st.floats(0, 100), st.integers(0, 5000)), min_size=1, max_size=40),
)
def test_what_is_overdrawn_is_made_good(per_minute, asked):
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    total = last = 0
    for seconds, amount in asked:
        clock.now += seconds
        if (wait := bucket.wait()) == 0:
            bucket.take(amount)
            total, last = total + amount, amount
        else:  # what it says is enough, and less is not
            clock.now += wait / 2
            assert bucket.wait() > 0
            clock.now += wait / 2 + 1e-5
            assert bucket.wait() == 0
        assert total - last <= per_minute * (1 + clock.now / 60) + 1e-3


def key(**budgets: int) -> Key:
    return Key.model_validate({"name": "ann", "digest": "0" * 64, **budgets})


def test_requests_at_once_and_a_minute():
    clock = Clock()
    account = Account(clock)
    held = key(concurrent=2, requests_per_minute=3)
    with (
        account.enter(held),
        account.enter(held),
        pytest.raises(Busy, match="2 requests at once"),
        account.enter(held),
    ):
        pass
    with account.enter(held):
        pass
    with pytest.raises(Busy) as told, account.enter(held):
        pass
    assert told.value.seconds == 20
    clock.now += 20
    with account.enter(held):
        assert account.running == 1
    clock.now += 1
    with account.enter(key(requests_per_minute=60)):  # the file says more now
        pass
    with account.enter(key()):
        assert account.running == 1


def reply(tab: Tab, kind: str, *pieces: bytes) -> None:
    start = {"type": "http.response.start", "headers": [(b"content-type", kind.encode())]}
    for message in (start, *({"type": "http.response.body", "body": one} for one in pieces)):
        tab._read(message)


@pytest.mark.parametrize(
    ("kind", "pieces", "spent"),
    [
        ("application/json", [b'{"usage": {"completion_tokens": 70}}'], 70),
        ("application/json", [b'{"usage":{"output_tokens":7', b"0}}"], 70),
        ("application/json", [b'{"usage":{"completion', b'_tokens":70,"total_tokens":99}}'], 70),
        ("application/json", [rb'{"content": "\"completion_tokens\": 999"}'], 0),
        ("application/json", [b'{"object": "list"}'], 0),
        ("text/event-stream", [b'data: {"a": 1}\n\n'] * 5 + [b"data: [DONE]\n\n"], 5),
        ("text/event-stream", [b"data: {}\n\n"] * 5 + [b'data: {"output_tokens":3}\n\n'], 3),
    ],
)
def test_a_reply_tells_what_it_cost(kind: str, pieces: list[bytes], spent: int):
    clock = Clock()
    account, held = Account(clock), key(tokens_per_minute=60)
    with account.enter(held) as tab:
        reply(tab, kind, *pieces)
    clock.now = max(0.0, spent - 59) - 0.01
    if spent >= 60:
        with pytest.raises(Busy, match="60 generated tokens a minute"), account.enter(held):
            pass
    clock.now += 0.02
    with account.enter(held):
        pass


def test_a_search_is_charged_once_also_when_nobody_listens_any_more():
    clock = Clock()
    account, held = Account(clock), key(tokens_per_minute=60)
    with account.enter(held) as tab:
        tab.search(65)
        reply(tab, "application/json", b'{"usage": {"completion_tokens": 65}}')
    with pytest.raises(Busy) as told, account.enter(held):
        pass
    assert told.value.seconds == 6
    with pytest.raises(ValidationError):
        key(tokens_per_minute=0)
