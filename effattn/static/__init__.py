"""What can be said about a kernel on a chip that is not here: compiled, never run.

`chips.py` the TPUs we compile for; `tpu.py` compiles ahead of time.
"""
