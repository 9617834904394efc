"""The exceptions of the package.

    CompressionError
    ├── RecipeError        an invalid recipe, method name or parameter
    ├── CheckpointError    a base or artefact that cannot be opened, or is inconsistent
    ├── CalibrationError   calibration text is missing, too short or cannot be read
    ├── TeacherError       a teacher, its tokenizer or its stored outputs do not fit the student
    ├── TrainingError      a training run that cannot start, or had to stop
    ├── LayerError         a method cannot take this layer of this model
    ├── BackendError       a requested optional library or kernel is not available
    ├── ClusterError       other machines cannot do what is asked of them
    └── WorkerError        processes that share a run do not fit together, or one of them is gone

Every message says what must be, what was got, and what to do.
"""

_ALONE = {"gptqmodel": " && BUILD_CUDA_EXT=0 pip install --no-deps gptqmodel==7.6.0"}  # pins numpy, and runs with newer


def install_command(extra: str) -> str:
    """What to type in a checkout of this project, which is on no index, for the libraries of an extra."""
    return f"pip install -c constraints.txt -e '.[{extra}]'{_ALONE.get(extra, '')}"


class CompressionError(Exception):
    """Base class: catches everything that this package raises on purpose."""


class RecipeError(CompressionError, ValueError):
    """The text or the parameters of a recipe are invalid."""


class CheckpointError(CompressionError):
    """A checkpoint is missing, incomplete, damaged, unsafe or of an unsupported architecture."""


class CalibrationError(CompressionError, ValueError):
    """A method needs calibration text, and there is none, too little, or none that can be read."""


class TeacherError(CompressionError, ValueError):
    """A teacher cannot teach this student, or its stored outputs cannot be used: the message says why."""


class TrainingError(CompressionError):
    """A training run cannot start, cannot go on from what it left, or came to numbers that are not finite."""


class LayerError(CompressionError, ValueError):
    """A method cannot be applied to a layer: the message names the layer and the limit."""


class BackendError(CompressionError):
    """A library or a kernel that was asked for by name is not available here."""


class ClusterError(CompressionError):
    """A cluster is not there, has too little, or its nodes are unlike this machine."""


class WorkerError(CompressionError):
    """The processes that share a run do not fit together, or one of them is gone."""
