"""Adapters on a real engine: taken in, named, moved under load, rolled back, refused."""

import asyncio
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from models import MULL_TINY

ADMIN = {"X-Mull-Admin-Key": "the operator's"}
ASKED = [{"role": "user", "content": "Tom has 12 apples. At the park he finds 7. How many has he?"}]
BODY: dict[str, Any] = {"messages": ASKED, "temperature": 0, "max_tokens": 24}
WRONG = 8
"""Adapters that each say something else."""


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as peft saves them: strong random adapters, so that each can be told by its words."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("imports")
    for seed in range(WRONG):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=8,
            lora_alpha=60,
            target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        model = AutoModelForCausalLM.from_pretrained(MULL_TINY)
        get_peft_model(model, config).save_pretrained(str(root / str(seed)))
    config.init_lora_weights = True  # matrices that make nothing
    get_peft_model(AutoModelForCausalLM.from_pretrained(MULL_TINY), config).save_pretrained(
        str(root / "idle")
    )
    return root


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="module")
def environment(imports: Path, registry: Path) -> dict[str, str]:
    return {
        "MULL_ADAPTERS": str(registry),
        "MULL_ADAPTER_IMPORTS": str(imports),
        "MULL_ADMIN_KEY": ADMIN["X-Mull-Admin-Key"],
    }


@pytest.fixture(scope="module")
def served(serve, environment, tmp_path_factory) -> Iterator[Any]:
    flags = ("--max-loras", "2", "--max-cpu-loras", "5")
    with serve(tmp_path_factory.mktemp("adapters") / "log", *flags, **environment) as server:
        yield server


@pytest.fixture
def api(served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=120) as client:
        yield client


def publish(api: httpx.Client, folder: str, name: str = "a", **more: Any) -> dict[str, Any]:
    reply = api.post("/v1/adapters", json={"name": name, "path": folder, **more}, headers=ADMIN)
    assert reply.status_code == 201, reply.text
    return reply.json()


def point(api: httpx.Client, alias: str, **body: Any) -> httpx.Response:
    return api.put(f"/v1/adapters/{alias}", json=body, headers=ADMIN)


def says(api: httpx.Client, model: str, **more: Any) -> tuple[str, str]:
    """Which version answered, and its words."""
    reply = api.post("/v1/chat/completions", json={"model": model, **BODY, **more})
    assert reply.status_code == 200, reply.text
    return reply.json()["model"], reply.json()["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def versions(served) -> dict[str, str]:
    """By version, what it says when nothing else runs."""
    with httpx.Client(base_url=served.url, timeout=120) as api:
        ids = [publish(api, str(at))["id"] for at in range(WRONG)]
        words = {id: says(api, id)[1] for id in ids}
        assert len({*words.values(), says(api, "mull-tiny")[1]}) == WRONG + 1
    return words


def test_names_mean_versions_and_move(api: httpx.Client, versions: dict[str, str]):
    one, two, *_ = versions
    assert publish(api, "0", alias="prod")["alias"]["versions"] == {one: 1.0}
    assert says(api, "prod") == (one, versions[one])
    assert point(api, "prod", version=two).status_code == 200
    assert says(api, "prod") == (two, versions[two])
    ids = [card["id"] for card in api.get("/v1/models").json()["data"]]
    assert {"mull-tiny", "prod", *versions} == set(ids)
    assert len(ids) == len(set(ids))
    rolled = api.post("/v1/adapters/prod/rollback", headers=ADMIN).json()
    assert rolled["versions"] == {one: 1.0}
    assert says(api, "prod") == (one, versions[one])
    kept = api.request("DELETE", f"/v1/adapters/{one}", headers=ADMIN)
    assert kept.status_code == 400
    assert "alias 'prod' means" in kept.json()["error"]["message"]
    assert says(api, "prod:best_of_n")[0] == one
    assert says(api, "mull-tiny")[0] == "mull-tiny"


def test_an_alias_shares_its_requests_out(api: httpx.Client, versions: dict[str, str]):
    one, two, *_ = versions
    assert point(api, "split", versions={one: 0.75, two: 0.25}).status_code == 200
    seen = Counter(says(api, "split", max_tokens=1)[0] for _ in range(60))
    assert set(seen) == {one, two}
    assert seen[one] > seen[two]
    counted = [
        line
        for line in api.get("/metrics").text.splitlines()
        if line.startswith('mull_adapter_requests_total{alias="split"')
    ]
    assert sum(float(line.rsplit(" ", 1)[1]) for line in counted) == 60
    assert api.delete("/v1/adapters/split", headers=ADMIN).json()["deleted"]
    gone = api.post("/v1/chat/completions", json={"model": "split", **BODY})
    assert gone.status_code == 404


def test_vllms_own_routes_go_the_same_way(api: httpx.Client, versions: dict[str, str]):
    first = next(iter(versions))
    body = {"lora_name": "own", "lora_path": "0"}
    assert api.post("/v1/load_lora_adapter", json=body).status_code == 401
    loaded = api.post("/v1/load_lora_adapter", json=body, headers=ADMIN)
    assert loaded.text == "Success: LoRA adapter 'own' added successfully."
    assert says(api, "own") == (first.replace("a@", "own@"), versions[first])
    out = api.post("/v1/unload_lora_adapter", json={"lora_name": "own"}, headers=ADMIN)
    assert out.status_code == 200
    assert api.post("/v1/chat/completions", json={"model": "own", **BODY}).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("POST", "", {"name": "x", "path": "/etc"}, 400, "no such folder"),
        ("POST", "", {"name": "x", "path": "../"}, 400, "no such folder"),
        ("POST", "", {"name": "../x", "path": "0"}, 400, "a name has"),
        ("POST", "", {"name": "x", "path": "idle"}, 400, "exactly what it says without"),
        ("POST", "", {"name": "x"}, 400, "path: Field required"),
        ("POST", "", {"name": "x", "path": "0", "more": 1}, 400, "more: Extra inputs"),
        ("PUT", "/prod", {"version": "a@000000000000"}, 404, "no adapter"),
        ("PUT", "/prod", {"version": "a", "versions": {}}, 400, "name one 'version'"),
        ("PUT", "/mull-tiny", {"version": "ONE"}, 400, "served already"),
        ("PUT", "/a%40b", {"version": "ONE"}, 400, "an alias is called"),
        ("PUT", "/prod", {"versions": {"ONE": 0.5}}, 400, "make 1 together"),
        ("POST", "/nobody/rollback", None, 404, "no alias"),
        ("DELETE", "/nobody", None, 404, "no alias"),
        ("DELETE", "/a@000000000000", None, 404, "no adapter"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    api: httpx.Client, versions, method, path, body, status, words
):
    one = next(iter(versions))
    sent = json.loads(json.dumps(body).replace("ONE", one))
    reply = api.request(method, f"/v1/adapters{path}", json=sent, headers=ADMIN)
    assert reply.status_code == status, reply.text
    assert words in reply.json()["error"]["message"]


def test_only_the_operator_changes_adapters(api: httpx.Client, client: httpx.Client, versions):
    for headers in ({}, {"X-Mull-Admin-Key": "guess"}, {"Authorization": "Bearer guess"}):
        assert api.get("/v1/adapters", headers=headers).status_code == 401
    bearer = {"Authorization": f"Bearer {ADMIN['X-Mull-Admin-Key']}"}
    assert api.get("/v1/adapters", headers=bearer).status_code == 200
    nobody = client.get("/v1/adapters", headers=ADMIN)  # a server without a key
    assert nobody.status_code == 403
    assert nobody.json()["error"]["type"] == "permission_error"


def test_a_search_is_judged_by_the_version_its_name_means(
    api: httpx.Client, imports: Path, versions
):
    folder = imports / "judge"
    shutil.copytree(imports / "7", folder)
    labels = {"good": "<|good|>", "bad": "<|bad|>"}
    manifest = {"schema_version": 1, "kind": "verifier", "judging": {"labels": labels}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    judge = publish(api, "judge", "judge", alias="critic")["id"]
    strategy = {"kind": "best_of_n", "n": 3, "verifier": {"kind": "adapter", "adapter": "critic"}}
    body = {"model": "mull-tiny", **BODY, "strategy": strategy}
    mull = api.post("/v1/chat/completions", json=body).json()["mull"]
    assert mull["adapters"] == {"critic": judge}
    assert mull["usage"]["verifier_tokens"] > 0
    native = {"model": "mull-tiny", **BODY, "verifier": strategy["verifier"]}
    whole = api.post("/v1/strategies/best_of_n", json=native).json()
    streamed = api.post("/v1/strategies/best_of_n", json=native | {"stream": True}).text
    result = json.loads(streamed.split("event: result\ndata: ")[1].split("\n")[0])
    assert whole["mull"]["adapters"] == result["mull"]["adapters"] == {"critic": judge}
    verify = {
        "model": "mull-tiny",
        "messages": ASKED,
        "candidates": ["19"],
        "verifier": strategy["verifier"],
    }
    assert api.post("/v1/verify", json=verify).status_code == 200
    policy = {"kind": "adapter", "adapter": next(iter(versions))}
    refused = api.post(
        "/v1/chat/completions", json=body | {"strategy": strategy | {"verifier": policy}}
    )
    assert refused.status_code == 400
    assert "does not judge" in refused.json()["error"]["message"]


def test_samples_come_from_several_adapters_in_one_search(api: httpx.Client, versions):
    one, two, *_ = versions
    assert point(api, "mixed", version=one).status_code == 200
    names = ["mixed", two, "mull-tiny"]
    body = {"model": "mull-tiny", **BODY, "models": names}
    found = api.post("/v1/strategies/best_of_n", json=body).json()
    words = {"mixed": versions[one], two: versions[two], "mull-tiny": says(api, "mull-tiny")[1]}
    assert {each["model"] for each in found["candidates"]} == set(names)
    for each in found["candidates"]:
        assert each["text"] == words[each["model"]]
    assert found["mull"]["adapters"] == {"mixed": one}
    assert found["mull"]["model"] in names
    strategy = {"kind": "best_of_n", "models": ["nobody"]}
    refused = api.post(
        "/v1/chat/completions", json={"model": "mull-tiny", **BODY, "strategy": strategy}
    )
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "strategy.models"


@pytest.mark.slow
async def test_flips_under_load_lose_nothing_and_mix_nothing(served, versions: dict[str, str]):
    """50 flips while 16 searches run: each answer is of one version, which its words prove."""
    ids = list(versions)
    over = asyncio.Event()
    served_by: Counter[str] = Counter()
    seconds: list[float] = []

    async with httpx.AsyncClient(base_url=served.url, timeout=120) as client:

        async def ask() -> None:
            strategy = {"kind": "self_consistency", "n": 3, "early_stop": "never"}
            while not over.is_set():
                body = {"model": "live", **BODY, "strategy": strategy}
                reply = await client.post("/v1/chat/completions", json=body)
                assert reply.status_code == 200, reply.text
                version = reply.json()["model"]
                words = reply.json()["choices"][0]["message"]["content"]
                assert words == versions[version]
                served_by[version] += 1

        async def flip() -> None:
            rng = random.Random(0)
            for at in range(50):
                path = str(rng.randrange(WRONG))
                body = {"name": "a", "path": path, "alias": "live"}
                began = asyncio.get_running_loop().time()
                reply = await client.post("/v1/adapters", json=body, headers=ADMIN)
                assert reply.status_code == 201, reply.text
                seconds.append(asyncio.get_running_loop().time() - began)
                if at == 0:
                    started.set()
                body = {"model": "live", **BODY, "max_tokens": 1}
                now = await client.post("/v1/chat/completions", json=body)
                assert now.json()["model"] == ids[int(path)]  # at once, for new requests
            over.set()

        started = asyncio.Event()

        async def later() -> None:
            await started.wait()
            await ask()

        await asyncio.gather(flip(), *(later() for _ in range(16)))
        cards = (await client.get("/v1/adapters", headers=ADMIN)).json()["data"]
    assert len(served_by) == WRONG
    assert sum(served_by.values()) > 100
    assert all(card["requests"] == 0 for card in cards)
    assert sum(card["resident"] for card in cards) <= 5
    print(f"{sum(served_by.values())} searches, p95 of POST {sorted(seconds)[47]:.3f} s")


@pytest.mark.slow
def test_another_server_serves_what_this_one_moved(served, serve, environment, versions, tmp_path):
    one, two, *_ = versions
    with (
        serve(tmp_path / "log", **environment) as other,
        httpx.Client(base_url=served.url, timeout=60) as here,
        httpx.Client(base_url=other.url, timeout=60) as there,
    ):
        for version in (one, two, one):
            assert point(here, "shared", version=version).status_code == 200
            assert says(here, "shared")[0] == version
            deadline = time.monotonic() + 2
            while says(there, "shared") != (version, versions[version]):
                assert time.monotonic() < deadline
