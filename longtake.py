"""longtake: vision-language models on very long videos, one sequence split over many GPUs.

This file makes `longtake.*` importable from a bare checkout; an installed package maps the folders itself.
"""

__path__ = [__file__.rpartition("/")[0]]
