"""GPT-2 with a memory has the logits of transformers' GPT-2 at first. Then it learns."""
import dataclasses
import json
import os
import subprocess
import sys

import processes
import pytest
import torch
from helpers import TEXT, in_pieces, refusal, same, shaken, tensors
from test_model import all_logits
from torch.testing import assert_close

import gpt2
import prepare
import sample
import train
from gpt2 import TitansGPT2
from model import TitansConfig
from nanotitans import checkpoint, pretrained
from nanotitans.configurator import UserError
from nanotitans.conversation import Conversation

transformers = pytest.importorskip('transformers', reason="transformers is not installed")

SEGMENT, VOCAB = 16, 256
SMALL = {'segment_len': SEGMENT, 'window_len': SEGMENT, 'block_size': SEGMENT, 'memory_heads': 2}
VARIANTS = {
    'mac': {}, 'mac deep': {'memory_depth': 2, 'memory_gates': 'hard'},
    'mac without persistent tokens': {'num_persist_mem': 0},
    'mac long-term tokens': {'num_longterm_mem': 3}, 'mac in one block': {'memory_layers': '1'},
    'mac no memory': {'memory_layers': 'none', 'num_persist_mem': 0},
    'mag': {'arch': 'mag'}, 'mal': {'arch': 'mal', 'num_persist_mem': 0}, 'gpt': {'arch': 'gpt'},
}
every_variant = pytest.mark.parametrize('variant', VARIANTS)
CLOSE, EXACT = {'rtol': 0, 'atol': 1e-4}, {'rtol': 1e-10, 'atol': 1e-10}


def random_gpt2(path, **shape):
    """Save a GPT-2 of transformers with noise on all its weights."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=24, bos_token_id=0, eos_token_id=0, **shape))
    shaken(model, 0.1).save_pretrained(path)
    return str(path)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return random_gpt2(tmp_path_factory.mktemp('gpt2'), n_embd=16, n_layer=2, n_head=2)


def convert(theirs, folder, **options):
    """Make our model from a GPT-2 of transformers that was read from a folder."""
    options = SMALL | options | pretrained.shape_options(theirs)
    model = TitansGPT2(TitansConfig(**options))
    pretrained.load_pretrained(model, theirs, folder)
    return model


def build(folder, variant, shake=0.0, dtype=torch.float32):
    """-> our model, the GPT-2 that it was made from"""
    theirs = pretrained.fetch_gpt2(folder)
    torch.manual_seed(1)
    model = convert(theirs, folder, **VARIANTS[variant]).to(dtype).eval()
    return shaken(model, shake), theirs.eval()


def tokens(rows, length):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(2))


@every_variant
@torch.no_grad()
def test_at_first_it_is_gpt2(folder, variant):
    """Each segment has the logits that GPT-2 gives it as a text of its own, also in pieces."""
    model, theirs = build(folder, variant)
    idx = tokens(2, 2 * SEGMENT + 9)
    want = torch.cat([theirs(part).logits for part in idx.split(SEGMENT, dim=1)], dim=1)
    assert want.std() > 0.1
    assert_close(all_logits(model, idx), want, **CLOSE)
    assert_close(in_pieces(model, idx, [5, SEGMENT + 2, 1, SEGMENT + 1])[0], want, **CLOSE)


@every_variant
def test_gates_open_and_everything_learns(folder, variant):
    """Closed gates get a gradient. Open gates give all parameters one. GPT-2 can be frozen."""
    model, _ = build(folder, variant)
    idx = tokens(2, 3 * SEGMENT + 1)

    def without_gradient():
        model.zero_grad()
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        return {name for name, p in model.named_parameters()
                if p.grad is None or not p.grad.abs().max() > 0}
    parameters = dict(model.named_parameters())
    gates = [p for name, p in parameters.items()
             if 'gate' in name.split('.')[-1] and 'memory' not in name]
    added = set(parameters) - set(model.backbone())
    assert bool(gates) == bool(added) and without_gradient() <= added
    for p in gates:
        assert not p.any() and p.grad.any()
        p.data += 0.1
    assert not without_gradient()
    if added:
        gpt2.freeze(model)
        assert {name for name, p in parameters.items() if p.requires_grad} == added


@every_variant
@torch.no_grad()
def test_open_gates_stay_causal_and_exact(folder, variant):
    """Causality, pieces and texts in a row hold. Only memory reaches beyond a segment."""
    model, _ = build(folder, variant, shake=0.1, dtype=torch.float64)
    idx, edge = tokens(2, 3 * SEGMENT + 5), 2 * SEGMENT
    want, _, want_state = model(idx, idx)

    def changed(t):
        other = idx.clone()
        other[:, t] = (other[:, t] + 1) % VOCAB
        return other
    for t in (1, SEGMENT - 1, SEGMENT, edge + 3, edge + 4):
        assert torch.equal(all_logits(model, changed(t))[:, :t], want[:, :t])
    logits, state = in_pieces(model, idx, [3, SEGMENT, 1, SEGMENT + 14, 1, 2])
    assert_close(logits, want, **EXACT)
    assert_close(tensors(state), tensors(want_state), **EXACT)
    logits = model(idx, idx, begins={edge: torch.tensor([True, False])})[0]
    assert_close(logits[0, edge:], all_logits(model, idx[:, edge:])[0], **EXACT)
    assert_close(logits[1], want[1], **EXACT)
    if any('memory' in name for name, _ in model.named_parameters()):
        assert (all_logits(model, changed(1)) - want)[:, edge:].abs().max() > 1e-6
        a, b = (all_logits(model, x, update_memory=False)[:, edge:] for x in (idx, changed(1)))
        assert torch.equal(a, b) or variant == 'mac long-term tokens' \
            or (a - b)[:, 8:].abs().max() < 1e-12


@pytest.fixture()
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.txt').write_text(TEXT)
    prepare.main(['text', '--train_path=a.txt', '--tokenizer=byte'])
    return tmp_path


def trainer(init_from, *flags):
    return train.main(['--dataset=text', '--device=cpu', f'--init_from={init_from}',
                       *(f'--{k}={v}' for k, v in SMALL.items()), '--block_size=32',
                       '--batch_size=2', '--eval_iters=1', '--eval_interval=2', '--log_interval=1',
                       '--warmup_iters=0', '--learning_rate=1e-2', *flags])


def test_frozen_then_resumed_with_everything(folder, workspace, capsys):
    """freeze_backbone trains only what was added. The resumed run trains everything."""
    assert trainer(folder, '--freeze_backbone', '--max_iters=4') == 0
    out = capsys.readouterr().out
    first = checkpoint.load('out/ckpt.pt')
    model = checkpoint.build(first, 'out/ckpt.pt')
    added = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in model.backbone().values())
    assert f"of which {added:,} are trained" in out
    fresh, _ = build(folder, 'mac')
    for name, p in fresh.backbone().items():
        assert torch.equal(p, first['model'][name]), name
    assert first['model']['blocks.0.gate'].any() and first['model']['blocks.1.gate_context'].any()
    assert trainer('resume', '--max_iters=8') == 0
    second = checkpoint.load('out/ckpt.pt')
    assert second['step'] == 8
    assert not any(torch.equal(first['model'][k], second['model'][k]) for k in fresh.backbone())


def test_auto_starts_from_the_weights_and_then_resumes(folder, workspace, capsys):
    """The same command both times. Options that the weights decide are named."""
    for steps in 2, 4:
        flags = '--freeze_backbone', f'--max_iters={steps}', '--n_layer=7'
        assert trainer(f'auto:{folder}', *flags) == 0
        lines = capsys.readouterr().out.splitlines()
        assert 'n_layer' in next(line for line in lines if 'not used' in line)
    content = checkpoint.load('out/ckpt.pt')
    assert content['step'] == 4 and not os.path.exists('out/earlier-1')
    assert content['model_config']['n_layer'] == 2
    for name, p in build(folder, 'mac')[0].backbone().items():
        assert torch.equal(p, content['model'][name])


def test_a_shape_that_the_defaults_do_not_fit(workspace):
    path = random_gpt2(workspace / 'other', n_embd=40, n_layer=13, n_head=5)
    for init_from in path, 'resume':
        assert trainer(init_from, '--max_iters=2', '--memory_heads=5', '--memory_layers=12') == 0
    for flag, words in (('--memory_heads=3', "memory_heads=3"),
                        ('--memory_layers=13', 'outside 0 to n_layer-1=12')):
        with pytest.raises(UserError, match=words):
            trainer(path, flag)


def test_a_conversation_goes_on_from_its_memory_file(folder, workspace):
    """Saving and loading it after every answer changes no bit, over several segments."""
    def conversation():
        return Conversation(sample.SampleConfig(max_new_tokens=9, device='cpu'))

    def reply(conversation, text):
        torch.manual_seed(0)
        conversation.read(conversation.reader.encode(text))
        return list(conversation.tokens())
    assert trainer(folder, '--max_iters=2') == 0
    whole, part = conversation(), conversation()
    for text in 'def f1(x):', '\n', '    return x + 1\n' * 3:
        assert reply(whole, text) == reply(part, text)
        part.save('me.mem')
        part = conversation()
        part.load('me.mem')
    assert part.state.pos > 3 * SEGMENT and same(part.state, whole.state)


def test_a_gpt2_trained_here_goes_to_transformers_and_back(workspace):
    """transformers computes the same logits. The weights come back the same, to the bit."""
    flags = ['--arch=gpt', '--backbone=gpt2', '--bias', '--n_layer=1', '--n_head=2', '--n_embd=16']
    assert trainer('scratch', *flags, '--max_iters=2', '--block_size=16') == 0
    example = os.path.join(processes.HERE, 'examples', 'gpt2_to_transformers.py')

    def export(folder):
        return subprocess.run([sys.executable, example, folder], capture_output=True, text=True)
    process = export('out')
    assert process.returncode == 0, process.stderr
    model = checkpoint.build(checkpoint.load('out/ckpt.pt'), 'out').eval()
    theirs, idx = pretrained.fetch_gpt2('out'), tokens(2, SEGMENT)
    with torch.no_grad():
        assert_close(theirs.eval()(idx).logits, all_logits(model, idx), **CLOSE)
    again = convert(theirs, 'out', arch='gpt')
    assert same(list(again.parameters()), list(model.parameters()))
    process = export('none')
    assert process.returncode == 1 and process.stderr.count('\n') == 1


def test_foreign_code_is_not_run(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps({
        'model_type': 'mine', 'auto_map': {'AutoConfig': 'x.Config'}}))
    (tmp_path / 'x.py').write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match='no weights of GPT-2'):
        pretrained.fetch_gpt2(str(tmp_path))
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('config', [{'backbone': 'gpt2'}, {'backbone': 'titans'}, {},
                                    dict.fromkeys(pretrained.SHAPE, 'gpt2')])
def test_a_damaged_config_has_no_shape(config):
    assert pretrained.shape_from_config(config) == {}


@pytest.mark.parametrize('flags, words', [
    ('--arch=lmm', ("arch='lmm' has no attention", 'give --arch=mac, mag, mal or gpt')),
    ('--segment_len=32', ('knows 24 positions', 'lower segment_len to at most 24')),
    ('--arch=gpt --block_size=16 --freeze_backbone', ('freeze_backbone=True', 'nothing was added')),
    ('--arch=mag --carry_state --block_size=24',
     ('block_size=24', 'of 16, where mag can begin', 'block_size=32')),
    ('--memory_heads=3', ('n_embd=16', 'memory_heads=3', "are GPT-2's")),
    ('--init_from=gpt2-larg', ("init_from='gpt2-larg'", "did you mean 'gpt2-large'?")),
    ('--init_from=rsume', ("init_from='rsume'", "did you mean 'resume'?")),
    ('--init_from=data', ("init_from='data'", 'config.json and model.safetensors')),
    ('--init_from=scratch --freeze_backbone', ('freeze_backbone=True', '--init_from=gpt2')),
    ('--dataset=chars', ('knows 256 tokens', "'chars' has", '--tokenizer=gpt2')),
])
def test_wrong_options_are_refused(folder, workspace, flags, words):
    if 'chars' in flags:
        prepare.main(['text', '--train_path=a.txt', '--tokenizer=char'])
        (workspace / 'data' / 'text').rename(workspace / 'data' / 'chars')
    with refusal(*words):
        trainer(folder, *flags.split())
    assert not (workspace / 'out').exists()


@pytest.mark.parametrize('damage', ['no weights', 'cut', 'another model', 'another kind',
                                    'no config'])
def test_missing_cut_or_foreign_weights_are_refused(folder, workspace, damage):
    copy = workspace / 'copy'
    transformers.GPT2LMHeadModel.from_pretrained(folder).save_pretrained(copy)
    config, weights = copy / 'config.json', copy / 'model.safetensors'
    if damage == 'no weights':
        weights.unlink()
    elif damage == 'cut':
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == 'no config':
        config.unlink()
    else:
        wrong = {'n_layer': 3} if damage == 'another model' else {'model_type': 'llama'}
        config.write_text(json.dumps(json.loads(config.read_text()) | wrong))
    with refusal(str(copy), 'model.safetensors'):
        pretrained.fetch_gpt2(str(copy))


def test_without_a_network_the_error_says_what_else_to_do(monkeypatch):
    def fail(*_, **__):
        raise OSError("no\nnetwork")
    monkeypatch.setattr('transformers.AutoConfig.from_pretrained', fail)
    with refusal("init_from='gpt2'", "no network", "connect once, or give a folder"):
        pretrained.fetch_gpt2('gpt2')


@pytest.mark.slow
def test_frozen_over_processes(folder, workspace):
    """Two processes with FSDP have the losses of one, also after a resume with all trained."""
    options = {'dataset': 'text', 'device': 'cpu', 'batch_size': 2, 'eval_iters': 2,
               'eval_interval': 2, 'log_interval': 1, 'warmup_iters': 0, 'max_iters': 2,
               'learning_rate': 1e-2, 'init_from': folder, 'freeze_backbone': True, **SMALL}
    curves = []
    for world, parallel in (0, 'auto'), (2, 'fsdp'):
        config = train.TrainConfig(**options, out_dir=f'{workspace}/{parallel}', parallel=parallel)
        curve = processes.curve(processes.run(config, world))
        config = dataclasses.replace(config, init_from='resume', freeze_backbone=False, max_iters=4)
        curves.append((curve, processes.curve(processes.run(config, world))[-1]))
    (one, one_end), (two, two_end) = curves
    for (*place, a), (*other_place, b) in zip(one, two, strict=True):
        assert place == other_place and a == pytest.approx(b, abs=1e-5)
    assert one_end[0] == two_end[0] == 4 and one_end[2] == pytest.approx(two_end[2], abs=1e-4)
