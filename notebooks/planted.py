"""The package of this name in the folder above, for kernels that start here, as those of JupyterLab and VS Code do.

Paths start here, too: `pipeline.params.ROOT / "results"` is the folder of results.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
del sys.modules[__name__]
__import__(__name__)  # puts the package in the place of this file
