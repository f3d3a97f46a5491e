"""The command line: ``amber COMMAND …``, each command a module of this package.

    calibrate  plan what to sparsify in a model, from your own text
    check      what sparsity changes in a model that reads a text, worst sites first
    eval       what sparsity costs a model on a text: loss, KL, top-1, generation, tasks
    env        what this machine can run, and why not the rest
    explain    what would be sparse in a model, why the rest is not, and what it is worth
    operators  the operators as a library, for processes that have PyTorch and no Amber
    plan       what a plan holds, and how two of them differ

A command module has ``HELP`` (one line), ``add_arguments(parser)`` and ``run(arguments)``, which
prints and returns the exit status. Bad input is a message on stderr and status 2.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from amber_compile.errors import AmberError

COMMANDS = ("calibrate", "check", "env", "eval", "explain", "operators", "plan")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    parser = argparse.ArgumentParser(prog="amber", description="N:M activation sparsity for LLMs")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f".{name}", __name__)
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    chosen = parser.parse_args(arguments)
    try:
        status: int = chosen.run(chosen)
    except AmberError as error:
        print(f"amber {chosen.command}: {error}", file=sys.stderr)
        return 2
    return status
