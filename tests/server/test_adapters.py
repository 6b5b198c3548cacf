"""Adapters on a real engine: taken in, named, moved under load, rolled back, refused."""

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from models import MULL_TINY

ADMIN = {"X-Mull-Admin-Key": "the operator's"}
ASKED = [{"role": "user", "content": "Tom has 12 apples. At the park he finds 7. How many has he?"}]
BODY: dict[str, Any] = {"messages": ASKED, "temperature": 0, "max_tokens": 24}
WRONG = 8
"""Adapters that each say something else."""


def config(**changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def changed(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS)

    return changed


def scaled(by: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda held: held.update({key: held[key] * by for key in held if "lora_B" in key})


WEIGHTS = "adapter_model.safetensors"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
BROKEN: dict[str, Callable[[Path], Any]] = {
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "no configuration": lambda folder: (folder / "adapter_config.json").unlink(),
    "not JSON": lambda folder: (folder / "adapter_config.json").write_bytes(b"\xff{"),
    "a damaged manifest": lambda folder: (folder / "manifest.json").write_text("{"),
    "another base": lambda folder: (folder / "manifest.json").write_text(
        json.dumps({"schema_version": 1, "kind": "policy", "base": {"weights": "0" * 64}})
    ),
    "another template": lambda folder: (folder / "manifest.json").write_text(
        json.dumps({"schema_version": 1, "kind": "policy", "base": {"chat_template": "0" * 64}})
    ),
    "labels that are no tokens": lambda folder: (folder / "manifest.json").write_text(
        json.dumps(
            {
                "schema_version": 1,
                "kind": "verifier",
                "judging": {"labels": {"good": "splendid", "bad": "awful"}},
            }
        )
    ),
    "cut short": lambda folder: (folder / WEIGHTS).write_bytes(
        (folder / WEIGHTS).read_bytes()[:-9]
    ),
    "a pickle": lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
    "a link out": lambda folder: (
        (folder / "README.md").unlink(missing_ok=True)
        or (folder / "README.md").symlink_to("/etc/hostname")
    ),
    "too high a rank": config(r=64),
    "another rank than said": config(r=4),
    "a pattern that is none": config(rank_pattern={"(": 8}),
    "patterns of another type": config(alpha_pattern=[1]),
    "a strength that is no number": config(lora_alpha=float("nan")),
    "an enormous strength": config(lora_alpha=1e38),
    "no strength": config(lora_alpha=0),
    "the output layer": tensors(
        lambda held: held.update(
            {
                f"base_model.model.lm_head.{side}.weight": torch.ones(shape)
                for side, shape in (("lora_A", (8, 256)), ("lora_B", (576, 8)))
            }
        )
    ),
    "DoRA": config(use_dora=True),
    "PiSSA": config(init_lora_weights="pissa"),
    "IA3": config(peft_type="IA3"),
    "modules of another type": config(modules_to_save=5),
    "smaller shapes": tensors(lambda held: held.update({B: held[B][:-8].contiguous()})),
    "not a number": tensors(lambda held: held[B].fill_(float("nan"))),
    "weights so large that nothing is a number": tensors(scaled(1e37)),
    "all zero": tensors(scaled(0)),
    "a layer that is not there": tensors(
        lambda held: held.update({B.replace("layers.0", "layers.77"): held.pop(B)})
    ),
    "another prefix": tensors(
        lambda held: [
            held.update({key.replace("model.model.", "model."): held.pop(key)})
            for key in list(held)
        ]
    ),
}


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
    cards = api.get("/v1/adapters", headers=ADMIN).json()["data"]
    assert next(card for card in cards if card["id"] == one)["resident"]
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


def test_a_pinned_alias_stays_in_the_engine(api: httpx.Client, versions: dict[str, str]):
    """Five fit: all the others are used, and the pinned one is not pushed out."""
    one, *others = versions
    told = point(api, "kept", version=one, pinned=True)
    assert told.json()["pinned"] is True
    for other in others:
        assert says(api, other, max_tokens=1)[0] == other
    cards = {card["id"]: card for card in api.get("/v1/adapters", headers=ADMIN).json()["data"]}
    assert cards[one]["resident"]
    assert {id for id in cards if cards[id]["pinned"]} == {one}
    five = dict.fromkeys(list(versions)[:5], 0.2)
    refused = point(api, "kept", versions=five)  # it would still be pinned
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "pinned"
    assert point(api, "kept", versions=five, pinned=False).json()["pinned"] is False
    assert api.post("/v1/adapters/kept/rollback", headers=ADMIN).json()["versions"] == {one: 1.0}
    assert api.delete("/v1/adapters/kept", headers=ADMIN).status_code == 200


def test_vllms_own_routes_go_the_same_way(api: httpx.Client, versions: dict[str, str]):
    first = next(iter(versions))
    body = {"lora_name": "own", "lora_path": "0"}
    assert api.post("/v1/load_lora_adapter", json=body).status_code == 401
    loaded = api.post("/v1/load_lora_adapter", json=body, headers=ADMIN)
    assert loaded.text == "Success: LoRA adapter 'own' added successfully."
    assert says(api, "own") == (first.replace("a@", "own@"), versions[first])
    out = api.post("/v1/unload_lora_adapter", json={"lora_name": "own"}, headers=ADMIN)
    assert out.status_code == 200
    for path, sent in (
        ("load", body | {"load_inplace": True}),
        ("load", body | {"more": 1}),
        ("unload", {"lora_name": first}),
    ):
        refused = api.post(f"/v1/{path}_lora_adapter", json=sent, headers=ADMIN)
        assert refused.status_code == 400, refused.text
    assert says(api, first)[0] == first
    assert api.post("/v1/chat/completions", json={"model": "own", **BODY}).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("POST", "", {"name": "x", "path": "/etc"}, 400, "no such folder"),
        ("POST", "", {"name": "x", "path": "../"}, 400, "no such folder"),
        ("POST", "", {"name": "../x", "path": "0"}, 400, "a name has"),
        ("POST", "", {"name": "x", "path": "idle"}, 400, "it does nothing: all lora_B are zero"),
        ("POST", "", {"name": "x"}, 400, "path: Field required"),
        ("POST", "", {"name": "x", "path": "0", "more": 1}, 400, "more: Extra inputs"),
        ("PUT", "/prod", {"version": "a@000000000000"}, 404, "no adapter"),
        ("PUT", "/prod", {"version": "a", "versions": {}}, 400, "name one 'version'"),
        ("PUT", "/mull-tiny", {"version": "ONE"}, 400, "served already"),
        ("PUT", "/a%40b", {"version": "ONE"}, 400, "a name has"),
        ("PUT", "/prod", {"versions": {"ONE": 0.5}}, 400, "make 1 together"),
        ("PUT", "/prod", '{"versions": {"ONE": NaN}}', 400, "finite"),
        ("PUT", "/prod", '{"versions": {"ONE": 1e999}}', 400, "finite"),
        ("PUT", "/prod", "[]", 400, "object"),
        ("PUT", "/prod", "\ud83d", 400, "JSON"),
        ("POST", "/nobody/rollback", None, 404, "no alias"),
        ("DELETE", "/nobody", None, 404, "no alias"),
        ("DELETE", "/a@000000000000", None, 404, "no adapter"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    api: httpx.Client, versions, method, path, body, status, words
):
    one = next(iter(versions))
    sent = (body if isinstance(body, str) else json.dumps(body)).replace("ONE", one)
    raw = sent.encode(errors="surrogatepass")
    reply = api.request(method, f"/v1/adapters{path}", content=raw, headers=ADMIN)
    assert reply.status_code == status, reply.text
    assert words in reply.json()["error"]["message"]


def test_only_the_operator_changes_adapters(api: httpx.Client, client: httpx.Client, versions):
    for headers in ({}, {"X-Mull-Admin-Key": "guess"}, {"Authorization": "Bearer guess"}):
        assert api.get("/v1/adapters", headers=headers).status_code == 401
    bearer = {"Authorization": f"Bearer {ADMIN['X-Mull-Admin-Key']}"}
    assert api.get("/v1/adapters", headers=bearer).status_code == 200
    assert client.get("/v1/adapters", headers=ADMIN).status_code == 404  # without a registry


def test_a_gateway_means_the_same_by_a_name(
    api: httpx.Client, served, stand_before, registry: Path, imports: Path, versions, tmp_path: Path
):
    one, two, *_ = versions
    folder = imports / "critic"
    shutil.copytree(imports / "6", folder)
    labels = {"good": "<|good|>", "bad": "<|bad|>"}
    manifest = {"schema_version": 1, "kind": "verifier", "judging": {"labels": labels}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    critic = publish(api, "critic", "critic", alias="far-critic")["id"]
    with (
        stand_before(tmp_path / "gateway", served.url, MULL_ADAPTERS=str(registry)) as gateway,
        httpx.Client(base_url=gateway.url, timeout=120) as there,
    ):
        for version in (one, two):
            assert point(api, "far", version=version).status_code == 200
            time.sleep(0.3)
            assert says(there, "far") == (version, versions[version])
            assert says(there, "far", strategy="chain_of_thought") == (version, versions[version])
        verifier = {"kind": "adapter", "adapter": "far-critic"}
        body = {"model": "mull-tiny", **BODY, "temperature": 1, "seed": 1, "verifier": verifier}
        here, over = (
            at.post("/v1/strategies/best_of_n", json=body | {"n": 4}).json() for at in (api, there)
        )
        assert over["mull"]["adapters"] == {"far-critic": critic}
        assert [at["text"] for at in over["candidates"]] == [
            at["text"] for at in here["candidates"]
        ]
        for at, other in zip(over["candidates"], here["candidates"], strict=True):
            assert at["score"] == pytest.approx(other["score"], abs=1e-3)
        assert over["usage"]["completion_tokens"] == here["usage"]["completion_tokens"]
    assert api.delete("/v1/adapters/far", headers=ADMIN).status_code == 200
    assert api.delete("/v1/adapters/far-critic", headers=ADMIN).status_code == 200


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


@pytest.mark.parametrize("broken", BROKEN)
def test_the_engine_outlives_every_broken_adapter(
    api: httpx.Client, imports: Path, versions: dict[str, str], broken: str
):
    folder = imports / "broken"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(imports / "0", folder)
    BROKEN[broken](folder)
    refused = api.post("/v1/adapters", json={"name": "x", "path": "broken"}, headers=ADMIN)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == "path"
    assert str(imports) not in refused.text
    cards = api.get("/v1/adapters", headers=ADMIN).json()["data"]
    assert not [card for card in cards if card["id"].startswith("x@")]
    one = next(iter(versions))
    assert says(api, one) == (one, versions[one])


def test_the_command_line_does_what_the_api_does(api, served, versions):
    one, two, *_ = versions
    mull = str(Path(sys.executable).parent / "mull")

    def run(*arguments: str, key: str = ADMIN["X-Mull-Admin-Key"]) -> tuple[int, str]:
        variables = os.environ | {"MULL_ADMIN_KEY": key, "COLUMNS": "200"}
        command = [mull, "adapters", "--url", served.url, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=variables)
        return done.returncode, done.stdout + done.stderr

    status, said = run("import", "a", "0", "--alias", "told")
    assert (status, one in said) == (0, True), said
    assert run("point", "told", f"{one}=0.25", f"{two}=0.75")[0] == 0
    status, said = run("list")
    assert status == 0
    assert "told (25%)" in said
    assert run("rollback", "told")[0] == 0
    assert says(api, "told")[0] == one
    assert run("remove", "told")[0] == 0
    status, said = run("remove", "told")
    assert (status, "refused (404)" in said) == (1, True), said
    status, said = run("import", "a", "nowhere")
    assert (status, "no such folder" in said) == (1, True), said
    status, said = run("list", key="another key")
    assert (status, "refused (401)" in said) == (1, True), said
    assert run("point", "told", f"{one}=x")[0] == 2


def test_a_damaged_registry_keeps_what_is_whole(
    api: httpx.Client, registry: Path, versions: dict[str, str]
):
    one, *_ = versions
    assert point(api, "whole", version=one).status_code == 200
    damaged = registry / "aliases" / "damaged.json"
    damaged.write_text("{")
    (registry / "versions" / ".DS_Store").touch()
    time.sleep(0.3)
    assert says(api, "whole") == (one, versions[one])
    assert says(api, "mull-tiny")[0] == "mull-tiny"
    assert api.get("/v1/adapters", headers=ADMIN).status_code == 200
    assert point(api, "damaged", version=one).status_code == 200
    assert says(api, "damaged")[0] == one
    assert api.delete("/v1/adapters/damaged", headers=ADMIN).status_code == 200


def test_a_deleted_version_is_gone_for_good(api: httpx.Client, versions: dict[str, str]):
    gone = publish(api, "1", "gone")["id"]
    assert says(api, gone)[1] == versions[list(versions)[1]]
    assert api.delete(f"/v1/adapters/{gone}", headers=ADMIN).status_code == 200
    reply = api.post("/v1/chat/completions", json={"model": gone, **BODY})
    assert reply.status_code == 404
    assert gone not in {card["id"] for card in api.get("/v1/models").json()["data"]}


def test_more_adapters_than_fit_are_refused_for_good(api: httpx.Client, versions):
    strategy = {"kind": "best_of_n", "n": 16, "models": list(versions)[:7]}
    body = {"model": "mull-tiny", **BODY, "strategy": strategy}
    refused = api.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400
    assert "needs 7 adapters, and the engine holds 5" in refused.json()["error"]["message"]


@pytest.mark.slow
async def test_flips_under_load_lose_nothing_and_mix_nothing(served, versions: dict[str, str]):
    """50 flips while 16 searches run: each answer is of one version, which its words prove."""
    ids = list(versions)
    over = asyncio.Event()
    served_by: Counter[str] = Counter()
    exact: Counter[bool] = Counter()
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
                assert words not in {versions[id] for id in versions if id != version}
                served_by[version] += 1
                exact[words == versions[version]] += 1

        async def flip() -> None:
            rng = random.Random(0)
            for at in range(50):
                path = str(rng.randrange(4))
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
    assert len(served_by) == 4
    assert sum(served_by.values()) > 100
    assert all(card["requests"] == 0 for card in cards)
    assert sum(card["resident"] for card in cards) <= 5
    # But for ties that rounding breaks in larger batches, on some machines more than on others; a
    # version that changed within an answer would show in most of them.
    assert exact[True] > 0.9 * exact.total()
    print(f"{exact.total()} searches, POST p50 {sorted(seconds)[25]:.3f} s")
    print(f"p95 {sorted(seconds)[47]:.3f} s, slowest {max(seconds):.3f} s")
    assert sorted(seconds)[47] <= 1.0  # 0.17 to 0.33 on two quiet cores


@pytest.mark.slow
async def test_two_slots_serve_the_base_and_eight_adapters_exactly(
    serve, environment, versions, tmp_path
):
    """200 greedy requests at once, in float32, where a batch's size breaks no ties."""
    rng = random.Random(0)
    names = ["mull-tiny", *versions]
    asked = [
        {
            "model": names[at % len(names)],
            "prompt": f"<|im_start|>user\nTom has {rng.randint(2, 99)} apples. He finds "
            f"{rng.randint(2, 99)}. How many has he?<|im_end|>\n<|im_start|>assistant\n",
            "temperature": 0,
            "max_tokens": rng.randint(8, 40),
        }
        for at in range(200)
    ]
    flags = ("--dtype", "float32", "--max-loras", "2", "--max-cpu-loras", "8")
    with serve(tmp_path / "log", *flags, **environment) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:

            async def say(body: dict[str, Any]) -> str:
                reply = await client.post("/v1/completions", json=body)
                assert reply.status_code == 200, reply.text
                assert reply.json()["model"] == body["model"]
                return reply.json()["choices"][0]["text"]

            together = await asyncio.gather(*map(say, asked))
            alone = [await say(body) for body in asked]
    assert together == alone
    assert len({(body["model"], said) for body, said in zip(asked, alone, strict=True)}) > 150


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
