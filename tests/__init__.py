"""Tests never ask the hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
