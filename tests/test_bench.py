"""bench.py counts what it says it counts, keeps it, and says what is wrong in one line. No assertion on time."""
import json

import pytest

import bench
from model import TitansConfig
from nanotitans.configurator import UserError


@pytest.mark.slow
def test_a_run(tmp_path, capsys):
    """All measurements of two models; the FLOPs of the Transformer's forward pass are those on paper."""
    options = ['--models=gpt,lmm-2', '--sizes=2x64', '--repeats=1', '--measure=train,forward,memory,stream', '--stream=4096']
    assert bench.main([*options, f'--out_dir={tmp_path}']) == 0
    content = json.loads((tmp_path / 'bench.json').read_text())
    assert content['machine']['flops'] > 0 and content['threads'] == 1
    rows = {(r['what'], r['model']): r for r in content['rows']}
    of_both = ('train', 'forward', 'memory', 'generate')
    assert set(rows) == {(w, m) for w in of_both for m in ('gpt', 'lmm-2')} | {('prefill', 'lmm-2')}
    s = TitansConfig(**bench.SHAPES['S'])
    C, hidden = s.n_embd, 8 * -(-s.n_embd // 3)
    on_paper = 2 * (s.n_layer * (4 * C * C + 3 * C * hidden + 2 * 64 * C) + C * s.vocab_size)  # 64 tokens, whole squares
    assert rows['forward', 'gpt']['flops_per_token'] == on_paper
    assert rows['train', 'gpt']['flops_per_token'] > 2.9 * on_paper
    assert rows['train', 'lmm-2']['bytes_per_token'] > rows['forward', 'lmm-2']['bytes_per_token'] > 0
    assert rows['memory', 'gpt']['peak'] > rows['memory', 'gpt']['before'] > 1e7
    assert (tmp_path / 'bench.png').stat().st_size > 10000
    assert 'of gpt: lmm-2' in capsys.readouterr().out


@pytest.mark.parametrize('option, message', [
    ('--models=gpt,mca', "arch='mca' is not one of"), ('--models=mac-7', "'mac-7' is no model"),
    ('--sizes=512', 'rows x tokens'), ('--sizes=2x3x4', 'rows x tokens'), ('--measure=speed', "'speed' is not one of"),
    ('--repeats=0', 'at least 1'), ('--threads=-1', r'in \[0, 1024\]'),
    ('--models=gpt-2', "'gpt-2' is no model"), ('--models=mac+compile', 'goes with train and forward alone'),
    ('--peer=titans-pytorch', 'pip install titans-pytorch'), ('--shape=L', 'shape must be one of')])
def test_wrong_input(option, message):
    with pytest.raises(UserError, match=message) as error:
        bench.main([option])
    assert '\n' not in str(error.value)


def test_a_plan(tmp_path, capsys):
    """Of a Transformer: three times the FLOPs of its forward pass on paper, bar the attention's; 16 bytes a parameter."""
    (tmp_path / 'c.py').write_text("arch = 'gpt'\nn_layer = 2\nn_embd = 512\nn_head = 8\nblock_size = 256\nbatch_size = 16\n"
                                   "vocab_size = 20000\nmax_iters = 1000\n")
    assert bench.main([f"--plan={tmp_path / 'c.py'}", '--gpus=4']) == 0
    lines = capsys.readouterr().out.splitlines()
    C, hidden = 512, 8 * -(-512 // 3)
    parameters = 20000 * C + 2 * (4 * C * C + 3 * C * hidden + 2 * C) + C
    assert f'{parameters:,} parameters, {16 * 256 * 1000 / 1e9:.1f}G tokens' in lines[0]
    assert abs(float(lines[1].split()[0]) / (6e-9 * (parameters - 5 * C + 2 * 2 * 256 * C)) - 1) < 0.03
    assert '4 GPUs: ' in lines[2] and f'{16 * parameters / 2 ** 30:,.1f} GiB of weights, gradients and moments' in lines[3]
