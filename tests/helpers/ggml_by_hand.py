"""Q4_K and Q6_K as ggml rounds them, one number after the other in fp32; the oracle of `compression.numeric.ggml`."""

import numpy as np

F = np.float32


def _nearest(value, low, high):
    return F(min(high, max(low, int(np.rint(value)))))


def _weighted_error(x, weights, scale, low, codes):
    error = F(0)
    for value, weight, code in zip(x, weights, codes, strict=True):
        difference = scale * code + low - value
        error += weight * (difference * difference)
    return error


def scale_and_minimum(x, steps=15):
    """Of a group: the scale, what is subtracted, and the codes."""
    squares = F(0)
    for value in x:
        squares += value * value
    weights = [np.sqrt(squares / F(len(x))) + abs(value) for value in x]
    total, moment = F(0), F(0)
    for value, weight in zip(x, weights, strict=True):
        total += weight
        moment += weight * value
    low, high = min(F(0), min(x)), max(x)
    if low == high:
        return F(0), -low, [F(0)] * len(x)
    inverse = F(steps) / (high - low)
    scale, codes = F(1) / inverse, [_nearest(inverse * (value - low), 0, steps) for value in x]
    best = _weighted_error(x, weights, scale, low, codes)
    for step in range(21):
        inverse = (F(-1) + F(0.1) * F(step) + F(steps)) / (high - low)
        tried = [_nearest(inverse * (value - low), 0, steps) for value in x]
        sum_l, sum_l2, sum_xl = F(0), F(0), F(0)
        for value, weight, code in zip(x, weights, tried, strict=True):
            sum_l += weight * code
            sum_l2 += weight * code * code
            sum_xl += weight * code * value
        determinant = total * sum_l2 - sum_l * sum_l
        if determinant <= 0:
            continue
        fitted = (total * sum_xl - moment * sum_l) / determinant
        least = (sum_l2 * moment - sum_l * sum_xl) / determinant
        if least > 0:
            fitted, least = sum_xl / sum_l2, F(0)
        error = _weighted_error(x, weights, fitted, least, tried)
        if error < best:
            best, scale, low, codes = error, fitted, least, tried
    return scale, -low, codes


def scale_around_zero(x, middle=32):
    """Of a group: the scale, and codes that are lifted by the middle."""
    largest = max(x, key=abs)  # the first of several
    if abs(largest) < 1e-15:
        return F(0), [F(0)] * len(x)
    scale = best = codes = None
    for step in (0, *range(-9, 0), *range(1, 10)):
        inverse = -(F(middle) + F(0.1) * F(step)) / largest
        tried = [_nearest(inverse * value, -middle, middle - 1) for value in x]
        products, squares = F(0), F(0)
        for value, code in zip(x, tried, strict=True):
            products += value * value * value * code
            squares += value * value * code * code
        if best is None or (squares > 0 and products * products > best * squares):
            scale = products / squares if squares else F(0)
            best, codes = scale * products, [code + middle for code in tried]
    return scale, codes


def q4_k(x):
    """144 bytes of 256 weights."""
    groups = x.reshape(8, 32)
    scales, minima, codes = zip(*(scale_and_minimum(list(group)) for group in groups), strict=True)
    top, deepest = max(F(0), *scales), max(F(0), *minima)
    six = [_nearest(F(63) / top * each, 0, 63) if top > 0 else F(0) for each in scales]
    lows = [_nearest(F(63) / deepest * each, 0, 63) if deepest > 0 else F(0) for each in minima]
    d, dmin = np.float16(top / F(63)), np.float16(deepest / F(63))
    found = []
    for group, s, m, first in zip(groups, six, lows, codes, strict=True):
        step, offset = F(d) * s, F(dmin) * m
        found.append([int(_nearest((value + offset) / step, 0, 15)) for value in group] if step else map(int, first))
    found = [list(each) for each in found]
    packed, s, m = [0] * 12, list(map(int, six)), list(map(int, lows))
    for i in range(4):
        packed[i] = s[i] | s[i + 4] >> 4 << 6
        packed[i + 4] = m[i] | m[i + 4] >> 4 << 6
        packed[i + 8] = s[i + 4] & 15 | (m[i + 4] & 15) << 4
    quants = [low | high << 4 for i in range(0, 8, 2) for low, high in zip(found[i], found[i + 1], strict=True)]
    return d.tobytes() + dmin.tobytes() + bytes(packed) + bytes(quants)


def q6_k(x):
    """210 bytes of 256 weights."""
    groups = x.reshape(16, 16)
    scales, codes = zip(*(scale_around_zero(list(group)) for group in groups), strict=True)
    largest = max(scales, key=abs)
    if abs(largest) < 1e-15:
        return bytes(210)
    inverse = F(-128) / largest
    d, eight = np.float16(F(1) / inverse), [_nearest(inverse * scale, -128, 127) for scale in scales]
    found = []
    for group, s, first in zip(groups, eight, codes, strict=True):
        step = F(d) * s
        found += [int(_nearest(value / step, -32, 31)) + 32 for value in group] if step else map(int, first)
    low, high = bytearray(128), bytearray(64)
    for i, code in enumerate(found):
        half, place = divmod(i, 128)
        low[half * 64 + place % 64] |= (code & 15) << 4 * (place // 64)
        high[half * 32 + place % 32] |= (code >> 4) << 2 * (place // 32)
    return bytes(low) + bytes(high) + np.array(eight, np.int8).tobytes() + d.tobytes()
