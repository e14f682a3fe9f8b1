import pytest
import torch
from helpers import TEXT

from nanotitans.tokenizer import Tokenizer
from nanotitans.writer import Writer

torch.set_num_threads(1)  # faster for small tensors, and deterministic


@pytest.fixture()
def data_dir(tmp_path):
    """A folder with the data set 'tiny'."""
    with Writer(str(tmp_path / 'data'), 'tiny', Tokenizer({'kind': 'byte'})) as writer:
        writer.add('train', list(TEXT.encode()))
        writer.add('val', list(TEXT[:3000].encode()))
    return str(tmp_path / 'data')
