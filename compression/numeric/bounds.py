"""Bounds of the numbers that losses take. Imports no torch: settings of methods are checked here too."""

import math

from compression.errors import RecipeError


def check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise RecipeError(f"temperature={temperature}: must be above 0; [O] takes 4, [E] 2")


def check_beta(beta: float) -> None:
    if not 0 < beta < 1:
        raise RecipeError(f"beta={beta}: allowed is what lies between 0 and 1; the ends are forward_kl and reverse_kl")
