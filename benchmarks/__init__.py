"""Benchmarks of the kernels against what PyTorch users would write, with ratios taken within one run.

`python -m benchmarks.run` plays every case on the CPU, for each instruction set and number of threads, and writes
`benchmarks/results/cpu.json`; `python -m benchmarks.report benchmarks/results/cpu.json` makes a table and a plot of it.
"""
