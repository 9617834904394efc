"""Other machines through Ray (extra `ray`): it places and retries; results are files on a disk that all nodes see."""
