"""Groups of inputs that share a scale, where some of the inputs go."""

import math

from compression.errors import LayerError

SMALLEST_GROUP = 32  # that cutting columns may make: the least that kernels take


def sizes_that_tile(group_size: int, cols: int) -> list[int]:
    """Sizes into which groups can be cut so that they tile `cols` inputs, the largest first.

    Raises:
        LayerError: there are none.
    """
    if group_size == -1:
        return [-1]
    common = math.gcd(group_size, cols)
    found = [size for size in range(common, SMALLEST_GROUP - 1, -1) if common % size == 0]
    if not found:
        raise LayerError(
            f"its groups of {group_size} cannot be cut to tile the {cols} inputs that are left: the two have no common "
            f"divisor of {SMALLEST_GROUP} or more; remove before quantizing, or in other numbers"
        )
    return found
