"""Programs that run in a process of their own, in whatever environment a peer needs: one measurement whenever asked.

Only the standard library, NumPy and tools.bench.harness may be imported here at the top: these files run without
graphlens. A module holds ``prepare(job)``, which returns the Work that ``job`` (see protocol.py) names, or several by label.
"""
