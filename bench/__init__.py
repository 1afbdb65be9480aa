"""One bench per file: `python -m bench.NAME [--json]` prints both sides of a ratio, measured in turn.

`python -m bench` runs all and writes docs/benchmarks.md.
"""
