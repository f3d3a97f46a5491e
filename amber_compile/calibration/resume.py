"""What an interrupted calibration has measured so far, in a folder, to go on from.

    folder/run.json                    what is calibrated: digests of model, data and options
    folder/STAGE.rank0.safetensors     sums and maxima of one pass, and how many batches are in them

Every file is written beside its place and then moved there, so an interruption at any moment,
``kill -9`` included, leaves the state before or after a write. A folder of another model, of other
text or of other options is refused, with what differs. A folder that cannot be written to is a
warning: the calibration goes on, and could not be resumed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from . import distributed
from .errors import CalibrationError

RUN = "run.json"
FORMAT = "amber-calibration"
VERSION = 1
SAMPLED = 1024
"""Elements of a parameter whose place counts in a digest; of the others only the sum does."""


@dataclass
class Checkpoint:
    """A folder of one calibration; ``folder`` None keeps nothing.

    Raises:
        CalibrationError: if the folder holds another calibration, or cannot be read.
    """

    folder: Path | None
    facts: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.folder is None:
            return
        told = {"format": FORMAT, "version": VERSION, "ranks": distributed.ranks(), **self.facts}
        told = json.loads(json.dumps(told))
        held = _read_facts(self.folder / RUN)
        if held is None:
            self._write(RUN, lambda path: path.write_text(json.dumps(told, indent=1) + "\n"))
        else:
            _check_same(held, told, self.folder)

    def load(self, stage: str) -> tuple[dict[str, Tensor], int]:
        """Return what ``stage`` has measured, and from how many of this rank's batches."""
        path = self._path(stage)
        if path is None or not path.is_file():
            return {}, 0
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                read = int((file.metadata() or {})["batches"])
                return {key: file.get_tensor(key) for key in file.keys()}, read  # noqa: SIM118  # no dict
        except (OSError, SafetensorError, KeyError, ValueError) as cause:
            raise CalibrationError(
                f"{os.fspath(path)!r} is damaged ({cause}): delete it"
            ) from cause

    def save(self, stage: str, tensors: Mapping[str, Tensor], batches: int) -> None:
        """Keep what ``stage`` has measured from the first ``batches`` of this rank."""
        path = self._path(stage)
        if path is None:
            return
        from safetensors.torch import save_file

        held = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        known = {"batches": str(batches)}
        self._write(path.name, lambda draft: save_file(held, draft, known))

    def _path(self, stage: str) -> Path | None:
        return (
            self.folder
            and self.folder / f"{stage.replace(' ', '-')}.rank{distributed.rank()}.safetensors"
        )

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        assert self.folder is not None
        draft = self.folder / f".{name}.{uuid.uuid4().hex}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(draft)
            os.replace(draft, self.folder / name)
        except Exception as cause:  # OSError, or safetensors' own for a full disk
            message = f"progress cannot be kept in {os.fspath(self.folder)!r}: {cause}"
            warnings.warn(f"{message}; the calibration goes on", stacklevel=2)
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)


def _read_facts(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        if facts["format"] != FORMAT or facts["version"] != VERSION:
            raise ValueError(f"format {facts['format']!r}, version {facts['version']!r}")
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise CalibrationError(
            f"resume: {os.fspath(path)!r} is no state of a calibration ({cause}); "
            "name another folder"
        ) from cause
    return facts


def _check_same(held: Mapping[str, Any], told: Mapping[str, Any], folder: Path) -> None:
    """Refuse a folder whose facts are others than ``told``, naming them."""
    before, now = _flat(held), _flat(told)
    differing = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    if differing:
        raise CalibrationError(
            f"resume: {os.fspath(folder)!r} belongs to another calibration: "
            f"{'; '.join(differing)}. Repeat that one, or name another folder"
        )


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``facts`` with a dotted key for each value of a mapping inside."""
    found: dict[str, Any] = {}
    for key, value in facts.items():
        inside = isinstance(value, Mapping)
        found |= {f"{key}.{name}": one for name, one in value.items()} if inside else {key: value}
    return found


# ---- digests -------------------------------------------------------------------------------------


def model_digest(model: nn.Module) -> str:
    """Return a digest of names, shapes, types and values of the parameters of ``model``."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        held = f"{name} {parameter.dtype} {tuple(parameter.shape)} ".encode()
        digest.update(held + _values(parameter.detach()))
    return digest.hexdigest()[:16]


def data_digest(batches: Sequence[Any]) -> str:
    """Return a digest of everything that the batches hold."""
    digest = hashlib.sha256()
    for batch in batches:
        leaves, structure = tree_flatten(batch)
        digest.update(repr(structure).encode())
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                digest.update(f"{leaf.dtype} {tuple(leaf.shape)} ".encode() + _bytes(leaf))
            else:
                digest.update(repr(leaf).encode())
    return digest.hexdigest()[:16]


def _values(values: Tensor) -> bytes:
    """Return the sum of the bits of ``values``, which no order changes, and a sample of them."""
    flat = values.flatten()
    sample = flat[:: max(1, flat.numel() // SAMPLED)]
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return str(int(flat.view(width).sum(dtype=torch.int64))).encode() + _bytes(sample)


def _bytes(values: Tensor) -> bytes:
    return values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
