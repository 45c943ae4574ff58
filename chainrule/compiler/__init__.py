"""From graphs to machine code; `pipeline.py` runs the passes in order."""
