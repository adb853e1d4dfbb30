"""What a run needs and moves, before any chip is there: the real step compiled ahead of time.

`report.py` is what a plan says; `compiled.py` makes one in a process of its own; `search.py` looks
for config values that fit; `render.py` shows it.
"""
