"""What a person runs: `python tools/NAME.py` from a clone, `visionmix NAME` after pip install."""
