"""Make rows, train with every method for a few steps, check each adapter on one engine.

What became of each run is a line of JSON.
"""

import json
import runpy
import sys
from pathlib import Path

from finetune import training
from finetune.engine import Engine
from models import MULL_TINY


def main() -> None:
    told = json.loads(Path(sys.argv[1]).read_text())
    for module, *arguments in told["rows"]:
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__")
    with Engine(str(MULL_TINY), rank=64) as engine:
        for name, (method, arguments) in told["runs"].items():
            try:
                training.run(method, arguments, prog=f"test {name}", engine=engine)
                said = "published"
            except SystemExit as error:
                said = str(error)
            print(json.dumps({"run": name, "said": said}), flush=True)


if __name__ == "__main__":  # vLLM's processes import this file
    main()
