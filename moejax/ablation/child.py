"""One cell of an ablation as a process: ``python -m moejax.ablation.child DIR CELL [CORES]``."""

import sys

from moejax.ablation.runners import child

if __name__ == "__main__":
    sys.exit(child(*sys.argv[1:]))
