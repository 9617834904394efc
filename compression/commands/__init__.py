"""What `python -m compression` does beside compressing: list, and convert between formats."""
