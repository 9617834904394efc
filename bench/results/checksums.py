"""Lines of a journal in the file: each ends with a checksum of the rest of the line.

    {"time": 1.0, "run": "r", ..., "check": "5f0c1b7a"}

The check is the CRC-32 of the bytes before it, eight hexadecimal digits: a line in which up to 32 neighbouring bits
were changed never passes, any other damage with a chance of 2**-32. Lines that older versions wrote have none.
"""

import re
import zlib

_SEAL = b', "check": "%08x"}'
_SEALED = re.compile(rb'(\{.*), "check": "([0-9a-f]{8})"\}', re.DOTALL)
_BEGIN, _END = re.compile(rb'\{"time": '), re.compile(rb', "check": "[0-9a-f]{8}"\}')


def sealed(text: str) -> bytes:
    """The text of a JSON table with its check value, without a line end.

    >>> sealed('{"time": 1.0}')
    b'{"time": 1.0, "check": "644f0cb5"}'
    """
    content = text.encode()[:-1]
    return content + _SEAL % zlib.crc32(content)


def is_sealed(line: bytes) -> bool:
    """Whether the line ends with a check, whatever its value."""
    return _SEALED.fullmatch(line) is not None


def opened(line: bytes) -> str:
    """The text of a line without its check; raises ValueError where it is not what was written."""
    found = _SEALED.fullmatch(line)
    if found is None:
        return line.decode()
    if found[2] != b"%08x" % zlib.crc32(found[1]):
        raise ValueError(f"it was changed: its checksum is {found[2].decode()}, its content has {_crc(found[1])}")
    return (found[1] + b"}").decode()


def _crc(content: bytes) -> str:
    return f"{zlib.crc32(content):08x}"


def whole_in(line: bytes) -> list[bytes]:
    """The whole lines, by their check, within a damaged one: two of them where the line end between was lost."""
    found, end = [], 0
    for begin in _BEGIN.finditer(line):
        if begin.start() < end:
            continue
        for seal in _END.finditer(line, begin.end()):
            piece = line[begin.start() : seal.end()]
            try:
                opened(piece)
            except ValueError:
                continue
            found.append(piece)
            end = seal.end()
            break
    return found
