"""Text that every Python interpreter carries: its standard library and its documentation.

    documents("train")    ->  about 95 % of the source files, help topics and module pages
    documents("heldout")  ->  the rest, chosen by a hash of each document's own path

A path is relative to the library (``asyncio/queues.py``, ``topics/lambda.txt``,
``pydoc/zlib.txt``), so a document held out in one Python version is held out in every other.
Left out: installed packages, files made for one machine (``_sysconfigdata``), sources in other
dialects, whatever is not UTF-8, and the parts of a module page that show values of the running
process (``os.environ``) instead of documentation.
"""

import hashlib
import os
import pydoc
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

Split = Literal["train", "heldout"]

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "pydoc_data"}
NOT_SOURCE = ("_sysconfigdata", "config-", "lib2to3/tests/data/", "test/test_lib2to3/data/")
NOT_PUBLIC = ("_test", "_xx", "xx")
TESTS_AND_TABLES = {"test", "tests", "idle_test", "encodings"}


@dataclass(frozen=True)
class Document:
    """One source file, help topic or module page, named by its path in the library."""

    path: str
    text: str

    @property
    def is_test_or_table(self) -> bool:
        """Whether this is a test or a generated table, rather than code or prose to read."""
        return not TESTS_AND_TABLES.isdisjoint(self.path.split("/"))


def documents(split: Split) -> list[Document]:
    """Return the documents of ``split`` in the order of their paths."""
    paths = [*_source_paths(), *_topic_paths(), *_module_paths()]
    mine = sorted(path for path in paths if split_of(path) == split)
    return [Document(path, text) for path in mine if (text := _read(path).strip())]


def split_of(path: str) -> Split:
    """Return the side ``path`` falls on: 13 paths of 256, one in twenty, are held out."""
    return "heldout" if hashlib.sha256(path.encode()).digest()[0] < 13 else "train"


def _source_paths() -> Iterator[str]:
    for folder, subfolders, files in os.walk(LIBRARY):
        subfolders[:] = set(subfolders) - NOT_LIBRARY
        inside = Path(folder).relative_to(LIBRARY)
        paths = ((inside / file).as_posix() for file in files if file.endswith(".py"))
        yield from (path for path in paths if not path.startswith(NOT_SOURCE))


def _topic_paths() -> Iterator[str]:
    return (f"topics/{name}.txt" for name in topics)


def _module_paths() -> Iterator[str]:
    """Name a page for every compiled module; the others are documented by their source."""
    for name in sys.stdlib_module_names:
        if not name.startswith(NOT_PUBLIC) and _is_compiled(name):
            yield f"pydoc/{name}.txt"


def _is_compiled(module: str) -> bool:
    spec = find_spec(module)
    origin = (spec and spec.origin) or "missing"
    return origin == "built-in" or origin.endswith((".so", ".pyd"))


def _read(path: str) -> str:
    """Return the text of a document, or nothing where it is not UTF-8 or not importable."""
    if path.endswith(".py"):
        try:
            return (LIBRARY / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return ""
    folder, name = path.removesuffix(".txt").split("/")
    return topics[name] if folder == "topics" else _module_page(name)


def _module_page(module: str) -> str:
    """Return what ``help(module)`` shows, up to the module's values and its location."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            page = pydoc.plain(pydoc.render_doc(module, title="Help on %s"))
        except (ImportError, pydoc.ErrorDuringImport):
            return ""
    return page.partition("\nDATA\n")[0].partition("\nFILE\n")[0]
