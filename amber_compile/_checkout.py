"""Find ``passes`` and ``kernels`` beside this folder when it lies in a source checkout.

A wheel holds them inside the package, an editable install maps them; a bare checkout on
``sys.path`` (Python started in the repository's root) does neither. Not by ``__path__``: with the
root on it, ``amber_compile.amber_compile.amber_compile...`` could be imported as well.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"amber_compile.passes": ROOT / "passes", "amber_compile.kernels": ROOT / "kernels"}


class CheckoutFinder:
    """Finds the two subpackages where nothing else does."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return where ``fullname`` lies, if it is one of the two."""
        folder = FOLDERS.get(fullname)
        if folder is None:
            return None
        return spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


if (ROOT / "pyproject.toml").is_file() and all(folder.is_dir() for folder in FOLDERS.values()):
    sys.meta_path.append(CheckoutFinder)
