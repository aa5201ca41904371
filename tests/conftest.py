"""Files that many tests read and none changes."""

import os
from pathlib import Path

# before triton is imported, here and in ranks started here: the same tests on every machine; make gpu: tests/gpu alone
os.environ.update({} if "LONGTAKE_TEST_GPU" in os.environ else {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})

import pytest
import torch

from tests.training_files import write_conversations, write_start, write_text

collect_ignore = [] if "LONGTAKE_TEST_GPU" in os.environ else ["gpu"]
torch.set_num_threads(1)  # as the ranks that tests start: sums are the same to the bit


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a tiny model."""
    return write_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL conversations about videos, six rows."""
    return write_conversations(tmp_path_factory.mktemp("conversations"))


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed text of 120 tokens."""
    return write_text(tmp_path_factory.mktemp("packed") / "text.safetensors")
