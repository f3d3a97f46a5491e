"""The tensors of a plan: what calibration measured and fitted, by site and name.

    tensors.get("model.layers.0.mlp.down_proj", "factor")   ->  fp32 [K], or None

| name | shape | what it is |
|---|---|---|
| factor | fp32 [K] | score factor of each input channel |
| absmax | fp32 [K] | largest absolute input of each channel, before smoothing |
| smooth | fp32 [K] | what the input is multiplied by before it is quantised (smoothing.py) |
| output_scale, output_bias | fp32 [N] | α and β of y·α + β behind the product |
| weight | float [N, K] | W*, the weight that prefill multiplies by |
| permutation | int32 [K] | channel j of the plan is channel ``permutation[j]`` of the model |
| first_row | bf16 [K] | W[0] in the plan's order: tells whether a model is permuted |

Experts have E of each, in front. They are read when they are asked for: mapped from a safetensors
file, so that opening one takes no time and no memory, whatever its size. A collection is a value:
it is made, saved and loaded under one random ``id``, by which it is compared. What :meth:`get`
returns is shared, not copied; that somebody wrote to it in place is noticed.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .errors import PlanError, choices

KINDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "factor": ("K", ("F32",)),
    "absmax": ("K", ("F32",)),
    "smooth": ("K", ("F32",)),
    "output_scale": ("N", ("F32",)),
    "output_bias": ("N", ("F32",)),
    "weight": ("NK", ("F64", "F32", "BF16", "F16")),
    "permutation": ("K", ("I32",)),
    "first_row": ("K", ("BF16",)),
}
"""Name -> which dimensions of the weight a tensor has, and its dtypes as safetensors calls them."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int32: "I32",
}
SIZES = {name: dtype.itemsize for dtype, name in DTYPES.items()}
ID = "amber_plan_tensors"
"""The key of the id among the metadata of a file."""

Key = tuple[str, str]
Form = tuple[tuple[int, ...], str]
"""Shape and dtype."""


class PlanTensors:
    """Site -> name -> tensor; immutable, compared by identity of content."""

    __slots__ = ("_file", "_forms", "_held", "_id", "_source", "_versions")

    def __init__(self, tensors: Mapping[str, Mapping[str, torch.Tensor]] | None = None) -> None:
        given = {
            (site, name): one for site, own in (tensors or {}).items() for name, one in own.items()
        }
        self._id = uuid.uuid4().hex if given else ""
        self._file: Path | None = None
        self._source: Any = None
        self._held = {key: _kept(key, tensor) for key, tensor in given.items()}
        self._versions = {key: tensor._version for key, tensor in self._held.items()}
        self._forms = {key: _form(key, tensor) for key, tensor in self._held.items()}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> PlanTensors:
        """Open what :meth:`write` wrote; nothing but the header is read.

        Raises:
            PlanError: if the file is missing, cut short, or holds no plan's tensors.
        """
        opened, where = cls(), f"tensors file {os.fspath(path)!r}"
        safetensors = _safetensors(where)
        opened._file = Path(path).resolve()
        try:
            opened._source = source = safetensors.safe_open(opened._file, "pt")
        except (OSError, RuntimeError) as cause:  # the latter from torch, which maps it
            raise PlanError(f"{where} cannot be read: {cause}") from cause
        except safetensors.SafetensorError as cause:
            raise PlanError(f"{where} is cut short or damaged: {cause}") from cause
        opened._id = (source.metadata() or {}).get(ID, "")
        if not opened._id:
            raise PlanError(f"{where} holds no plan's tensors: its metadata have no {ID!r}")
        for full in source.keys():  # noqa: SIM118  # no mapping
            part = source.get_slice(full)
            site, _, name = full.rpartition(".")
            opened._forms[site, name] = tuple(part.get_shape()), part.get_dtype()
        return opened

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write all tensors to a new file, and wait until they are on the disk.

        Raises:
            OSError: if that fails; part of the file may be there.
            PlanError: without safetensors.
        """
        safetensors = _safetensors(f"tensors file {os.fspath(path)!r}")
        values = {".".join(key): self._read(key) for key in self._forms}
        try:
            safetensors.torch.save_file(values, path, metadata={ID: self._id})
        except safetensors.SafetensorError as cause:  # it hides the OSError
            raise OSError(f"tensors file {os.fspath(path)!r} cannot be written: {cause}") from cause
        with open(path, "rb") as file:
            os.fsync(file.fileno())

    @property
    def id(self) -> str:
        """Of this content, "" if there is none: two loads of one file have the same."""
        return self._id

    @property
    def file(self) -> Path | None:
        """Where the tensors lie, or None if they are in memory."""
        return self._file

    def get(self, site: str, name: str) -> torch.Tensor | None:
        """Return a tensor on the CPU, or None; to be read only: it is shared.

        Raises:
            PlanError: if somebody wrote to it in place.
        """
        return self._read((site, name)) if (site, name) in self._forms else None

    def names(self, site: str) -> tuple[str, ...]:
        """Return the names of the tensors of ``site``."""
        return tuple(name for owner, name in self._forms if owner == site)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that have tensors."""
        return tuple(dict.fromkeys(site for site, _ in self._forms))

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(map(_nbytes, self._forms.values()))

    def bytes_of(self, name: str) -> int:
        """Return the size of the tensors of one name."""
        return sum(_nbytes(form) for (_, other), form in self._forms.items() if other == name)

    def words(self, site: str, name: str) -> str | None:
        """Return dtype and shape of a tensor, such as ``F32 [4096]``, or None."""
        shape, dtype = self._forms.get((site, name), ((), ""))
        return f"{dtype} {list(shape)}" if dtype else None

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Refuse tensors of unknown sites or names, or of sizes that their weights do not have.

        Raises:
            PlanError: naming the first one that is wrong.
        """
        for (site, name), form in self._forms.items():
            if site not in shapes:
                raise PlanError(choices("site of a tensor", site, shapes))
            if name not in KINDS:
                raise PlanError(f"site {site!r}: {choices('tensor', name, KINDS)}")
            dimensions, dtypes = KINDS[name]
            *experts, rows, columns = shapes[site]
            sizes = {"N": rows, "K": columns}
            wanted = (*experts, *(sizes[one] for one in dimensions))
            if form[0] != wanted or form[1] not in dtypes:
                raise PlanError(
                    f"site {site!r}: its tensor {name!r} is {form[1]} {list(form[0])}; for a "
                    f"weight {list(shapes[site])} it must be {' or '.join(dtypes)} {list(wanted)}"
                )

    def to_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the tensors as nested dicts, from which a changed collection can be made."""
        found: dict[str, dict[str, torch.Tensor]] = {site: {} for site in self.sites}
        for site, name in self._forms:
            found[site][name] = self._read((site, name))
        return found

    def _read(self, key: Key) -> torch.Tensor:
        if key not in self._held:
            # the same plain tensor, whoever asks: not under a fake or inference mode
            with torch.inference_mode(False), _disable_current_modes():
                tensor = self._source.get_tensor(".".join(key))
            self._versions[key] = tensor._version
            self._held[key] = tensor
        held = self._held[key]
        if held._version != self._versions[key]:
            raise PlanError(
                f"site {key[0]!r}: tensor {key[1]!r} of the plan was written to in place; "
                "clone() it before, and make a new PlanTensors of what has changed"
            )
        return held

    def __len__(self) -> int:
        return len(self._forms)

    def __eq__(self, other: object) -> bool:
        return self._id == other._id if isinstance(other, PlanTensors) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._id)

    def __repr__(self) -> str:
        return f"PlanTensors({len(self)} of {len(self.sites)} sites, {self.nbytes:,} bytes)"

    def __reduce__(self) -> tuple[Any, ...]:
        if self._file is not None:  # by its path: the other process maps the same pages
            return _reopened, (self._file, self._id)
        return _remade, (self.to_dict(), self._id)


def _reopened(path: Path, id: str) -> PlanTensors:
    opened = PlanTensors.open(path)
    if opened.id != id:
        raise PlanError(f"tensors file {os.fspath(path)!r} was replaced by those of another plan")
    return opened


def _remade(tensors: Mapping[str, Mapping[str, torch.Tensor]], id: str) -> PlanTensors:
    made = PlanTensors(tensors)
    made._id = id
    return made


def _kept(key: Key, tensor: object) -> torch.Tensor:
    """Return ``tensor`` as it is kept: plain, contiguous, on the CPU; copied only if it is not."""
    if not isinstance(tensor, torch.Tensor):
        raise PlanError(f"site {key[0]!r}: {key[1]!r} is a {type(tensor).__name__}, no tensor")
    with torch.inference_mode(False), torch.no_grad():
        kept = tensor.detach().cpu().contiguous()
        return kept.clone() if kept.is_inference() else kept


def _form(key: Key, tensor: torch.Tensor) -> Form:
    if tensor.dtype not in DTYPES:
        valid = map(str, DTYPES)
        raise PlanError(
            f"site {key[0]!r}: {choices(f'dtype of {key[1]!r}', str(tensor.dtype), valid)}"
        )
    return tuple(tensor.shape), DTYPES[tensor.dtype]


def _nbytes(form: Form) -> int:
    return math.prod(form[0]) * SIZES[form[1]]


def _safetensors(what: str) -> Any:
    """Import safetensors.

    Raises:
        PlanError: if it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as cause:
        raise PlanError(
            f"{what} needs safetensors: pip install 'amber-compile[calibrate]'"
        ) from cause
    return safetensors
