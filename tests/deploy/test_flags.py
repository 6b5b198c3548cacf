"""What the chart's pods run with, read by vLLM's own parser in a process of its own."""

import json
import subprocess
import sys

import pytest

from tests.deploy.conftest import Render
from tests.deploy.test_chart import NODES, VARIANTS, templates

PARSER = """
import json, sys
from server.local import launcher
from server.settings import Settings
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

def vllm(argv):
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(argv)
    validate_parsed_serve_args(args)
    return args

read = {"mull": lambda argv: launcher.parse(argv, Settings()), "vllm": vllm}
told = "host port model_tag nnodes node_rank master_addr headless tensor_parallel_size " \\
       "pipeline_parallel_size distributed_executor_backend enable_lora enable_scale_out"
for line in sys.stdin:
    command, argv = json.loads(line)
    args = vars(read[command](argv))
    print(json.dumps({name: args[name] for name in told.split()}), flush=True)
"""


@pytest.mark.slow
def test_vllm_understands_every_flag(render: Render):
    groups = {"LWS_LEADER_ADDRESS": "10.0.0.5", "LWS_WORKER_INDEX": "1"}
    asked: dict[str, tuple[str, list[str]]] = {}
    for variant, values in VARIANTS.items():
        for name, template in templates(render(values)):
            [container] = template["spec"]["containers"]
            command, args = container["command"], container["args"]
            if container["name"] != "engine" or not args:  # a Ray worker waits for its work
                continue
            server = command[0]
            if server == "bash":
                assert command[2].endswith('; exec mull serve "$@"')
                assert command[3:] == ["serve"]
                server = "mull"
            for key, value in groups.items():
                args = [one.replace(f"$({key})", value) for one in args]
            assert "$(" not in " ".join(args)
            asked[f"{variant}: {name}"] = (server, args)
    lines = "".join(json.dumps(one) + "\n" for one in asked.values())
    ran = subprocess.run(
        [sys.executable, "-c", PARSER], input=lines, capture_output=True, text=True, timeout=280
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    read = dict(zip(asked, map(json.loads, ran.stdout.splitlines()), strict=True))
    leader = read["engine, LeaderWorkerSet: LeaderWorkerSet demo-engine, leader"]
    worker = read["engine, LeaderWorkerSet: LeaderWorkerSet demo-engine, worker"]
    both = {"model_tag", "nnodes", "master_addr", "tensor_parallel_size", "pipeline_parallel_size"}
    assert {key: leader[key] for key in both} == {key: worker[key] for key in both}
    assert (leader["nnodes"], leader["master_addr"]) == (2, "10.0.0.5")
    assert (leader["node_rank"], worker["node_rank"], worker["headless"]) == (0, 1, True)
    assert worker["enable_lora"]
    ray = read["engine, RayCluster: RayCluster demo, head"]
    assert ray["distributed_executor_backend"] == "ray"
    sizes = (NODES["gpus"], NODES["nodes"])
    assert (ray["tensor_parallel_size"], ray["pipeline_parallel_size"]) == sizes
    for name, args in read.items():
        assert args["headless"] or (args["host"], args["port"]) == ("0.0.0.0", 8000)
        assert args["enable_scale_out"] == name.startswith("gateway")
