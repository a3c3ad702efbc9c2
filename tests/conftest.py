"""Tests run on the CPU, whose numbers they assert; `CUDA_VISIBLE_DEVICES=0 pytest -k gpu` runs those that need a GPU."""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
