"""What must be the same on every machine of one run: `python -m bench.session.grid.facts` prints it as JSON."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bench
from bench.machine import device
from compression.cluster import facts as common
from compression.files.atomic import code_digest


def facts(asked: Mapping[str, Any]) -> dict[str, Any]:
    """As `compression.cluster.facts`; of the code of the benchmarks and the device, too.

    Args:
        asked: as there; `device`.
    """
    return {
        **common.facts(asked),
        "code of bench": code_digest(Path(bench.__file__).parent),
        "device": device.fingerprint(asked["device"]),
    }


if __name__ == "__main__":
    print(json.dumps(facts(json.load(sys.stdin))))
