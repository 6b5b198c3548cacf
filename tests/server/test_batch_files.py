"""The files of a batch, and what a batch asks: no engine is needed for these."""

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers

from server.batch.asked import read
from server.batch.file import Output, Spent, Unusable, rows
from server.calibration.shelf import Shelf
from server.settings import Settings
from strategies.best_of_n import BestOfN
from strategies.core.budget import Limits
from strategies.core.errors import InvalidRequest


class Chat:
    fields = frozenset({"messages", "model", "max_tokens", "n", "stream", "store", "seed"})

    def read(self, body: dict[str, Any]) -> object:
        return body


def asked(settings: Settings | None = None, kind: str = "compute_optimal", **more: Any):
    turns = [{"role": "user", "content": "1 + 1?"}]
    fields = {
        "model": "m",
        "requests": [{"custom_id": str(at), "body": {"messages": turns}} for at in range(4)],
        "budget": {"tokens": 403},
    }
    return read(
        kind,
        fields | more,
        models={"m"},
        headers=Headers({}),
        settings=settings or Settings(),
        shelf=Shelf(None),
        chat=Chat(),
    )


def test_without_a_calibration_the_split_is_equal_and_marginal_is_refused():
    found = asked()
    assert found.allocation == "equal"
    assert found.share == Limits(tokens=100)
    with pytest.raises(InvalidRequest, match="calibration") as refused:
        asked(allocation="marginal")
    assert refused.value.field == "allocation"


def test_any_strategy_has_its_fields_and_an_equal_split():
    found = asked(kind="best_of_n", n=5)
    assert found.allocation == "equal"
    assert found.lines[0].selection.strategy == BestOfN(n=5)
    with pytest.raises(InvalidRequest, match="compute_optimal can"):
        asked(kind="best_of_n", allocation="marginal")
    with pytest.raises(InvalidRequest, match="of best_of_n nor") as refused:
        asked(kind="best_of_n", target_confidence=0.9)
    assert refused.value.field == "target_confidence"
    with pytest.raises(InvalidRequest, match="best_of_n") as refused:
        asked(kind="best_of_m")
    assert refused.value.field == "kind"


def test_the_operators_limits_hold_for_so_many_requests():
    found = asked(Settings(limits=Limits(tokens=50, samples=4, seconds=2)))
    assert found.limits == Limits(tokens=200, samples=16, seconds=8)


def test_a_line_overrides_what_is_said_for_all():
    turns = [{"role": "user", "content": "1 + 1?"}]
    requests = [
        {"custom_id": "a", "body": {"messages": turns, "max_tokens": 7}},
        {"custom_id": "b", "body": {"messages": turns}},
    ]
    found = asked(requests=requests, max_tokens=9, n=16)
    assert [line.body["max_tokens"] for line in found.lines] == [7, 9]
    assert "n" not in found.lines[0].body  # the strategy's own
    assert found.lines[0].selection.strategy.most() == 16


ASKED = {"model": "m"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "1 + 1?"}\n')
    return file


def account(tokens: int, leased: int = 0) -> dict[str, Any]:
    return {"spent": {"tokens": tokens, "samples": 2}, "leased": leased}


def test_an_output_goes_on_without_its_torn_line(source: Path, tmp_path: Path):
    file = tmp_path / "out.jsonl"
    with Output(file, source=source, asked=ASKED) as output:
        output.write({"custom_id": "a", "x": "é"})
        output.begin("one", {})
        output.tell("one", account(70, 30), over=False)
    for torn, where in (('{"custom_id": "b", "x": "', file), ('{"stretch": "on', output.journal)):
        with where.open("a") as opened:
            opened.write(torn)
    with Output(file, source=source, asked=ASKED) as output:
        assert output.done == {"a"}
        assert output.open == ["one"]
        assert output.spent == Spent(tokens=100, samples=2)  # the worst that may have happened
        output.tell("one", account(80), over=True)
        output.write({"custom_id": "b"})
        assert output.spent == Spent(tokens=80, samples=2)
    assert [json.loads(line)["custom_id"] for line in file.read_text().splitlines()] == ["a", "b"]


def test_what_nobody_knows_any_more_counts_as_spent(source: Path, tmp_path: Path):
    with Output(tmp_path / "out.jsonl", source=source, asked=ASKED) as output:
        output.begin("one", {})
        output.tell("one", account(70, 30), over=False)
        output.lost("one")
        assert output.open == []
        assert output.spent.tokens == 100


def test_an_output_of_something_else_is_left_alone(source: Path, tmp_path: Path):
    file = tmp_path / "out.jsonl"
    with Output(file, source=source, asked=ASKED) as output:
        with pytest.raises(Unusable, match="another run"):
            Output(file, source=source, asked=ASKED)
        output.write({"custom_id": "a"})
    with pytest.raises(Unusable, match="begun with model"):
        Output(file, source=source, asked={"model": "other"})
    source.write_text('{"prompt": "2 + 2?"}\n')
    with pytest.raises(Unusable, match="another input"):
        Output(file, source=source, asked=ASKED)
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text('{"custom_id": "a"}\n')
    with pytest.raises(Unusable, match="no journal"):
        Output(foreign, source=source, asked=ASKED)
    assert foreign.read_text() == '{"custom_id": "a"}\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no prompt"),
        ("[1]", ":1: this is no JSON object"),
        ('{"prompt": "a"}\n{"promt": "b"}', ":2: a line has"),
        ('{"custom_id": "a", "url": "/v1/embeddings", "body": {}}', "chat"),
        ('{"id": 1, "prompt": "a"}\n{"id": "1", "prompt": "b"}', "twice"),
    ],
)
def test_wrong_input_is_refused_by_line(tmp_path: Path, text: str, says: str):
    file = tmp_path / "in.jsonl"
    file.write_text(text)
    with pytest.raises(Unusable, match=says):
        rows(file)
