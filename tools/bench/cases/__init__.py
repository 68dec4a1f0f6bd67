"""The benchmark cases: one module each, found by its file name; its docstring's first line is its summary.

A case module holds ``CASE = Case(run, ...)``. ``run`` takes a Setup and returns Findings (see harness.py).
"""
