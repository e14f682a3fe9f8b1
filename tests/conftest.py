import pytest
import torch
from helpers import TEXT

from nanotitans.dataset import Writer
from nanotitans.tokenizer import Tokenizer

torch.set_num_threads(1)  # small tensors: threads cost more than they give, and one thread is deterministic


@pytest.fixture()
def data_dir(tmp_path):
    """A folder with the data set 'tiny'."""
    with Writer(str(tmp_path / 'data'), 'tiny', Tokenizer({'kind': 'byte'})) as writer:
        writer.add('train', list(TEXT.encode()))
        writer.add('val', list(TEXT[:3000].encode()))
    return str(tmp_path / 'data')
