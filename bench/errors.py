"""The exceptions of the measurements.

    BenchError
    ├── OptionError      a command-line option has a value that cannot be
    ├── DataError        a data folder or data set is not there or not of its form
    ├── MetricError      a metric gave no finite number, or was declared twice
    ├── NotAvailable     this device or library cannot do it, which is nobody's fault; the row says so
    ├── EngineError      an engine that serves a checkpoint is not there, ends, or answers what it was not asked
    ├── JudgeError       the judge cannot be asked, or what it answers cannot be kept
    ├── JournalError     the journal of results cannot be written or read
    └── BaselineError    a baseline is not JSON, of another schema, or holds rows that cannot be

Every message says what must be, what was got, and what to do.
"""


class BenchError(Exception):
    """Base class: catches everything that the measurements raise on purpose."""


class OptionError(BenchError, ValueError):
    """An option of the command has a value that is not allowed."""


class DataError(BenchError):
    """Data that a measurement needs is absent or malformed."""


class MetricError(BenchError, ValueError):
    """A metric did not yield a finite number, or two metrics have one name."""


class NotAvailable(BenchError):
    """What was asked for cannot be had with this device, library or kernel."""


class EngineError(BenchError):
    """An engine is not installed, cannot open a checkpoint, ends or hangs, or its answer is none to what was asked."""


class JudgeError(BenchError):
    """The model that judges answers cannot be asked, refuses, or its replies cannot be kept."""


class JournalError(BenchError):
    """The journal cannot be written, or a line of it cannot be understood."""


class BaselineError(BenchError, ValueError):
    """A baseline file cannot be used: the message names the file and the row."""
