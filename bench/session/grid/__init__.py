"""The grid of recipes over machines: each recipe is a task of a Ray cluster, measured there as it is here."""
