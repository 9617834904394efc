"""Ways in which a file gets damaged: each takes sound bytes and a seeded `random.Random`, and returns other bytes."""

import json


def truncated(data, numbers):
    return data[: numbers.randrange(len(data))]


def bits_flipped(data, numbers):
    spoiled = bytearray(data)
    for _ in range(numbers.choice((1, 1, 1, 2, 5))):
        spoiled[numbers.randrange(len(data))] ^= 1 << numbers.randrange(8)
    return bytes(spoiled)


def block_zeroed(data, numbers):
    """As a file system leaves blocks that it had not written yet."""
    at = numbers.randrange(len(data))
    return data[:at] + bytes(len(data[at : at + 64])) + data[at + 64 :]


def bytes_lost(data, numbers):
    at = numbers.randrange(len(data))
    return data[:at] + data[at + numbers.randrange(1, 20) :]


def part_is_there_twice(data, numbers):
    lines = data.split(b"\n")
    at = numbers.randrange(len(lines))
    return b"\n".join([*lines[: at + 1], *lines[at:]])


def table_changed(table, numbers):
    """A copy of what JSON holds with one thing in it gone, renamed, or of another value or type."""
    table = json.loads(json.dumps(table))
    at, places = table, []
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
        if not keys:
            break
        places.append((at, key := numbers.choice(keys)))
        at = at[key]
    holder, key = numbers.choice(places)
    change = numbers.choice(("gone", "renamed", "value"))
    if change == "renamed" and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif change == "value":
        others = [each for each in (None, -1, 0.5, "x", [], {}, True, [1], {"a": 1}, 10**400) if each != holder[key]]
        holder[key] = numbers.choice(others)
    else:
        del holder[key]
    return table


def document_changed(data, numbers):
    """The schema of a JSON file is damaged, its layout kept."""
    return json.dumps(table_changed(json.loads(data), numbers), indent=2).encode()


def line_changed(data, numbers):
    """The schema of one of many JSON lines is damaged."""
    lines = data.split(b"\n")
    at = numbers.randrange(len(lines) - 1)
    lines[at] = json.dumps(table_changed(json.loads(lines[at]), numbers)).encode()
    return b"\n".join(lines)


ANYWHERE = (truncated, bits_flipped, block_zeroed, bytes_lost, part_is_there_twice)
