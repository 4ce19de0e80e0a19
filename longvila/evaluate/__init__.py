"""Runs the benchmarks of `eval/` and reports on a run; knows no benchmark by name."""
