"""The command line: help that helps, and a doctor that finds what is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from server import doctor

MULL = str(Path(sys.executable).parent / "mull")


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([MULL, *arguments], capture_output=True, text=True, timeout=120)


def test_help_names_the_commands():
    done = run("--help")
    assert done.returncode == 0
    assert "serve" in done.stdout
    assert "doctor" in done.stdout


def test_serve_help_says_how_to_serve():
    done = run("serve", "--help")
    assert done.returncode == 0
    assert "mull serve Qwen" in done.stdout
    assert "--help=all" in done.stdout


def test_an_unknown_command_is_refused():
    assert run("sreve").returncode == 2


def test_the_doctor_finds_this_installation_well():
    done = run("doctor")
    assert done.returncode == 0, done.stdout
    assert "vLLM" in done.stdout
    assert "broken" not in done.stdout


def test_the_doctor_finds_what_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.setattr(doctor, "MULL_TINY", tmp_path)
    monkeypatch.setattr(doctor, "_version", lambda name: "0.31.0" if name == "vllm" else None)
    assert doctor.examine() == 1
    said = capsys.readouterr().out
    assert "0.32" in said
    assert "make tiny" in said
    assert "make install" in said
