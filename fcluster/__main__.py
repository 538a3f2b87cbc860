"""`python -m fcluster` is the command `fcluster`."""

from __future__ import annotations

from fcluster.cli.main import main

if __name__ == "__main__":
    main()
