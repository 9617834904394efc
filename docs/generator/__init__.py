"""Pages of docs/reference/ that are made from the code: `python docs/generate.py` writes them."""
