"""Benchmarks of maskcompile; each prints its table and writes it to ``benchmarks/results/``."""
