"""Predicts the GPU kernels' times from their machine code: ``python -m bench predict``. Needs no GPU.

`sass` reads disassembly and finds loops, `machine` knows the H200's limits, `cuda` and `triton` know how
often each loop runs for a layer, `tables` writes ``docs/performance.md``. Nothing here is a measurement.
"""
