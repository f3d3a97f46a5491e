"""What can go wrong while a model is calibrated."""

from __future__ import annotations

from amber_compile.errors import AmberError


class CalibrationError(AmberError, RuntimeError):
    """The text, the model or the kept progress does not allow a calibration."""
