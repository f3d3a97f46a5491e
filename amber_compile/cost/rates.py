"""What a machine achieves per second: the numbers that turn work into a time.

    presets/rates.json        peaks of datasheets × efficiencies, each with its source
    measure.py                what the machine at hand achieves

A rate is what large kernels achieve, not a peak. That of a 2:4 matmul is *dense-equivalent*: the
operations of the dense matmul that it replaces, per second. float32 means no TF32, as in PyTorch.

The efficiencies assumed in rates.json are those of an H100: 790 TFLOP/s of 989 dense and 1100 of
1979 with 2:4, the middle of the 1000 to 1200 expected of its kernels before any ran; in eight bits
1350 of 1979 and 1950 of 3958, the middle of 1750 to 2150. Sparse e4m3 has a rate where Amber has a
kernel for it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

import torch

from amber_compile.errors import OptionError, choices
from amber_compile.pattern import Pattern
from amber_compile.settings import FAST

WIDE = ("float32", "bfloat16", "float16")
"""The dtypes of activations and weights that the cost model knows."""
CODES = ("int8", "fp8")
"""The formats that they may be quantised to."""
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}
"""Bytes of an operand of a matmul."""


@dataclass(frozen=True)
class Rates:
    """What one machine achieves.

    Attributes:
        name: of the machine.
        source: measured where and when, or which datasheet and what was assumed of it.
        dense: FLOP/s of a large matmul by dtype (two operations a multiply-accumulate).
        sparse: dense-equivalent FLOP/s of a large 2:4 matmul by dtype; empty without a sparse unit.
        bandwidth: bytes/s of a large copy, read and written bytes together.
        overhead: seconds that a kernel takes beside computing and moving.
        select: bandwidth of a selection pass as a fraction of ``bandwidth``.

    Raises:
        OptionError: for a dtype that is not known, and a number that is not positive and finite
            (``overhead`` may be 0).
    """

    name: str
    source: str
    dense: Mapping[str, float]
    sparse: Mapping[str, float]
    bandwidth: float
    overhead: float
    select: float

    def __post_init__(self) -> None:
        for what in ("dense", "sparse"):
            by_dtype = getattr(self, what)
            for dtype in by_dtype:
                if dtype not in SIZES:
                    raise OptionError(choices(f"dtype of {what}=", dtype, SIZES))
            checked = {
                dtype: _positive(f"{what}[{dtype!r}]", by_dtype[dtype]) for dtype in by_dtype
            }
            object.__setattr__(self, what, checked)
        if not self.dense:
            raise OptionError(f"dense={{}} holds no rate; valid: a rate for any of {list(SIZES)}")
        _positive("bandwidth", self.bandwidth)
        _positive("select", self.select)
        if self.overhead != 0:
            _positive("overhead", self.overhead)

    def has_sparse_unit(self, pattern: Pattern, dtype: str) -> bool:
        """Whether a matmul of ``pattern`` runs on a sparse unit: nothing but 2:4 does."""
        return pattern == FAST and dtype in self.sparse

    def check_dtype(self, dtype: str | torch.dtype) -> str:
        """Return the name of ``dtype``, which must have a dense rate.

        Raises:
            OptionError: if it has none.
        """
        name = str(dtype).removeprefix("torch.")
        valid = [one for one in self.dense if one in WIDE]
        if name not in valid:
            raise OptionError(choices(f"dtype for {self.name}:", name, valid))
        return name

    def to_json(self) -> dict[str, Any]:
        """Return the rates as plain JSON values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Rates:
        """Read what :meth:`to_json` wrote.

        Raises:
            OptionError: if a key is unknown or missing, or a value is invalid.
        """
        known = [field.name for field in fields(cls)]
        for key in data:
            if key not in known:
                raise OptionError(choices("rate", key, known))
        missing = [name for name in known if name not in data]
        if missing:
            raise OptionError(f"rates lack {', '.join(missing)}; needed: {', '.join(known)}")
        return cls(**data)


def machines() -> list[str]:
    """Return the names of the machines whose rates come with the package."""
    return list(_machines())


def rates_of(machine: str | Rates) -> Rates:
    """Return the rates of a machine by its name; rates are returned as they are.

    Raises:
        OptionError: if the name is none of :func:`machines`.
    """
    if isinstance(machine, Rates):
        return machine
    if machine not in _machines():
        raise OptionError(
            f"{choices('machine', machine, _machines())}; others: measure_rates() or Rates(...)"
        )
    return _machines()[machine]


def capability_of(machine: str) -> tuple[int, int]:
    """Return the compute capability of a machine, one of :func:`machines`."""
    rates_of(machine)  # an unknown name is an error
    (told,) = (one["capability"] for one in _data()["machines"] if one["name"] == machine)
    major, minor = told.split(".")
    return int(major), int(minor)


def rates_of_device(device: torch.device | str) -> Rates | None:
    """Return the rates that come with the package for a GPU of this machine, or None."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(device)
    return next(
        (_machines()[one["name"]] for one in _data()["machines"] if one["device"] == name), None
    )


def _positive(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise OptionError(f"{what}={value!r} must be a positive finite number")
    return float(value)


@functools.cache
def _machines() -> dict[str, Rates]:
    return {entry["name"]: _achieved(entry, _data()["assumed"]) for entry in _data()["machines"]}


def _achieved(entry: Mapping[str, Any], assumed: Mapping[str, Any]) -> Rates:
    """Return what is assumed that the machine of a datasheet achieves (TFLOP/s, TB/s there)."""
    assumed = {**assumed, **entry.get("assumed", {})}
    achieved = {
        kind: {dtype: _rate(kind, dtype, peak, assumed) for dtype, peak in entry[kind].items()}
        for kind in ("dense", "sparse")
    }
    return Rates(
        name=entry["name"],
        source=f"{entry['source']}; {assumed['source']}",
        **achieved,
        bandwidth=entry["bandwidth"] * 1e12 * assumed["bandwidth"],
        overhead=assumed["overhead_us"] * 1e-6,
        select=assumed["select"],
    )


def _rate(kind: str, dtype: str, peak: float, assumed: Mapping[str, Any]) -> float:
    """Return what is achieved of a peak in TFLOP/s."""
    share = assumed["in 8 bits"] if dtype in CODES else assumed
    return peak * 1e12 * float(share[kind])


@functools.cache
def _data() -> dict[str, Any]:
    text = resources.files("amber_compile").joinpath("presets", "rates.json").read_text("utf-8")
    data: dict[str, Any] = json.loads(text)
    return data
