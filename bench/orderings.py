"""Pruning, distillation and quantization in every order: the recipes of [O], table 1, and of their first steps."""

from itertools import permutations

_STEPS = ("p", "kd", "nf4")

ORDERS = tuple("-".join(order) for order in permutations(_STEPS))
RECIPES = ("fp16", *(step for step in _STEPS), *("-".join(two) for two in permutations(_STEPS, 2)), *ORDERS)
