"""A bar on stderr."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any, TypeVar

Item = TypeVar("Item")


def bar(items: Iterable[Item], what: str, shown: bool, total: int | None = None) -> Iterable[Item]:
    """Return ``items``, and show on a bar how many were taken.

    Raises:
        ImportError: if it is to be shown and tqdm is not installed.
    """
    if not shown:
        return items
    try:
        tqdm: Any = importlib.import_module("tqdm").tqdm
    except ImportError as cause:
        raise ImportError(
            "a progress bar needs tqdm: pip install 'amber-compile[calibrate]', or progress=False"
        ) from cause
    counted: Iterable[Item] = tqdm(items, desc=what, total=total, leave=False)
    return counted
