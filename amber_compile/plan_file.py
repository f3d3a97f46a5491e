"""The files of a plan: JSON, and beside it the tensors that it names, replaced as one.

    llama.plan                        {..., "tensors": {"file": ..., "id": ..., "bytes": ...}, ...}
    llama.plan.<id>.safetensors       the tensors, under a name that no other content has

Saving writes both drafts, then names the tensors, then the JSON that speaks of them, then removes
the tensors of the plan that was there. Whatever fails or interrupts it, the old plan or the new one
is there, whole. Processes that save one plan at once take turns for the renaming, so the last one
wins; one that loads it meanwhile reads the JSON again if the tensors went with an older one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import PlanError
from .plan_tensors import PlanTensors

Entry = dict[str, Any]
"""What the JSON says of the tensors: file, id, bytes."""

COPY = "a plan with tensors is two files: copy it by Plan.load(...).save(...)"


def save(path: Path, text: Callable[[Entry | None], str], tensors: PlanTensors) -> None:
    """Write ``text`` and ``tensors`` as the plan at ``path``; what was there survives a failure.

    Raises:
        OSError: if the files cannot be written.
        PlanError: if there are tensors, and no safetensors to write them.
    """
    text(None)  # an error in it comes before anything is written
    path = path.resolve()  # a link stays one
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    tensors_draft = draft.with_name(f"{draft.name}.safetensors")
    try:
        entry: Entry | None = None
        if tensors:
            _write_tensors(tensors, tensors_draft)
            name, size = f"{path.name}.{tensors.id}.safetensors", tensors_draft.stat().st_size
            entry = {"file": name, "id": tensors.id, "bytes": size}
        with open(draft, "x", encoding="utf-8") as file:
            file.write(text(entry))
            file.flush()
            os.fsync(file.fileno())
        with _alone_in(path.parent):
            _rename(draft, tensors_draft, path, entry["file"] if entry else None)
    finally:
        for rest in (draft, tensors_draft):
            with contextlib.suppress(OSError):
                os.unlink(rest)


def load(path: Path, where: str) -> tuple[Any, PlanTensors]:
    """Return the JSON at ``path`` and the tensors that it names.

    Raises:
        PlanError: naming the file that is missing, cut short, or not of this plan.
    """
    text = _read(path, where)
    while True:
        try:
            data = json.loads(text)
        except ValueError as cause:
            raise PlanError(f"{where} is cut short or not JSON: {cause}") from cause
        try:
            return data, _open_tensors(path, data, where)
        except PlanError:
            before, text = text, _read(path, where)
            if text == before:
                raise


def _read(path: Path, where: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as cause:
        raise PlanError(f"{where} cannot be read: {cause.strerror}") from cause
    except ValueError as cause:
        raise PlanError(f"{where} is cut short or not JSON: {cause}") from cause


def _open_tensors(path: Path, data: Any, where: str) -> PlanTensors:
    """Open the tensors that a plan's JSON names, and compare them with what it says of them."""
    entry = data.get("tensors") if isinstance(data, dict) else None
    if entry is None:
        return PlanTensors()
    try:
        file = path.resolve().with_name(entry["file"])
        wanted = entry["id"], int(entry["bytes"])
    except (KeyError, TypeError, ValueError) as cause:
        raise PlanError(f"{where} holds an unreadable entry: {cause!r}") from cause
    named = f"{where}: its tensors file {str(file)!r}"
    try:
        size = file.stat().st_size
    except OSError as cause:
        raise PlanError(f"{named} is missing; {COPY}") from cause
    if size < wanted[1]:
        raise PlanError(f"{named} is cut short: {size:,} of {wanted[1]:,} bytes")
    tensors = PlanTensors.open(file)
    if (tensors.id, size) != wanted:
        raise PlanError(f"{named} is of another save of the plan; {COPY}")
    return tensors


def _write_tensors(tensors: PlanTensors, draft: Path) -> None:
    """Write ``tensors`` to ``draft``; those of another file by a link to it, or a copy."""
    if tensors.file is None or not tensors.file.is_file():
        tensors.write(draft)
        return
    try:
        os.link(tensors.file, draft)
    except OSError:  # another disk, or none that knows links
        shutil.copyfile(tensors.file, draft)
        with open(draft, "rb") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process is in here for ``folder``, where its disk knows locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks know none
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
        with contextlib.suppress(OSError):
            os.fsync(handle)  # the new names outlive a power cut
    finally:
        os.close(handle)


def _named_by(path: Path) -> str | None:
    """Return the name of the tensors file of the plan at ``path``, if it has one."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))["tensors"]
        return str(entry["file"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _rename(draft: Path, tensors_draft: Path, path: Path, new: str | None) -> None:
    """Put the drafts in place; of the old and the new tensors only those that are named stay."""
    kept = old = _named_by(path)
    try:
        if new is not None:
            shutil.copymode(draft, tensors_draft)  # as the umask has it
            os.replace(tensors_draft, path.with_name(new))
        os.replace(draft, path)
        kept = new
    finally:
        for name in {old, new} - {kept, None}:
            if Path(str(name)).name == name and name.startswith(f"{path.name}."):
                with contextlib.suppress(OSError):  # tensors of another plan are left alone
                    os.unlink(path.with_name(name))
