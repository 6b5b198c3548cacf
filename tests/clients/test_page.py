"""The examples of docs/clients.md, run as they stand there, get what a plain HTTP request gets."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from finetune.tiny.problems import exam, grade
from tests.server.conftest import Served, before, serving

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "clients.md").read_text()
MANUAL = "http://127.0.0.1:8000"
"""Where the page's server is."""
OURS = Path(sys.executable).parent
THEIRS = ROOT / ".venv-clients"
OFFLINE = {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
apart = pytest.mark.skipif(
    not (THEIRS / "complete").exists(), reason="needs .venv-clients: make clients"
)


def example(title: str, language: str = "python") -> str:
    """The code of a section."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    [code] = re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return code


PRESET = yaml.safe_load(example("A preset", "yaml"))["presets"]["deep"]
QUESTION = "Tom has 12 apples. Ann gets 4 from him. How many apples does Tom have now?"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's configuration."""
    file = tmp_path_factory.mktemp("clients") / "mull.yaml"
    file.write_text(example("A preset", "yaml"))
    return file


@pytest.fixture(scope="module")
def served(config: Path) -> Iterator[Served]:
    """A server as the page has it."""
    with serving(config.with_name("log"), MULL_CONFIG=str(config)) as served:
        yield served


@pytest.fixture(scope="module", params=["serve", "gateway"])
def plain(request: pytest.FixtureRequest, config: Path, served: Served) -> Iterator[httpx.Client]:
    """Plain HTTP to it, and to a gateway before it."""
    with ExitStack() as stack:
        if request.param == "gateway":
            log = config.with_name("gateway.log")
            served = stack.enter_context(before(log, served.url, MULL_CONFIG=str(config)))
        yield stack.enter_context(httpx.Client(base_url=served.url, timeout=120))


def ask(plain: httpx.Client, question: str = QUESTION, **fields: Any) -> dict[str, Any]:
    asked = {"model": "mull-tiny", "messages": [{"role": "user", "content": question}], "seed": 7}
    asked |= {"strategy": PRESET["strategy"]} | fields
    reply = plain.post("/v1/chat/completions", json=asked)
    assert reply.status_code == 200, reply.text
    assert sum(reply.json()["mull"]["votes"].values()) == 8
    return reply.json()


def run(plain: httpx.Client, code: str, program: Path, folder: Path) -> str:
    """What the code prints."""
    assert MANUAL in code
    done = subprocess.run(
        [program, "-c", code.replace(MANUAL, str(plain.base_url).rstrip("/"))],
        cwd=folder,
        env=os.environ | OFFLINE | {"PATH": f"{THEIRS}/bin:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    ("title", "where"),
    [
        ("OpenAI", OURS),
        pytest.param("LangChain", THEIRS / "bin", marks=apart),
        pytest.param("LiteLLM", THEIRS / "bin", marks=apart),
    ],
)
def test_whole_and_streamed_replies(plain: httpx.Client, tmp_path: Path, title: str, where: Path):
    reply = ask(plain)
    text, tokens = reply["choices"][0]["message"]["content"], reply["usage"]["completion_tokens"]
    assert run(plain, example(title), where / "python", tmp_path) == f"{text} {tokens}\n{text}"


def test_anthropic(served: Served, tmp_path: Path):
    """A gateway refuses `/v1/messages`."""
    with httpx.Client(base_url=served.url) as plain:
        printed = run(plain, example("Anthropic"), OURS / "python", tmp_path)
    *text, votes = printed.splitlines()
    counted = ast.literal_eval(votes)
    assert sum(counted.values()) == 8
    leading = [one for one, count in counted.items() if count == max(counted.values())]
    assert any(f"\\boxed{{{one}}}" in text[-1] for one in leading)


@apart
def test_instructor(plain: httpx.Client, tmp_path: Path):
    apples = {"type": "integer", "minimum": 0, "maximum": 99}
    schema = {"type": "object", "properties": {"apples": apples}, "required": ["apples"]}
    form = {"type": "json_schema", "json_schema": {"name": "Solution", "schema": schema}}
    reply = ask(plain, response_format=form)
    answer = json.loads(reply["choices"][0]["message"]["content"])["apples"]
    printed = run(plain, example("Instructor"), THEIRS / "bin" / "python", tmp_path)
    assert printed == f"{answer} {reply['mull']['votes']}\n"


@apart
def test_lm_eval(plain: httpx.Client, tmp_path: Path):
    items = exam(5, 6, ("word",))
    lines = [json.dumps({"prompt": item.prompt, "answer": item.answer}) for item in items]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    (tmp_path / "mine.yaml").write_text(example("lm-eval", "yaml"))
    run(plain, example("lm-eval", "bash"), Path("/bin/bash"), tmp_path)
    [log] = tmp_path.glob("out/*/samples_mine_*.jsonl")
    logged = sorted(map(json.loads, log.read_text().splitlines()), key=lambda one: one["doc_id"])
    texts = [
        ask(plain, item.prompt, temperature=0.6, max_tokens=300)["choices"][0]["message"]["content"]
        for item in items
    ]
    assert [one["resps"] for one in logged] == [[[text]] for text in texts]
    grades = [grade(item, text) for item, text in zip(items, texts, strict=True)]
    assert [one["exact_match"] for one in logged] == grades
    assert any(grades)


def test_a_client_that_only_lists_models_and_streams(plain: httpx.Client):
    """As Open WebUI does; that itself brings torch and a database, and is too much to install."""
    listed = {one["id"]: one for one in plain.get("/v1/models").json()["data"]}
    assert listed["mull-tiny:deep"]["description"] == PRESET["description"]
    messages = [{"role": "user", "content": QUESTION}]
    asked = {"model": "mull-tiny:deep", "messages": messages, "stream": True, "seed": 7}
    with plain.stream("POST", "/v1/chat/completions", json=asked) as reply:
        events = [line for line in reply.iter_lines() if line and not line.startswith(":")]
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in events[:-1]]
    said = [one["delta"].get("content") or "" for chunk in chunks for one in chunk["choices"]]
    expected = ask(plain)
    assert "".join(said) == expected["choices"][0]["message"]["content"]
    [told] = [chunk["mull"] for chunk in chunks if "mull" in chunk]
    assert told["votes"] == expected["mull"]["votes"]
