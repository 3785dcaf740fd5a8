"""Measurements of the whole product; see benchmarks/README.md. Not part of the installed package."""
