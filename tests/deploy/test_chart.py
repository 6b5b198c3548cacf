"""What the chart renders is valid and locked up, and says what was asked of it."""

import json
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_validate import ValidationError, utils
from packaging.version import Version

from deploy.schema import FILE, current
from server import metrics
from server.settings import FILE_ONLY, Settings
from tests.deploy.conftest import CHART, Manifest, Render

NEWEST = sorted(set(utils.all_versions()), key=Version)[-3:]

GATEWAY = {"mode": "gateway"}
NODES = {"model": "some/model", "nodes": 2, "gpus": 8}
EVERYTHING = {
    "autoscaling": {"kind": "ScaledObject", "prometheus": "http://prometheus:9090"},
    "adapters": {"enabled": True, "storageClass": "shared"},
    "finetune": {"enabled": True, "config": {"dataset_name": "/data/rows.jsonl"}},
    "monitoring": {
        "enabled": True,
        "labels": {"release": "prometheus"},
        "authorization": {"credentials": {"name": "mull", "key": "MULL_ADMIN_KEY"}},
    },
    "networkPolicy": {"monitoring": [{"namespaceSelector": {}}]},
    "settings": {"run_code": True, "max_traces_bytes": 1 << 31, "heartbeat_seconds": 2.5},
    "config": {"limits": {"tokens": 4096}},
    "environment": {"VLLM_LOGGING_LEVEL": "INFO"},
    "secrets": {"settings": {"admin_key": "in-chains"}, "environment": {"HF_TOKEN": "hf"}},
    "imagePullSecrets": [{"name": "registry"}],
    "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
    "volumeMounts": [{"name": "data", "mountPath": "/data", "readOnly": True}],
    "engine": {"cache": "downloads", "placement": {"nodeSelector": {"gpu": "h100"}}},
}
NOTHING = {
    "disruptionBudget": False,
    "networkPolicy": {"enabled": False},
    "engine": {"gpus": 0, "image": "mull:cpu"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "engine": {},
    "engine, everything": EVERYTHING,
    "engine, nothing": NOTHING,
    "engine, scaled by HPA": {"autoscaling": {"kind": "HorizontalPodAutoscaler"}},
    "engine, LeaderWorkerSet": EVERYTHING | {"engine": NODES},
    "engine, RayCluster": {"engine": NODES | {"multinode": "RayCluster"}},
    "gateway": GATEWAY,
    "gateway, everything": GATEWAY | EVERYTHING,
    "gateway, nothing": GATEWAY | NOTHING,
    "gateway, scaled by HPA": GATEWAY | {"autoscaling": {"kind": "HorizontalPodAutoscaler"}},
    "gateway, router": GATEWAY | EVERYTHING | {"router": {"enabled": True}},
    "gateway, stock vLLM": GATEWAY | {"engine": {"server": "vllm", "model": "m", "replicas": 2}},
    "gateway, LeaderWorkerSet": GATEWAY | {"engine": NODES | {"replicas": 2}},
    "gateway, RayCluster": GATEWAY | {"engine": NODES | {"multinode": "RayCluster"}},
    "gateway, servers elsewhere": GATEWAY | {"settings": {"upstreams": ["http://10.0.0.5:8000"]}},
    "gateway, closed": GATEWAY | {"networkPolicy": {"clients": [], "egress": []}},
}
OPERATORS = {
    "keda.sh/v1alpha1",
    "leaderworkerset.x-k8s.io/v1",
    "monitoring.coreos.com/v1",
    "ray.io/v1",
}
"""APIs without a schema here: their fields were held against the definitions of KEDA, LWS, the
Prometheus operator and KubeRay by hand, and their pods are validated as pods."""

Manifests = dict[tuple[str, str], Manifest]


@pytest.fixture(params=VARIANTS)
def manifests(request: pytest.FixtureRequest, render: Render) -> Manifests:
    return render(VARIANTS[request.param])


def templates(manifests: Manifests) -> Iterator[tuple[str, Manifest]]:
    """Every template of a pod, with what it is called."""
    for (kind, name), one in manifests.items():
        match one.get("spec"):
            case {"template": {"spec": _} as template}:
                yield f"{kind} {name}", template
            case {"leaderWorkerTemplate": {"leaderTemplate": leader, "workerTemplate": worker}}:
                yield f"{kind} {name}, leader", leader
                yield f"{kind} {name}, worker", worker
            case {"headGroupSpec": head, "workerGroupSpecs": groups}:
                yield f"{kind} {name}, head", head["template"]
                yield from ((f"{kind} {name}, worker", one["template"]) for one in groups)


def variables(template: Manifest) -> dict[str, str]:
    [container] = template["spec"]["containers"]
    return {one["name"]: one["value"] for one in container.get("env", [])}


@pytest.mark.parametrize("version", NEWEST)
def test_kubernetes_knows_it(render: Render, version: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        utils, "schema_contents", cache(utils.schema_contents)
    )  # else read 500 times
    distinct: dict[str, Manifest] = {}
    for values in VARIANTS.values():
        made = render(values)
        pods = [
            {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
            for _, template in templates(made)
        ]
        assert pods
        distinct |= {json.dumps(one): one for one in (*made.values(), *pods)}
    for one in distinct.values():
        if one["apiVersion"] not in OPERATORS:
            utils.validate(one, version, strict=True)
    broken = next(iter(distinct.values())) | {"sepc": {}}
    with pytest.raises(ValidationError, match="sepc"):
        utils.validate(broken, version, strict=True)


def test_pods_are_locked_up_and_ask_for_what_they_need(manifests: Manifests):
    for name, template in templates(manifests):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] == ("router" in name)
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), name
            assert "memory" in container["resources"]["limits"]


def test_what_is_written_to_is_a_volume(manifests: Manifests):
    for name, template in templates(manifests):
        [container] = template["spec"]["containers"]
        mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
        assert set(mounts.values()) == {one["name"] for one in template["spec"]["volumes"]}
        wanted = {"/tmp"} if "router" in name else {"/tmp", variables(template)["HOME"]}
        wanted |= {"/dev/shm"} if container["name"] in ("engine", "finetune") else set()
        assert wanted <= mounts.keys(), name


def test_what_selects_finds_pods(manifests: Manifests):
    pods = [template["metadata"]["labels"] for _, template in templates(manifests)]
    for (kind, name), one in manifests.items():
        found = one.get("spec", {})
        selector = found.get("selector") or found.get("podSelector") or {}
        wanted = selector.get("matchLabels", selector)
        if kind == "ServiceMonitor":
            services = [one for (kind, _), one in manifests.items() if kind == "Service"]
            labels = [one["metadata"]["labels"].items() for one in services]
            assert sum(wanted.items() <= one for one in labels) == 1
        elif wanted:
            assert any(wanted.items() <= labels.items() for labels in pods), f"{kind} {name}"


def test_claims_and_secrets_that_pods_name_are_there_or_the_operators(manifests: Manifests):
    names = {name for _, name in manifests} | {"data", "downloads"}
    for _, template in templates(manifests):
        for volume in template["spec"]["volumes"]:
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            secret = volume.get("secret", {}).get("secretName")
            keys = volume.get("configMap", {}).get("name")
            assert {claim, secret, keys} - {None} <= names
        for container in template["spec"]["containers"]:
            assert all(one["secretRef"]["name"] in names for one in container.get("envFrom", []))


@pytest.mark.parametrize("mode", ["engine", "gateway"])
def test_start_life_and_readiness_are_three_questions(render: Render, mode: str):
    for name, template in templates(render({"mode": mode})):
        [container] = template["spec"]["containers"]
        start, life, ready = (
            container[f"{one}Probe"] for one in ("startup", "liveness", "readiness")
        )

        def patience(probe: Manifest) -> int:
            return probe["periodSeconds"] * probe["failureThreshold"]

        assert ready["httpGet"]["path"] == "/health"
        assert patience(ready) <= 10 < patience(life)
        if "gateway" in name:  # a restart heals no upstream
            assert life["httpGet"]["path"] == start["httpGet"]["path"] == "/live"
        else:  # an engine that is replaced in place takes as long as one that starts
            assert patience(life) == patience(start) == 1800


def test_the_schema_is_that_of_the_settings():
    assert json.loads(FILE.read_text()) == current(), "python -m deploy.schema"


def test_every_setting_can_be_set_and_reaches_mull(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    definitions = current()["$defs"]
    config = {"limits": {"tokens": 9}, "presets": {"deep": {"strategy": {"kind": "best_of_n"}}}}
    settings = {name: _some(field) for name, field in definitions["settings"]["properties"].items()}
    settings["keys"] = str(tmp_path / "keys.json")  # it is read at once
    (tmp_path / "keys.json").write_text('{"keys": []}')
    secrets = {name: _some(field) for name, field in definitions["secrets"]["properties"].items()}
    assert settings.keys() | secrets.keys() | FILE_ONLY == Settings.model_fields.keys()
    values = {"settings": settings, "config": config, "secrets": {"settings": secrets}}
    made = render(GATEWAY | values)
    [template] = [one for name, one in templates(made) if "gateway" in name]
    told = variables(template) | made["Secret", "demo"]["stringData"]
    file = tmp_path / "mull.yaml"
    file.write_text(made["Secret", "demo-config"]["stringData"]["mull.yaml"])
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MULL_CONFIG", str(file))
    assert Settings.read() == Settings.model_validate(settings | secrets | config)


def _some(field: dict[str, Any]) -> object:
    """A value that a setting may have, large where that shows how a number is written."""
    if "enum" in field:
        return field["enum"][-1]
    match field["type"]:
        case "boolean":
            return True
        case "integer":
            return min(field.get("maximum", 3 << 30), 3 << 30)
        case "number":
            return field.get("maximum", 9.5) - 0.25
        case "array":
            return ["http://10.0.0.5:8000", "http://10.0.0.6:8000"]
        case _:
            return "/some/where"


def test_every_variable_of_the_chart_is_a_setting(manifests: Manifests):
    known = {f"MULL_{name.upper()}" for name in Settings.model_fields.keys() - FILE_ONLY}
    for name, template in templates(manifests):
        ours = {one for one in variables(template) if one.startswith("MULL_")}
        assert ours <= known | {"MULL_CONFIG"}, name
    for (kind, _), one in manifests.items():
        if kind == "Secret" and "mull.yaml" not in one["stringData"]:
            assert {key for key in one["stringData"] if key.startswith("MULL_")} <= known


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"mode": "both"}, "/mode"),
        ({"enigne": {}}, "enigne"),
        ({"engine": {"replicas": 0}}, "/engine/replicas"),
        ({"engine": {"server": "vllm"}}, "/engine/server"),
        ({"engine": {"resources": {"requests": {"memory": "lots"}}}}, "/engine/resources"),
        ({"engine": {"placement": {"hostNetwork": True}}}, "hostNetwork"),
        ({"engine": {"nodes": 2}}, "/engine/model"),
        ({"engine": NODES | {"multinode": "RayCluster", "replicas": 2}}, "/engine/replicas"),
        ({"router": {"enabled": True}}, "/router/enabled"),
        (GATEWAY | {"engine": {"server": "vllm"}}, "/engine/model"),
        ({"settings": {"upstreams": ["http://10.0.0.5:8000"]}}, "/settings"),
        ({"settings": {"max_runing_requests": 4}}, "max_runing_requests"),
        ({"settings": {"max_running_requests": 0}}, "/settings/max_running_requests"),
        ({"settings": {"heartbeat_seconds": "often"}}, "/settings/heartbeat_seconds"),
        ({"settings": {"admin_key": "not a secret then"}}, "admin_key"),
        ({"secrets": {"settings": {"admin_key": "short"}}}, "/secrets/settings/admin_key"),
        ({"secrets": {"existing": "mine", "settings": {"admin_key": "in-chains"}}}, "/secrets"),
        ({"environment": {"MULL_RUN_CODE": "1"}}, "MULL_RUN_CODE"),
        ({"autoscaling": {"kind": "ScaledObject"}}, "/autoscaling/prometheus"),
        ({"finetune": {"enabled": True}}, "/adapters/enabled"),
        ({"finetune": {"method": "osmosis"}}, "/finetune/method"),
    ],
)
def test_what_is_wrong_is_refused_by_name(render: Render, values: dict[str, Any], named: str):
    with pytest.raises(ValueError, match=named):
        render(values)


def test_every_default_is_in_the_schema():
    def missing(values: dict[str, Any], schema: dict[str, Any], where: str) -> Iterator[str]:
        schema = definitions[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        for name, value in values.items():
            if name not in schema.get("properties", {}):
                yield f"{where}.{name}"
            elif isinstance(value, dict):
                yield from missing(value, schema["properties"][name], f"{where}.{name}")
        if schema.get("properties", {}).keys() - values.keys() - {"global"} and values:
            yield f"{where}: {schema['properties'].keys() - values.keys()}"

    schema = json.loads(FILE.read_text())
    definitions = schema["$defs"]
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for of in ("engine", "gateway", "router", "finetune"):
        values[of].pop("resources")
    assert all("resources" in one for one in missing(values, schema, "values"))


def test_a_gateway_names_every_replica_that_there_may_be(render: Render):
    engines = {"replicas": 2, "maxReplicas": 3}
    for kind, most in (("", 2), ("HorizontalPodAutoscaler", 3)):
        made = render(GATEWAY | {"engine": engines, "autoscaling": {"kind": kind}})
        [told] = [variables(one) for name, one in templates(made) if "gateway" in name]
        pods = [f"http://demo-engine-{index}.demo-engine:8000" for index in range(most)]
        assert told["MULL_UPSTREAMS"].split(",") == pods
        assert made["StatefulSet", "demo-engine"]["spec"]["serviceName"] == "demo-engine"
        assert made["Service", "demo-engine"]["spec"]["clusterIP"] == "None"
        assert ("replicas" in made["StatefulSet", "demo-engine"]["spec"]) == (kind == "")


def test_a_router_knows_the_engines_and_the_gateway_the_router(render: Render):
    made = render(VARIANTS["gateway, router"])
    pods = dict(templates(made))
    router = pods["Deployment demo-router"]["spec"]["containers"][0]["args"]
    labels = pods["StatefulSet demo-engine"]["metadata"]["labels"]
    chosen = dict(one.split("=") for one in router[router.index("--selector") + 1 :])
    assert chosen.items() <= labels.items()
    told = variables(pods["Deployment demo-gateway"])
    assert told["MULL_UPSTREAMS"] == "http://demo-router:8000"


@pytest.mark.parametrize("mode", ["engine", "gateway"])
def test_scaled_by_metrics_that_exist(render: Render, mode: str):
    ours = {one.name for one in metrics.CANDIDATES.describe()}
    vllm = find_spec("vllm")
    assert vllm is not None
    assert vllm.origin is not None
    source = (Path(vllm.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    for kind in ("HorizontalPodAutoscaler", "ScaledObject"):
        scaling = {"kind": kind, "prometheus": "http://prometheus:9090"}
        made = render({"mode": mode, "autoscaling": scaling})
        asked: dict[str, list[str]] = {}
        for (found, name), one in made.items():
            if found == "HorizontalPodAutoscaler":
                spec = one["spec"]["metrics"]
                asked[name] = [each["pods"]["metric"]["name"] for each in spec]
            elif found == "ScaledObject":
                spec = one["spec"]["triggers"]
                queries = [each["metadata"]["query"] for each in spec]
                assert all(f'pod=~"{name}-.*"' in query for query in queries)
                asked[name] = [query[len("sum(") : query.index("{")] for query in queries]
        waiting, candidates = "vllm:num_requests_waiting", "mull_running_candidates"
        assert f'name="{waiting}"' in source
        assert candidates in ours
        if kind == "HorizontalPodAutoscaler":
            waiting = waiting.replace(":", "_")
        both = {"demo-engine": [waiting], "demo-gateway": [candidates]}
        assert asked == (both if mode == "gateway" else {"demo-engine": [waiting, candidates]})


def test_stock_servers_are_told_nothing_of_mull(render: Render):
    made = render(VARIANTS["gateway, stock vLLM"] | {"settings": {"run_code": True}})
    pods = dict(templates(made))
    engine = pods["StatefulSet demo-engine"]
    assert engine["spec"]["containers"][0]["command"] == ["vllm", "serve"]
    assert variables(engine).keys() == {"HOME"}
    assert variables(pods["Deployment demo-gateway"])["MULL_RUN_CODE"] == "true"


def test_a_training_publishes_where_servers_import_from(render: Render):
    training = {"enabled": True, "name": "math", "config": {"dataset_name": "/data/rows.jsonl"}}
    made = render({"adapters": {"enabled": True}, "finetune": training})
    [(name, keys)] = [(name, one) for (kind, name), one in made.items() if kind == "ConfigMap"]
    assert json.loads(keys["data"]["keys.yaml"]) == {
        "dataset_name": "/data/rows.jsonl",
        "output_dir": "/srv/mull/runs/math",
        "publish_to": "/srv/mull/trained/math",
    }
    pods = dict(templates(made))
    assert f"Job {name}" in pods
    told = variables(pods["StatefulSet demo-engine"])
    assert told["MULL_ADAPTER_IMPORTS"] == "/srv/mull/trained"
    other = render({"adapters": {"enabled": True}, "finetune": training | {"method": "dpo"}})
    assert ("Job", name) not in other  # a Job cannot be changed


def test_only_clients_reach_the_front_and_nobody_the_engines(render: Render):
    made = render(VARIANTS["gateway, closed"])
    release, clients = (made["NetworkPolicy", name]["spec"] for name in ("demo", "demo-clients"))
    own = {"app.kubernetes.io/name": "mull", "app.kubernetes.io/instance": "demo"}
    peers = [{"podSelector": {"matchLabels": own}}]
    assert release["ingress"] == [{"from": peers}]
    assert release["podSelector"] == {"matchLabels": own}
    assert clients["ingress"] == []
    assert clients["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "gateway"
