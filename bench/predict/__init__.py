"""Predicts the GPU kernels' times from their machine code: ``python -m bench predict``. Needs no GPU.

`sass` reads disassembly and finds loops, `machine` knows the H200's limits, `geometry` how often each loop of
the CUDA kernels runs, `kernel_loops` which loop that is, `cuda` and `triton` put a call's launches together,
and `tables` writes ``docs/performance.md``; `group_mix` does it all for Group-Mix aggregation. Nothing here
is a measurement.
"""
