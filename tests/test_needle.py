"""Needles: what is hidden can be found, lengths are exact, scores are honest, finished cells outlive everything."""
import json
import os
import re

import numpy as np
import pytest
import torch

import eval_context
import eval_needle
import prepare
import train
from eval_needle import Asker, Evaluation, NeedleConfig
from nanotitans.configurator import UserError
from nanotitans.dataset import WEIGHT, Dataset
from nanotitans.reader import Reader
from nanotitans.tokenizer import Tokenizer, word_tokenizer
from tasks import needle
from tasks.needle import TASKS, Haystack, training_row

TEXT = ' '.join(f"Sentence {i} of this long tale says that {'very ' * (i % 5)}little happens." for i in range(1500))
SHAPE = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--memory_heads=2', '--segment_len=16',
         '--device=cpu']


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """data/needle and data/bytes prepared, out/word and out/gpt (word tokenizer), out/byte and out/char barely trained."""
    before, root = os.getcwd(), tmp_path_factory.mktemp('needle')
    os.chdir(root)
    with open('tale.txt', 'w') as f:
        f.write(TEXT)
    prepare.main(['needle', '--haystack=tale.txt', '--rows=32', '--block_size=256'])
    few = ['--max_iters=2', '--eval_interval=2', '--eval_iters=1', '--batch_size=2', '--block_size=128', *SHAPE]
    train.main(['--dataset=needle', '--out_dir=out/word', '--memory_gates=hard', *few])
    train.main(['--dataset=needle', '--out_dir=out/gpt', '--arch=gpt', *few])
    for kind in 'byte', 'char':
        prepare.main(['text', '--train_path=tale.txt', f'--tokenizer={kind}'])
        train.main(['--dataset=text', f'--out_dir=out/{kind}', *few])
    yield root
    os.chdir(before)


@pytest.fixture()
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    for name in 'needle.json', 'needle.png', 'context.json', 'context.png':
        for run in 'word', 'gpt', 'byte':
            if os.path.exists(path := f'out/{run}/{name}'):
                os.remove(path)


def tokenizers():
    found = [Tokenizer({'kind': 'byte'}), word_tokenizer(needle.vocabulary(), TEXT, 768)]
    try:
        return [*found, Tokenizer({'kind': 'gpt2'})]
    except UserError:
        return found


def test_word_tokenizer_keeps_any_text():
    tokenizer = word_tokenizer(needle.vocabulary(), TEXT, 400)
    strange = "One of the\n\n  special magic Uuids: 3e4d-77 œuvre\t½ … zebras'"
    assert tokenizer.decode(tokenizer.encode(strange)) == strange
    assert tokenizer.encode(" zebra 4821907.") == [tokenizer.ids[p] for p in (b' zebra', b' 4', b'8', b'2', b'1', b'9', b'0',
                                                                              b'7', b'.')]


# -- training rows


@pytest.mark.parametrize('kind', ['word', 'gpt2'])
def test_every_answer_is_in_the_row_before_its_question(kind, monkeypatch):
    monkeypatch.setattr(needle, 'QUESTION_WEIGHT', 65535)  # no answer's, so that answers can be told from questions
    tokenizer = {t.spec['kind']: t for t in tokenizers()}.get(kind)
    if tokenizer is None:
        pytest.skip("needs tiktoken's GPT-2 files")
    haystacks = {'noise': Haystack(needle.NOISE, tokenizer), 'text': Haystack(TEXT, tokenizer)}
    asked = 0
    for seed in range(60):
        ids, weights = training_row(np.random.default_rng(seed), tokenizer, haystacks, 400)
        assert len(ids) == len(weights) == 400
        answers = ~np.isin(weights, (1, needle.QUESTION_WEIGHT))
        edges = np.flatnonzero(np.diff(answers.astype(int), prepend=0, append=0))
        for start, stop in edges.reshape(-1, 2):
            text, answer = tokenizer.decode(ids[:start].tolist()), tokenizer.decode(ids[start:stop].tolist())
            names = re.findall(r"magic \w+ for ([\w, ]+?)(?: mentioned in the provided text (?:is|are)| is:)$", text)[0]
            facts = dict.fromkeys(re.findall(r"One of the special magic \w+ for (\w+) is: ([\w-]+)\.", text))
            names = set(names.replace('and ', '').split(', '))
            assert [value for key, value in facts if key in names] == answer.strip(' .').split(', ')
            assert abs(int(weights[start:stop].sum()) - needle.ANSWER_WEIGHT) <= (stop - start) / 2
            first = len(tokenizer.encode(answer.split(',')[0]))
            assert (np.diff(weights[start:start + first].astype(int)) <= 0).all()  # the first tokens tell the key
            asked += 1
    assert asked > 100


def test_rows_reach_the_model_whole_and_weighted(here):
    data = Dataset('data', 'needle')
    x, y, weights, _ = data.random('train', 50, 256, np.random.default_rng(0))
    rows = data.read('train', range(0, 32 * 257, 257), 257)
    assert {r.tobytes() for r in np.concatenate((x, y[:, -1:]), axis=1)} <= {r.tobytes() for r in rows}
    every = data.map('train_weights', 0, 32 * 257, WEIGHT)
    assert abs(every.mean() / data.mean_weight['train'] - 1) < 1e-12
    assert 0.8 < weights.mean() < 1.2 and weights.dtype == np.float32
    with pytest.raises(UserError, match='block_size=257: a row of'):
        data.random('train', 1, 257, np.random.default_rng(0))


# -- haystacks


@pytest.mark.parametrize('length', [0, 24, 1000, 200_000])
def test_fill_has_the_length_and_keeps_sentences_whole(length):
    tokenizer = word_tokenizer(needle.vocabulary(), TEXT, 400)
    haystack, mark = Haystack(needle.NOISE, tokenizer), [1]
    for u, depth in (0.0, 0.0), (0.3, 0.5), (0.99, 1.0), (0.5, 0.77):
        stop = haystack.place(u)
        parts = list(haystack.fill(stop, length, [(depth, mark), (0.2, [2])]))
        ids = np.concatenate([part for part, _ in parts])
        assert len(ids) == length + 2
        plain = np.concatenate([part for part, which in parts if which is None] or [ids[:0]])
        whole = np.tile(haystack.ids, length // len(haystack.ids) + 2)
        assert np.array_equal(plain, whole[:len(whole) - len(haystack.ids) + stop][-length:] if length else plain)
        at = int(np.flatnonzero(ids == 1)[0])
        assert abs(at - depth * length) <= 7  # half of the longest sentence, and the other mark
        before = [i for i in ids[:at] if i != 2]
        assert not before or before[-1] == tokenizer.ids[b'.']


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('tokenizer', tokenizers(), ids=lambda t: t.spec['kind'])
def test_contexts_are_equally_long_and_hold_every_value(here, task, tokenizer):
    asker, evaluation = Asker.__new__(Asker), Evaluation('data/needle')
    asker.haystacks = {'noise': Haystack(needle.NOISE, tokenizer), 'text': Haystack(evaluation.text, tokenizer)}
    asker.samples = {task: [Asker.tokens(TASKS[task], s, tokenizer.encode) for s in evaluation.samples[task][:20]]}
    for length in asker.least(task), 3000:
        for depth in 0.0, 0.5, 1.0:
            for sample in asker.samples[task][:5]:
                blocks = list(asker.prompt(task, sample, length, depth))
                assert {len(b) for b in blocks[:-1]} <= {eval_needle.BLOCK} and len(blocks[-1]) >= 1
                assert sum(map(len, blocks)) == length - asker.answer_len(task)
                text = tokenizer.decode(np.concatenate(blocks).tolist())
                assert all(f": {value}." in text for value in sample['values']) and text.endswith((' is', ' are'))
                assert len(sample['values']) == TASKS[task].values * TASKS[task].asked


def test_a_long_context_costs_no_memory(here):
    tokenizer = word_tokenizer(needle.vocabulary(), TEXT, 400)
    haystack = Haystack(needle.NOISE, tokenizer)
    total = largest = 0
    for part, _ in haystack.fill(haystack.place(0.5), 3_000_000, [(0.5, [1])]):
        total, largest = total + len(part), max(largest, len(part))
    assert total == 3_000_001 and largest <= 65536


# -- scores


def evaluate(*argv):
    return eval_needle.main(['--out_dir=out/word', '--tasks=pass-key', '--lengths=96,160', '--depths=0,100', '--samples=3',
                             '--device=cpu', *argv])


class Parrot(torch.nn.Module):
    """A model that has seen everything: says what followed the first `is: ` of its context."""

    def __init__(self, asker, real, wrong=()):
        super().__init__()
        self.config, self.asker, self.wrong = real.config, asker, wrong

    def forward(self, idx, state=None, update_memory=True):
        read = idx if state is None else torch.cat((state, idx), dim=1)
        logits = torch.zeros(idx.size(0), 1, self.config.vocab_size)
        for row, ids in enumerate(read.tolist()):
            text = self.asker.reader.tokenizer.decode(ids)
            value = ' ' + (re.findall(r'is: ([\w-]+)\.', text) or [''])[0].upper() + '.'
            said = text.rpartition('provided text is')[2] if 'provided text is' in text else ''
            left = self.asker.reader.tokenizer.encode(value[len(said):] or ' ')
            logits[row, 0, left[0]] = 1.0
            if row in self.wrong:
                logits[row] = float('nan')
        return logits, None, read


@pytest.mark.parametrize('task', ['pass-key', 'uuid'])
def test_who_knows_the_needle_is_right_and_a_broken_one_is_listed(here, task):
    config = NeedleConfig(out_dir='out/byte', tasks=task, samples=3, device='cpu')
    asker = Asker(config.open('out/byte'), config, Evaluation('data/needle'))
    asker.reader.model = Parrot(asker, asker.reader.model)
    cell = eval_needle.score(asker, task, 700, 50, 3, True, 2)
    assert cell['right'] == 3 and cell['accuracy'] == 1 and cell['failed'] == [] and 0.4 < cell['interval'][0] < 0.5
    asker.reader.model.wrong = (1,)
    cell = eval_needle.score(asker, task, 700, 50, 3, True, 2)
    assert cell['right'] == 2 and cell['failed'] == [1] and cell['accuracy'] == 2 / 3


def test_streamed_answers_are_those_of_the_whole(here):
    config = NeedleConfig(tasks='number', samples=2, device='cpu')
    asker = Asker(config.open('out/word'), config, Evaluation('data/needle'))
    sample = asker.samples['number'][0]
    text, = asker.answers('number', [sample], 2500, 0.3)
    ids = torch.from_numpy(np.concatenate(list(asker.prompt('number', sample, 2500, 0.3))))[None]
    new = asker.answer_len('number') + eval_needle.SLACK
    whole = asker.reader.model.generate(ids, new, temperature=0)
    assert asker.reader.tokenizer.decode(whole[0, -new:].tolist()) == text


@pytest.mark.parametrize('right, n, low, high', [(100, 100, 0.963, 1.0), (0, 4, 0.0, 0.4899), (50, 100, 0.4038, 0.5962)])
def test_wilson_interval(right, n, low, high):
    assert eval_needle.interval(right, n) == pytest.approx([low, high], abs=1e-3)


def test_grid_is_kept_extended_and_drawn(here, capsys, monkeypatch):
    pytest.importorskip('matplotlib')
    assert evaluate('--baseline=out/gpt') == 0
    first = json.load(open('out/word/needle.json'))
    assert len(first['cells']) == 12 and os.path.getsize('out/word/needle.png') > 5000
    assert {c['model'] for c in first['cells']} == {'memory', 'never written', 'baseline'}
    calls = []
    real = eval_needle.score
    monkeypatch.setattr(eval_needle, 'score', lambda *args: calls.append(args[1:4]) or real(*args))
    assert evaluate('--baseline=out/gpt', '--lengths=96,160,300') == 0
    assert sorted(set(calls)) == [('pass-key', 300, 0), ('pass-key', 300, 100)] and len(calls) == 6
    assert json.load(open('out/word/needle.json'))['cells'][:12] == first['cells']


def test_a_cell_is_found_only_as_it_was_made(here, monkeypatch):
    """Another dtype, other constants, or a file that does not say: the cell is made again, and those of before are kept."""
    pytest.importorskip('matplotlib')
    calls, one = [], ('--lengths=96', '--depths=0', '--control=False')
    monkeypatch.setattr(eval_needle, 'score', lambda *args: calls.append(1) or {'right': 1, 'accuracy': 1.0})
    for flags, made in ((), 1), ((), 0), (('--dtype=bfloat16',), 1), (('--dtype=float32',), 0), (('--dtype=bfloat16',), 0):
        calls.clear()
        assert evaluate(*one, *flags) == 0 and len(calls) == made
    for constant in 'BLOCK', 'SLACK', 'SCORING':
        monkeypatch.setattr(eval_needle, constant, 7)
        calls.clear()
        assert evaluate(*one) == 0 and len(calls) == 1
    content = json.load(open('out/word/needle.json'))
    assert len(content['cells']) == 5
    old = 'task', 'model', 'length', 'depth', 'samples', 'accuracy'
    content['cells'] = [{k: c[k] for k in old} for c in content['cells']]
    json.dump(content, open('out/word/needle.json', 'w'))
    calls.clear()
    assert evaluate(*one) == 0 and len(calls) == 1
    assert len(json.load(open('out/word/needle.json'))['cells']) == 6


def test_ctrl_c_keeps_finished_cells_and_another_checkpoint_starts_anew(here, monkeypatch):
    done, real = [], eval_needle.score

    def score(*args):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(args)
        return real(*args)
    monkeypatch.setattr(eval_needle, 'score', score)
    assert evaluate() == 130
    assert len(json.load(open('out/word/needle.json'))['cells']) == 3
    monkeypatch.setattr(eval_needle, 'score', real)
    content = json.load(open('out/word/needle.json'))
    content['sources']['memory'] = 'of another checkpoint'
    json.dump(content, open('out/word/needle.json', 'w'))
    results = eval_needle.Results('out/word/needle.json', content['sources'] | {'memory': 'new'})
    assert {c['model'] for c in results.cells} == {'never written'}


def test_flat_says_it_on_one_line(here, capsys):
    assert evaluate('--flat=8192') == 0
    assert re.fullmatch(r"pass-key, 8,192 tokens in one stream: (not )?found; [\d.]+ ms a token \([+-][\d.]+% against 4,096 "
                        r"tokens\), peak memory [\d,]+ MB \(\+[\d.]+%\)\n", capsys.readouterr().out)


@pytest.mark.parametrize('argv, words', [
    (['--out_dir=out/char'], "out/char/ckpt.pt cannot be asked for needles, the tokenizer lacks"),
    (['--lengths=40'], "lengths=40: 40 is too short for 'pass-key'"),
    (['--lengths=0,512'], "lengths='0,512' must be at least 1"),
    (['--lengths='], "lengths='' must be whole numbers with commas between"),
    (['--lengths=1k'], "lengths='1k' must be whole numbers"),
    (['--depths=0,101'], "depths='0,101' must be at least 0 and at most 100"),
    (['--tasks=passkey'], "'passkey' is not one of pass-key"),
    (['--samples=0'], "samples=0 must be at least 1"),
    (['--samples=500'], "samples=500: the evaluation set has 200"),
    (['--flat=100'], "flat=100 must be at least 8192"),
    (['--data_dir=nowhere'], "no evaluation set here; run: python prepare.py needle"),
    (['--out_dir=nowhere'], "nowhere/ckpt.pt: no such checkpoint"),
    (['--baseline=nowhere'], "nowhere/ckpt.pt: no such checkpoint"),
])
def test_needle_refuses(here, argv, words):
    with pytest.raises(UserError) as error:
        try:
            evaluate(*argv)
        except SystemExit:
            raise AssertionError from None
    assert words in str(error.value) and '\n' not in str(error.value)
    assert not os.path.exists('out/word/needle.json')


@pytest.mark.parametrize('argv, words', [
    (['needle', '--haystack=short.txt'], "short.txt (train) is too short for a haystack"),
    (['needle', '--haystack=nothing.txt'], "nothing.txt: No such file"),
    (['needle', '--tokenizer=char'], "tokenizer='char' must be word"),
    (['needle', '--words=10'], "words=10 must be at least the"),
    (['needle', '--block_size=64'], r"block_size=64 must be in [128, 16777216]"),
    (['needle', '--rows=0'], "rows=0 must be at least 16"),
    (['needle', '--source=tale.txt'], "--source is not for needle; give --haystack=FILE"),
    (['text', '--train_path=tale.txt', '--tokenizer=word'], "tokenizer='word' is for needle"),
])
def test_prepare_needle_refuses(here, argv, words):
    with open('short.txt', 'w') as f:
        f.write("Too short. By far.")
    before = os.path.getmtime('data/needle/meta.json')
    with pytest.raises(UserError) as error:
        prepare.main(argv)
    assert words in str(error.value) and '\n' not in str(error.value)
    assert os.path.getmtime('data/needle/meta.json') == before and not os.path.exists('data/needle.partial')


def test_any_prepared_text_is_a_haystack(here, tmp_path):
    prepare.main(['text', '--train_path=tale.txt', f'--data_dir={tmp_path}'])
    prepare.main(['needle', '--haystack=text', '--rows=16', f'--data_dir={tmp_path}'])
    assert Evaluation(f'{tmp_path}/needle').text.strip() in TEXT


def test_without_writing_there_is_only_the_control(here):
    assert evaluate('--update_memory=False', '--lengths=96', '--depths=0', '--samples=1') == 0
    with open('out/word/needle.json', encoding='utf-8') as f:
        assert {cell['model'] for cell in json.load(f)['cells']} == {'never written'}


# -- loss against position


def test_context_curve_is_the_mean_loss_of_its_positions(here, capsys):
    pytest.importorskip('matplotlib')
    prepare.main(['text', '--train_path=tale.txt'])
    assert eval_context.main(['--out_dir=out/byte', '--dataset=text', '--length=2048', '--rows=3', '--device=cpu']) == 0
    content = json.load(open('out/byte/context.json'))
    assert content['config']['rows'] == 3 and content['models']['memory']['dtype'] == 'float32'
    assert set(content['loss']) == {'memory', 'never written'} and os.path.getsize('out/byte/context.png') > 5000
    reader = Reader('out/byte/ckpt.pt', 'cpu', 'float32')
    data = Dataset('data', 'text')
    last = data.tokens['val'] - 2049
    block = torch.from_numpy(data.read('val', [0, last // 2, last], 2049))
    with torch.no_grad():
        logits, _, _ = reader.model(block[:, :-1], block[:, 1:])
    ce = torch.nn.functional.cross_entropy(logits.mT, block[:, 1:], reduction='none')
    assert content['loss']['memory'] == pytest.approx([ce[:, :1024].mean().item(), ce[:, 1024:].mean().item()], abs=1e-5)
    assert [(a, b) for a, b, _ in eval_context.octaves([1.0] * 8)] == [(0, 1024), (1024, 2048), (2048, 4096), (4096, 8192)]


@pytest.mark.parametrize('argv, words', [
    (['--length=3000'], "length=3000 must be a power of two"), (['--rows=0'], "rows=0 must be at least 1"),
    (['--length=65536'], "val.bin has only"), (['--dataset=nothing'], "data set 'nothing' is not prepared"),
    (['--out_dir=out/word'], "has another tokenizer than data set 'text'"),
])
def test_context_refuses(here, argv, words):
    prepare.main(['text', '--train_path=tale.txt'])
    with pytest.raises(UserError) as error:
        eval_context.main(['--out_dir=out/byte', '--dataset=text', '--length=1024', *argv])
    assert words in str(error.value) and '\n' not in str(error.value)
