"""``amber operators``: the operators as a library, for processes that have PyTorch and no Amber.

    amber operators -o libamber_ops.so
    amber operators -o libamber_ops.so --march x86-64-v3

Programs that were exported, rewritten and packaged need it to run: docs/integrations/export.md.
"""

from __future__ import annotations

import argparse

from amber_compile.kernels.operator_library import FILE_NAME, NATIVE, build_operator_library

HELP = "compile the operators into a library that PyTorch loads without Amber"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("-o", "--output", metavar="FILE", default=FILE_NAME, help=FILE_NAME)
    parser.add_argument(
        "--march",
        default=NATIVE,
        help="the CPU it is for, as the compiler's -march= has it (native: this one)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Compile the library and print its path."""
    print(build_operator_library(arguments.output, arguments.march))
    return 0
