"""The references of `tests/processing` and `tests/interop` serve here too."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / name) for name in ("processing", "interop")]
