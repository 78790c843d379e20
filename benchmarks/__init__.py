"""benchmarks: what fastres costs beside the strongest alternatives, measured in interleaved runs.

`python -m benchmarks` runs every file here that has `NAME` and `cases`; one file is one benchmark.
"""
