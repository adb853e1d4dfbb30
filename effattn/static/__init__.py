"""What can be said of a kernel on a chip that is not here: compiled, read, never run.

`tpu.py` compiles ahead of time, `dump.py` does so in a child with libtpu's dumps, `bundles.py` and
`hlo.py` read them, `estimate.py` counts cycles, `profile.py` puts one case together, `report.py`
prints, records and checks. Cases: `own.py`, `rivals.py`. `gpu.py` is the Hopper side.
"""
