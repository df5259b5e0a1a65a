"""The package `diptych` of a clone in which nothing is installed.

`python -m face` puts the folder above on the path, so that `import diptych` finds this file. The
path below is that of an installation: the modules of `face/` and, beside it, the other packages.
"""

from importlib import import_module
from pathlib import Path

_CLONE = Path(__file__).resolve().parents[3]
__path__ = [str(_CLONE / "face"), str(_CLONE)]

__all__, __getattr__, __dir__ = import_module("diptych._lazy").lazy_names(
    __name__, str(_CLONE / "face" / "__init__.py")
)
