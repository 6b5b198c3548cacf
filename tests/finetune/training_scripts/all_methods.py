"""Train with every method for a few steps and check each adapter on one engine; ends in JSON."""

import json
import sys
from pathlib import Path

from finetune import training
from finetune.engine import Engine
from models import MULL_TINY


def main() -> None:
    runs = json.loads(Path(sys.argv[1]).read_text())
    with Engine(str(MULL_TINY), rank=64) as engine:
        for name, (method, arguments) in runs.items():
            try:
                training.run(method, arguments, prog=f"test {name}", engine=engine)
                said = "published"
            except SystemExit as error:
                said = str(error)
            print(json.dumps({"run": name, "said": said}), flush=True)


if __name__ == "__main__":  # vLLM's processes import this file
    main()
