"""Pallas Mosaic GPU kernels for Hopper (compute capability 9.0), one kernel a file.

`dispatch.Hopper` has the signatures of `reference.py`; import-linter keeps the levels:

    dispatch                            which kernel runs, and the fallbacks
    moe                                 experts: slots, two grouped matmuls, an activation
    linear                              matmuls with weights of any format
    attention grouped_matmul            the persistent, warp-specialized kernels
    qkv_epilogue router slot_assignment one launch each
    elementwise int4                    fused row kernels; int4 dequantization in registers
    heuristics                          every threshold and tile table
    mosaic                              layouts, shared-memory allocation, registers
"""
