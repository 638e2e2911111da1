"""Compiles the kernels for a Hopper GPU and prints their PTX as JSON; the argument is the kind of tiles."""

from __future__ import annotations

import json
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from regrad_vllm.serve.kernels import triton_documents

KINDS = {"one row": (1, False), "decode": (16, False), "prefill": (64, True)}


def ptx_of(kind: str) -> dict[str, str]:
    rows, is_tiled = KINDS[kind]
    constants = {
        "DTYPE": tl.bfloat16, "RANK": 16, "BLOCK_RANK": 16, "RANK_BLOCKS": 1, "ROWS": rows, "TILED": is_tiled,
        "TENSORS": 48, "EVEN": True, "ALIGNED": True, "EXACT": False,
    }  # fmt: skip
    tables = {"slices": "*i64", "forms": "*i64", "rows": "*i32", "documents": "*u8", "tiles": "*i32", "num_rows": "i32"}
    shrink = {"x": "*bf16", "low": "*fp32", **tables, "inputs": "i32", "x_stride": "i32", "share": "i32"}
    expand = {"y": "*bf16", "low": "*fp32", **tables, "y_stride": "i32", "splits": "i32", "scaling": "fp32"}
    unspecialized = ("num_rows", "share", "splits", "scaling")
    found = {}
    for kernel, types, more in (
        (triton_documents.shrink, shrink, {}),
        (triton_documents.expand, expand, {"WIDTH": 128, "SPLITS": 8, "SOME": 4}),
    ):
        names = kernel.arg_names
        source = ASTSource(
            kernel,
            {name: types.get(name, "constexpr") for name in names},
            {(names.index(name),): value for name, value in (constants | more).items()},
            {(names.index(name),): [["tt.divisibility", 16]] for name in types if name not in unspecialized},
        )
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
        found[kernel.__name__] = str(ptx)
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(ptx_of(sys.argv[1])))
