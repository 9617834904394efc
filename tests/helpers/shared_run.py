"""What a process of a group does in tests: `torchrun ... shared_run.py FOLDER RECIPE ...` compresses the reference.

Every recipe is compressed in memory by all processes together; the last of them saves the result in FOLDER.
"""

import sys
from pathlib import Path

import compression
from compression.workers import joined


def main(folder, *recipes):
    with joined("cpu") as (group, device):
        for number, recipe in enumerate(recipes):
            result = compression.compress("reference", recipe, device=device, workers=group)
            if group.rank == group.count - 1:
                result.save(Path(folder) / str(number))


if __name__ == "__main__":
    main(*sys.argv[1:])
