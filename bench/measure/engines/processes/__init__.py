"""What an engine's own Python runs, one file per engine; they import the standard library and their engine alone.

A file is started by its path, so that its neighbour `serving` is found beside it. Nothing of `bench` or `compression`
is installed in that environment.
"""
