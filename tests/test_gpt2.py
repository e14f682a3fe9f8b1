"""GPT-2 with a memory: at step 0 it says what transformers' GPT-2 says; then the memory joins."""
import dataclasses
import json
import os
import subprocess
import sys

import processes
import pytest
import torch
from helpers import tensors
from test_model import all_logits

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

STRETCH, VOCAB = 16, 256
SMALL = {'segment_len': STRETCH, 'window_len': STRETCH, 'block_size': STRETCH, 'memory_heads': 2}
VARIANTS = {
    'mac': {}, 'mac deep': {'memory_depth': 2, 'memory_gates': 'hard'}, 'mac without persistent tokens': {'num_persist_mem': 0},
    'mac long-term tokens': {'num_longterm_mem': 3}, 'mac in one block': {'memory_layers': '1'},
    'mac no memory': {'memory_layers': 'none', 'num_persist_mem': 0},
    'mag': {'arch': 'mag'}, 'mal': {'arch': 'mal', 'num_persist_mem': 0}, 'gpt': {'arch': 'gpt'},
}
every_variant = pytest.mark.parametrize('variant', VARIANTS)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A GPT-2 of transformers, small and random, no weight of it where it began."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=24, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
                                     eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    path = tmp_path_factory.mktemp('gpt2')
    model.save_pretrained(path)
    return str(path)


def build(folder, variant, shake=0.0, dtype=torch.float32):
    found = pretrained.fetch_gpt2(folder)
    torch.manual_seed(1)
    model = TitansGPT2(TitansConfig(**SMALL | VARIANTS[variant] | pretrained.shape_options(found)))
    pretrained.load_pretrained(model, found, folder)
    model = model.to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += shake * torch.randn_like(p)
    return model, found.eval()


def tokens(rows, length):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(2))


@every_variant
@torch.no_grad()
def test_at_first_it_is_gpt2(folder, variant):
    """Logits to 1e-4, each stretch as GPT-2 reads a text of its own, the whole at once and in pieces."""
    model, theirs = build(folder, variant)
    idx, state, parts = tokens(2, 2 * STRETCH + 9), None, []
    want = torch.cat([theirs(part).logits for part in idx.split(STRETCH, dim=1)], dim=1)
    torch.testing.assert_close(all_logits(model, idx), want, atol=1e-4, rtol=0)
    for piece in idx.split([5, STRETCH + 2, 1, STRETCH + 1], dim=1):
        logits, _, state = model(piece, piece, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), want, atol=1e-4, rtol=0)
    assert want.std() > 0.1


@every_variant
def test_gates_open_and_everything_learns(folder, variant):
    """Closed gates get a gradient; once they are open, so does every parameter, while GPT-2's own can be left as they are."""
    model, _ = build(folder, variant)
    idx = tokens(2, 3 * STRETCH + 1)

    def dead():
        model.zero_grad()
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        return {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    gates = [p for name, p in model.named_parameters() if 'gate' in name.split('.')[-1] and 'memory' not in name]
    added = set(dict(model.named_parameters())) - set(model.backbone())
    assert bool(gates) == bool(added) and dead() <= added
    for p in gates:
        assert not p.any() and p.grad.any()
        p.data += 0.1
    assert not dead()
    if added:
        gpt2.freeze(model)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == added


@every_variant
@torch.no_grad()
def test_open_gates_stay_causal_and_exact(folder, variant):
    """float64, every weight shaken: no token sees its future; pieces are the whole; texts that begin in a row stand alone."""
    model, _ = build(folder, variant, shake=0.1, dtype=torch.float64)
    idx, edge = tokens(2, 3 * STRETCH + 5), 2 * STRETCH
    want, _, whole = model(idx, idx)
    for t in (1, STRETCH - 1, STRETCH, edge + 3, edge + 4):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        assert torch.equal(all_logits(model, changed)[:, :t], want[:, :t])
    state, parts = None, []
    for piece in idx.split([3, STRETCH, 1, STRETCH + 14, 1, 2], dim=1):
        logits, _, state = model(piece, piece, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), want, atol=1e-10, rtol=1e-10)
    for a, b in zip(tensors(state), tensors(whole), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    rows = torch.tensor([True, False])
    begun = model(idx, idx, begins={edge: rows})[0]
    torch.testing.assert_close(begun[0, edge:], all_logits(model, idx[:, edge:])[0], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(begun[1], want[1], atol=1e-10, rtol=1e-10)
    if 'memory' in ' '.join(dict(model.named_parameters())):  # beyond its stretch a token is seen through memory alone
        changed = idx.clone()
        changed[:, 1] = (changed[:, 1] + 1) % VOCAB
        assert (all_logits(model, changed) - want)[:, edge:].abs().max() > 1e-6
        frozen = [all_logits(model, x, update_memory=False)[:, edge:] for x in (idx, changed)]
        assert torch.equal(*frozen) or variant == 'mac long-term tokens' or (frozen[0] - frozen[1])[:, 8:].abs().max() < 1e-12


@pytest.fixture()
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.txt').write_text(''.join(f"def f{i % 7}(x):\n    return x + {i % 13}\n" for i in range(300)))
    prepare.main(['text', '--train_path=a.txt', '--tokenizer=byte'])
    return tmp_path


def trainer(folder, *flags):
    return train.main(['--dataset=text', '--device=cpu', f'--init_from={folder}', *(f'--{k}={v}' for k, v in SMALL.items()),
                       '--block_size=32', '--batch_size=2', '--eval_iters=1', '--eval_interval=2', '--log_interval=1',
                       '--warmup_iters=0', '--learning_rate=1e-2', *flags])


def test_frozen_then_resumed_with_everything(folder, place, capsys):
    """freeze_backbone trains what was added alone; the run goes on with all of it, and need not be told GPT-2's size."""
    assert trainer(folder, '--freeze_backbone', '--max_iters=4') == 0
    said = capsys.readouterr().out
    first = checkpoint.load('out/ckpt.pt')
    model = checkpoint.build(first, 'out/ckpt.pt')
    size, theirs = (sum(p.numel() for p in parameters) for parameters in (model.parameters(), model.backbone().values()))
    assert f"of which {size - theirs:,} are trained" in said
    fresh, _ = build(folder, 'mac')
    for name, p in fresh.backbone().items():
        assert torch.equal(p, first['model'][name]), name
    assert first['model']['blocks.0.gate'].any() and first['model']['blocks.1.gate_context'].any()
    assert trainer('resume', '--max_iters=8') == 0
    second = checkpoint.load('out/ckpt.pt')
    assert second['step'] == 8 and all(not torch.equal(first['model'][k], second['model'][k]) for k in fresh.backbone())


def test_auto_begins_with_the_weights_and_goes_on(folder, place, capsys):
    """One command for every start; options that the weights decide are named."""
    for steps in 2, 4:
        assert trainer(f'auto:{folder}', '--freeze_backbone', f'--max_iters={steps}', '--n_layer=7') == 0
        assert 'n_layer' in next(line for line in capsys.readouterr().out.splitlines() if 'not used' in line)
    content = checkpoint.load('out/ckpt.pt')
    assert content['step'] == 4 and not os.path.exists('out/earlier-1') and content['model_config']['n_layer'] == 2
    assert all(torch.equal(p, content['model'][name]) for name, p in build(folder, 'mac')[0].backbone().items())


def test_sizes_that_the_defaults_do_not_fit(place):
    """40 wide, 5 heads, 13 layers, a memory in the last of them."""
    path = str(place / 'other')
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCAB, n_positions=24, n_embd=40, n_layer=13, n_head=5,
                                                         bos_token_id=0, eos_token_id=0)).save_pretrained(path)
    for init_from in path, 'resume':
        assert trainer(init_from, '--max_iters=2', '--memory_heads=5', '--memory_layers=12') == 0
    for flags, words in ('--memory_heads=3', "memory_heads=3"), ('--memory_layers=13', 'outside 0 to n_layer-1=12'):
        with pytest.raises(UserError, match=words):
            trainer(path, flags)


def test_its_memory_stays(folder, place):
    """A conversation with GPT-2, kept and gone on with across stretches: as if never broken off, to the bit."""
    assert trainer(folder, '--max_iters=2') == 0
    whole, part = (Conversation(sample.SampleConfig(max_new_tokens=9, device='cpu')) for _ in range(2))
    for text in 'def f1(x):', '\n', '    return x + 1\n' * 3:
        answers = []
        for conversation in whole, part:
            torch.manual_seed(0)
            conversation.hear(conversation.reader.encode(text))
            answers.append(list(conversation.tokens()))
        assert answers[0] == answers[1]
        part.save('me.mem')
        part = Conversation(sample.SampleConfig(max_new_tokens=9, device='cpu'))
        part.load('me.mem')
    assert part.state.pos > 3 * STRETCH and all(map(torch.equal, tensors(part.state), tensors(whole.state)))


def test_there_and_back(place):
    """A GPT-2 that was trained here, through transformers: to 1e-4 the same logits, and the weights to the bit."""
    flags = ['--arch=gpt', '--backbone=gpt2', '--bias', '--n_layer=1', '--n_head=2', '--n_embd=16', '--max_iters=2']
    assert trainer('scratch', *flags, '--block_size=16') == 0
    example = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'examples', 'gpt2_to_transformers.py')
    done = subprocess.run([sys.executable, example, 'out'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model, found = checkpoint.build(checkpoint.load('out/ckpt.pt'), 'out').eval(), pretrained.fetch_gpt2('out')
    idx = tokens(2, STRETCH)
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(idx).logits, all_logits(model, idx), atol=1e-4, rtol=0)
    again = TitansGPT2(TitansConfig(**SMALL | {'arch': 'gpt'} | pretrained.shape_options(found)))
    pretrained.load_pretrained(again, found, 'out')
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    done = subprocess.run([sys.executable, example, 'none'], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count('\n') == 1


def test_foreign_code_is_not_run(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'mine', 'auto_map': {'AutoConfig': 'x.Config'}}))
    (tmp_path / 'x.py').write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match='no weights of GPT-2'):
        pretrained.fetch_gpt2(str(tmp_path))
    assert not (tmp_path / 'ran').exists()


def test_a_damaged_shape_is_none():
    for config in {'backbone': 'gpt2'}, {'backbone': 'titans'}, {}, dict.fromkeys(pretrained.SHAPE, 'gpt2'):
        assert pretrained.shape_from_config(config) == {}


@pytest.mark.parametrize('flags, words', [
    ('--arch=lmm', ("arch='lmm' has no attention", 'give --arch=mac, mag, mal or gpt')),
    ('--segment_len=32', ('knows 24 positions', 'lower segment_len to at most 24')),
    ('--arch=gpt --block_size=16 --freeze_backbone', ('freeze_backbone=True', 'nothing was added')),
    ('--arch=mag --carry_state --block_size=24', ('block_size=24', 'of 16, where mag can begin', 'block_size=32')),
    ('--memory_heads=3', ('n_embd=16', 'memory_heads=3', "are GPT-2's")),
    ('--init_from=gpt2-larg', ("init_from='gpt2-larg'", "did you mean 'gpt2-large'?")),
    ('--init_from=rsume', ("init_from='rsume'", "did you mean 'resume'?")),
    ('--init_from=data', ("init_from='data'", 'config.json and model.safetensors')),
    ('--init_from=scratch --freeze_backbone', ('freeze_backbone=True', '--init_from=gpt2')),
    ('--dataset=chars', ('knows 256 tokens', "'chars' has", '--tokenizer=gpt2')),
])
def test_what_cannot_be_is_one_line(folder, place, flags, words):
    if 'chars' in flags:
        prepare.main(['text', '--train_path=a.txt', '--tokenizer=char'])
        (place / 'data' / 'text').rename(place / 'data' / 'chars')
    with pytest.raises(UserError) as error:
        trainer(folder, *flags.split())
    assert all(word in str(error.value) for word in words) and '\n' not in str(error.value), error.value
    assert not (place / 'out').exists()


@pytest.mark.parametrize('damage', ['no weights', 'cut', 'another model', 'another kind', 'no config'])
def test_a_folder_without_gpt2(folder, place, damage):
    """Missing, cut or foreign weights: one line, nothing made up in their place."""
    copy = place / 'copy'
    transformers.GPT2LMHeadModel.from_pretrained(folder).save_pretrained(copy)
    config, weights = copy / 'config.json', copy / 'model.safetensors'
    if damage == 'no weights':
        weights.unlink()
    elif damage == 'cut':
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == 'no config':
        config.unlink()
    else:
        told = json.loads(config.read_text())
        config.write_text(json.dumps(told | ({'n_layer': 3} if damage == 'another model' else {'model_type': 'llama'})))
    with pytest.raises(UserError) as error:
        pretrained.fetch_gpt2(str(copy))
    assert str(copy) in str(error.value) and 'model.safetensors' in str(error.value) and '\n' not in str(error.value)


def test_without_a_network(monkeypatch):
    """A name of the hub that cannot be reached: one line that says what else can be done."""
    def fail(*_, **__):
        raise OSError("no\nnetwork")
    monkeypatch.setattr('transformers.AutoConfig.from_pretrained', fail)
    with pytest.raises(UserError, match="init_from='gpt2'.*no network.*connect once, or give a folder"):
        pretrained.fetch_gpt2('gpt2')


@pytest.mark.slow
def test_frozen_over_processes(folder, place):
    """Two processes with FSDP: the losses of one, and the shards go on with everything trained, GPT-2's size from them."""
    options = {'dataset': 'text', 'device': 'cpu', 'batch_size': 2, 'eval_iters': 2, 'eval_interval': 2, 'log_interval': 1,
               'warmup_iters': 0, 'max_iters': 2, 'learning_rate': 1e-2, 'init_from': folder, 'freeze_backbone': True, **SMALL}
    one, many = (train.TrainConfig(**options, out_dir=f'{place}/{name}', parallel=parallel)
                 for name, parallel in (('one', 'auto'), ('many', 'fsdp')))
    alone = processes.curve(processes.run(one))
    for (*at, a), (*where, b) in zip(alone, processes.curve(processes.run(many, 2)), strict=True):
        assert at == where and a == pytest.approx(b, abs=1e-5)
    more = {'init_from': 'resume', 'freeze_backbone': False, 'max_iters': 4}
    ends = [processes.curve(processes.run(dataclasses.replace(config, **more), world))[-1]
            for config, world in ((one, 0), (many, 2))]
    assert ends[0][0] == ends[1][0] == 4 and ends[0][2] == pytest.approx(ends[1][2], abs=1e-4)
