"""A process for a part of an ablation: ``python -m moejax.ablation.child DIR cell NAME``."""

import sys

from moejax.ablation.runners import child

if __name__ == "__main__":
    sys.exit(child(*sys.argv[1:]))
