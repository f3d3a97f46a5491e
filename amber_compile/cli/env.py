"""``amber env``: what this machine can run, and why not the rest."""

from __future__ import annotations

import argparse
import json

from amber_compile.environment import Environment, Gpu, environment

HELP = "what this machine can run, and why not the rest"
MASKED = "dense product of the masked activation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("--json", action="store_true", help="for machines")


def run(arguments: argparse.Namespace) -> int:
    """Print what there is."""
    found = environment()
    print(json.dumps(found.to_json(), indent=2) if arguments.json else describe(found))
    return 0


def describe(found: Environment) -> str:
    """Return the facts for people."""
    versions = ", ".join(f"{name} {of or 'not installed'}" for name, of in found.versions.items())
    lines = [versions, "", f"CPU    {found.cpu}", f"       selection     {found.cpu_kernel}"]
    lines += [f"       projections   {MASKED}: a CPU has no sparse unit", ""]
    if found.no_gpu:
        return "\n".join([*lines, f"GPU    none: {found.no_gpu}"])
    return "\n".join(
        [*lines, *(line for at, gpu in enumerate(found.gpus) for line in _gpu(at, gpu))]
    )


def _gpu(at: int, gpu: Gpu) -> list[str]:
    lines = [f"GPU {at}  {gpu.name}, compute capability {gpu.capability}"]
    lines.append(f"       selection     {gpu.selection}")
    for kind, product in gpu.products.items():
        how = product or f"{MASKED}: {gpu.reasons[kind]}"
        lines.append(f"       2:4 {kind:<9} {how}")
    return [*lines, f"       other N:M     {MASKED}: only 2:4 has a sparse instruction", ""]
