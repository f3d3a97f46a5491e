"""Rows as ``gpu_gemm`` yields them, made up."""

from __future__ import annotations

from gpu_variants import AMBER, COMPRESS, DENSE


def row(library: str, kind: str, stage: str, seconds: float | None, **more: object) -> dict:
    head = {"model": "", "channels": 4096, "outputs": 14336, "tokens": 2048, "note": ""}
    time = (
        {"error": "wrong"}
        if seconds is None
        else {"seconds": seconds, "per_second": 1e12 / seconds}
    )
    return {**head, "library": library, "kind": kind, "stage": stage, **time, **more}


ROWS = [
    row(DENSE, "bf16", "multiply", 3.0),
    row(DENSE, "bf16", "multiply", 2.8, note="cublasLt"),
    row(DENSE, "int8", "multiply", 1.7),
    row(DENSE, "int8", "quantize+multiply", 1.8),
    row(AMBER, "bf16", COMPRESS, 2.0),
    row(AMBER, "int8", "multiply", 1.0),
    row(AMBER, "int8", COMPRESS, 1.25),
    row("cuSPARSELt", "bf16", COMPRESS, 2.5, note="algorithm 0"),
    row("cuSPARSELt", "bf16", COMPRESS, 2.0, note="algorithm 3"),
    row(AMBER, "fp8", COMPRESS, None),
]
