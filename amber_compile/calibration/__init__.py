"""Calibration: from a model and its user's text to a plan.

calibrate       the whole of it
"""

from .calibrate import calibrate, calibration
from .errors import CalibrationError
from .making import Calibration
from .options import CalibrationOptions

__all__ = ["Calibration", "CalibrationError", "CalibrationOptions", "calibrate", "calibration"]
