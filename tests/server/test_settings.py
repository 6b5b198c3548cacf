"""What an operator may set, and how what is wrong is named."""

from pathlib import Path

import pytest

from server.settings import Settings


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def reading(text: str) -> Settings:
        file = tmp_path / "mull.yaml"
        file.write_text(text)
        monkeypatch.setenv("MULL_CONFIG", str(file))
        return Settings.read()

    return reading


def test_an_empty_file_is_the_defaults(read):
    assert read("") == Settings()


def test_the_file_sets_everything(read):
    found = read(
        "kept_traces: 3\nlimits: {tokens: 9}\n"
        "presets: {deep: {strategy: {kind: best_of_n, n: 4}, budget: {seconds: 2}}}"
    )
    assert (found.kept_traces, found.limits.tokens) == (3, 9)
    assert found.presets["deep"].strategy.model_dump()["n"] == 4
    assert found.presets["deep"].budget.seconds == 2


def test_the_environment_wins(read, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MULL_KEPT_TRACES", "5")
    assert read("kept_traces: 3").kept_traces == 5
    monkeypatch.setenv("MULL_KEPT_TRACES", "many")
    with pytest.raises(ValueError, match=r"^MULL_KEPT_TRACES: "):
        read("")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("max_bodi: 3", "max_bodi"),
        ("- a", "mapping"),
        ("a: [1", "cannot be read"),
        ("1: 2", "1"),
        ("limits: {dollars: 3}", "limits.dollars"),
        ("heartbeat_seconds: .nan", "heartbeat_seconds"),
        ("presets: {deep: {strategy: {kind: best_off}}}", "presets.deep.strategy"),
        ("presets: {deep: {strategy: {kind: best_of_n, n: 0}}}", "n: "),
        ("presets: {deep: {strategy: {kind: best_of_n, verifier: liklihood}}}", "likelihood"),
        ("presets: {deep: {strategy: {kind: best_of_n}, budget: {tokens: 0}}}", "budget.tokens"),
        ("presets: {best_of_n: {strategy: {kind: best_of_n}}}", "best_of_n"),
        ('presets: {"a:b": {strategy: {kind: best_of_n}}}', "a:b"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(read, text: str, names: str):
    with pytest.raises(ValueError, match="MULL_CONFIG") as wrong:
        read(text)
    assert names in str(wrong.value)
    assert len(str(wrong.value).splitlines()) == 1


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MULL_CONFIG", "/nowhere/mull.yaml")
    with pytest.raises(ValueError, match=r"/nowhere/mull\.yaml"):
        Settings.read()
