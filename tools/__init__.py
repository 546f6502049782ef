"""Commands: `python tools/NAME.py` from a clone, `visionmix NAME` after pip install."""
