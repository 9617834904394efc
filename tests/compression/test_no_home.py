"""Where no home directory is known, as in a container that runs under any user id: it works, or says what to set."""

import os
import sys

import pytest
from checkpoints import transformers_model
from processes import completed

CODE = """
import pwd, sys

def unknown(*arguments):
    raise KeyError("uid not found")

pwd.getpwuid = pwd.getpwnam = unknown
import compression
from bench.data.sources import open_data

base = sys.argv[1]
print(compression.compress(base, "nf4(group_size=32)").kernels())
for attempt in (
    lambda: compression.compress(base, "kd", teacher="self", calibration="random"),
    lambda: compression.open_base("~/model"),
    lambda: compression.open_base("nobody/nothing"),
    lambda: compression.compress(base, "gptq", calibration="~/texts"),
    lambda: open_data("~/texts", base=base),
    lambda: open_data("hub", base=base).texts("test"),
):
    try:
        attempt()
        print("done")
    except Exception as error:
        print(type(error).__name__, str(error).replace("\\n", " "))
"""


@pytest.mark.process
def test_all_that_needs_a_home_directory_works_or_says_what_to_set(tmp_path):
    transformers_model("LlamaForCausalLM").save_pretrained(tmp_path / "base")
    kept = {name: value for name, value in os.environ.items()
            if name != "HOME" and not name.startswith(("XDG_", "HF_", "COMPRESSION_"))}  # fmt: skip
    done = completed([sys.executable, "-c", CODE, tmp_path / "base"], env=kept, cwd=tmp_path, check=True)

    compressed, *said = done.stdout.splitlines()
    assert compressed.startswith("{")
    errors = ["CheckpointError", "CheckpointError", "CheckpointError", "CalibrationError", "OptionError", "DataError"]
    assert errors == [line.split()[0] for line in said]
    assert all("no home directory is known; set HOME" in line for line in said)
    assert "set COMPRESSION_CACHE" in said[0] and "set HF_HOME" in said[2]
    assert "Traceback" not in done.stderr
    assert ["base"] == sorted(path.name for path in tmp_path.iterdir())  # no folder that is called ~
