"""Helm's own Go code: a line of values in, a line of manifests or of an error out.

A process of its own, since what forks in the tests must not have Go's threads.
"""

import json
import sys

import helm_python as helm

with helm.Chart.load(sys.argv[1]) as chart:
    for line in sys.stdin:
        values = json.loads(line)
        try:
            reply = {"files": chart.render(values, name="demo", namespace="prod")}
            found = helm.lint(sys.argv[1], values, strict=True, namespace="prod")
            reply["lint"] = found["errors"]
        except helm.HelmError as error:
            reply = {"error": str(error)}
        print(json.dumps(reply), flush=True)
