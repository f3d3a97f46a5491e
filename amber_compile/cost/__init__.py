"""What sparsity is worth: time as an expression in the number of tokens, dense and sparse.

    print(cost_of(report, "H100 SXM"))         # per group of sites: formulas, break-even, speed-up

    model        the cost of a report's sites, and the table of it
    rates        what a machine does a second: from datasheets, or measured (measure.py)
    plots        time against tokens, and the roofline

An estimate, unless the rates were measured: each says where it is from.
"""

from .model import ModelCost, SiteCost, cost_of
from .rates import Rates, machines, rates_of, rates_of_device

__all__ = [
    "ModelCost",
    "Rates",
    "SiteCost",
    "cost_of",
    "machines",
    "rates_of",
    "rates_of_device",
]
