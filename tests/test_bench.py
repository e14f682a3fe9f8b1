"""bench.py counts correctly, saves its results, refuses wrong options. No test measures time."""
import json

import pytest
from helpers import refusal

import bench
from model import TitansConfig
from nanotitans.bench_model import SHAPES


@pytest.mark.slow
def test_all_measurements(tmp_path, capsys):
    """All are saved for two models. The FLOPs of a Transformer's forward equal the formula."""
    assert bench.main(['--models=gpt,lmm-2', '--sizes=2x64', '--repeats=1', '--stream=4096',
                       '--measure=train,forward,memory,stream', f'--out_dir={tmp_path}']) == 0
    content = json.loads((tmp_path / 'bench.json').read_text())
    assert content['machine']['flops'] > 0 and content['threads'] == 1
    rows = {(row['what'], row['model']): row for row in content['rows']}
    assert set(rows) == {('prefill', 'lmm-2'), *(
        (what, model) for what in ('train', 'forward', 'memory', 'generate')
        for model in ('gpt', 'lmm-2'))}
    config = TitansConfig(**SHAPES['S'])
    C, hidden = config.n_embd, 8 * -(-config.n_embd // 3)
    block = 4 * C * C + 3 * C * hidden + 2 * 64 * C  # attention to all 64 tokens
    flops = 2 * (config.n_layer * block + C * config.vocab_size)
    assert rows['forward', 'gpt']['flops_per_token'] == flops
    assert rows['train', 'gpt']['flops_per_token'] > 2.9 * flops
    moved = [rows[what, 'lmm-2']['bytes_per_token'] for what in ('train', 'forward')]
    assert moved[0] > moved[1] > 0
    assert rows['memory', 'gpt']['peak'] > rows['memory', 'gpt']['before'] > 1e7
    assert (tmp_path / 'bench.png').stat().st_size > 10000
    assert 'relative to gpt: lmm-2' in capsys.readouterr().out


@pytest.mark.parametrize('option, message', [
    ('--models=gpt,mca', "arch='mca' is not one of"), ('--models=mac-7', "'mac-7' is not a model"),
    ('--sizes=512', 'rows x tokens'), ('--sizes=2x3x4', 'rows x tokens'),
    ('--measure=speed', "'speed' is not one of"), ('--repeats=0', 'at least 1'),
    ('--threads=-1', 'in [0, 1024]'), ('--models=gpt-2', "'gpt-2' is not a model"),
    ('--models=mac+compile', 'only for measure=train,forward'),
    ('--peer=titans-pytorch', 'pip install titans-pytorch'),
    ('--shape=L', 'shape must be one of')])
def test_wrong_options_are_refused(option, message):
    with refusal(message):
        bench.main([option])


def test_a_plan(tmp_path, capsys):
    """A Transformer needs 3 times the FLOPs of its forward pass, and 16 bytes a parameter."""
    (tmp_path / 'c.py').write_text("arch = 'gpt'\nn_layer = 2\nn_embd = 512\nn_head = 8\n"
                                   "block_size = 256\nbatch_size = 16\nvocab_size = 20000\n"
                                   "max_iters = 1000\n")
    assert bench.main([f"--plan={tmp_path / 'c.py'}", '--gpus=4']) == 0
    lines = capsys.readouterr().out.splitlines()
    C, hidden = 512, 8 * -(-512 // 3)
    parameters = 20000 * C + 2 * (4 * C * C + 3 * C * hidden + 2 * C) + C
    assert f'{parameters:,} parameters, {16 * 256 * 1000 / 1e9:.1f}G tokens' in lines[0]
    gflops = 6e-9 * (parameters - 5 * C + 2 * 2 * 256 * C)
    assert float(lines[1].split()[0]) == pytest.approx(gflops, rel=0.03)
    size = f'{16 * parameters / 2 ** 30:,.1f} GiB of weights, gradients and moments'
    assert '4 GPUs: ' in lines[2] and size in lines[3]
