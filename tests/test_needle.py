"""Needles are where they should be, scores are right, finished cells are kept."""
import itertools
import json
import os
import re

import numpy as np
import pytest
import torch
from helpers import refusal

import eval_context
import eval_needle
import prepare
import train
from eval_needle import Asker, NeedleConfig, evaluation_set
from nanotitans.configurator import UserError
from nanotitans.dataset import WEIGHT, Dataset
from nanotitans.reader import Reader
from nanotitans.tokenizer import Tokenizer, word_tokenizer
from tasks import needle
from tasks.needle import Haystack, training_row
from tasks.ruler import HAYSTACKS, TASKS, haystack

TEXT = ' '.join(f"Sentence {i} of this long tale says that {'very ' * (i % 5)}little happens."
                for i in range(1500))
WORDS = word_tokenizer(needle.vocabulary(), TEXT, 400)
RESULTS = 'out/word/needle.json'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Prepare data/needle and data/text; train out/word and out/gpt, out/byte and out/char."""
    before, root = os.getcwd(), tmp_path_factory.mktemp('needle')
    os.chdir(root)
    (root / 'tale.txt').write_text(TEXT)
    prepare.main(['needle', '--haystack=tale.txt', '--rows=32', '--block_size=256'])
    flags = ['--max_iters=2', '--eval_interval=2', '--eval_iters=1', '--batch_size=2',
             '--n_layer=1', '--n_head=2', '--n_embd=16', '--memory_heads=2', '--segment_len=16',
             '--block_size=128', '--device=cpu']
    train.main(['--dataset=needle', '--out_dir=out/word', '--memory_gates=hard', *flags])
    train.main(['--dataset=needle', '--out_dir=out/gpt', '--arch=gpt', *flags])
    for kind in 'byte', 'char':
        prepare.main(['text', '--train_path=tale.txt', f'--tokenizer={kind}'])
        train.main(['--dataset=text', f'--out_dir=out/{kind}', *flags])
    yield root
    os.chdir(before)


@pytest.fixture()
def workspace(trained, monkeypatch):
    """Change to the folder of `trained`, and delete the results of other tests."""
    monkeypatch.chdir(trained)
    for pattern in 'out/*/*.json', 'out/*/*.png':
        for path in trained.glob(pattern):
            path.unlink()


def tokenizers():
    available = [Tokenizer({'kind': 'byte'}), word_tokenizer(needle.vocabulary(), TEXT, 768)]
    try:
        return [*available, Tokenizer({'kind': 'gpt2'})]
    except UserError:
        return available


def test_word_tokenizer_keeps_any_text():
    strange = "One of the\n\n  special magic Uuids: 3e4d-77 œuvre\t½ … zebras'"
    assert WORDS.decode(WORDS.encode(strange)) == strange
    parts = b' zebra', b' 4', b'8', b'2', b'1', b'9', b'0', b'7', b'.'
    assert WORDS.encode(" zebra 4821907.") == [WORDS.ids[p] for p in parts]


# -- training rows


@pytest.mark.parametrize('kind', ['word', 'gpt2'])
def test_every_answer_is_in_the_row_before_its_question(kind, monkeypatch):
    monkeypatch.setattr(needle, 'QUESTION_WEIGHT', 65535)  # a weight that no answer has
    tokenizer = {t.spec['kind']: t for t in tokenizers()}.get(kind)
    if tokenizer is None:
        pytest.skip("needs tiktoken's GPT-2 files")
    haystacks = {'noise': Haystack(needle.NOISE, tokenizer), 'text': Haystack(TEXT, tokenizer)}
    questions = several = tried = 0
    for seed in range(60):
        ids, weights = training_row(np.random.default_rng(seed), tokenizer, haystacks, 400)
        assert len(ids) == len(weights) == 400
        answers = ~np.isin(weights, (1, needle.QUESTION_WEIGHT))
        edges = np.flatnonzero(np.diff(answers.astype(int), prepend=0, append=0))
        for start, stop in edges.reshape(-1, 2):
            text = tokenizer.decode(ids[:start].tolist())
            answer = tokenizer.decode(ids[start:stop].tolist())
            names = re.findall(r"magic \w+ for ([\w, ]+?)"
                               r"(?: mentioned in the provided text (?:is|are)| is:)$", text)[0]
            names = names.replace('and ', '').split(', ')
            needles = re.findall(r"One of the special magic \w+ for (\w+) is: ([\w-]+)\.", text)
            facts = [fact for fact in dict.fromkeys(needles) if fact[0] in names]
            if text.endswith(' is:'):  # in the words of the needle
                parts = [('', f' {value}') for _, value in facts]
            elif len(names) > 1:  # as in the list of the question
                facts.sort(key=lambda fact: names.index(fact[0]))
                listed = ['', *(f' {a}, {b}' for a, b in itertools.pairwise(names))]
                listed[-1] = listed[-1].replace(', ', ', and ')
                parts = [(f'{before} for {key} is:', f' {value}')
                         for before, (key, value) in zip(listed, facts, strict=True)]
                several += 1
            elif len(facts) > 1:  # all first digits are tried
                rest = {value[0]: value[1:] for _, value in facts}
                parts = [(f' from {names[0]} is: {digit}', rest.get(digit, ''))
                         for digit in '123456789']
                tried += 1
            else:
                parts = [(f' for {names[0]} is:', f' {facts[0][1]}')]
            assert answer == ','.join(lead + value for lead, value in parts) + '.'
            total = needle.ANSWER_WEIGHT * sum(value != '' for _, value in parts)
            assert abs(int(weights[start:stop].sum()) - total) <= (stop - start) / 2
            for lead, value in parts:  # the first tokens of a value weigh most
                value_start = start + len(tokenizer.encode(lead))
                lead, start = weights[start:value_start], \
                    value_start + len(tokenizer.encode(f'{value},'))
                assert (np.abs(lead - needle.LEAD * weights[value_start]) <= 1).all()
                assert (np.diff(weights[value_start:start].astype(int)) <= 0).all()
            assert start == stop
            questions += 1
    assert questions > 100 and several > 5 and tried > 0


def test_numbers_of_one_key_do_not_begin_alike():
    facts = [('oak', first + '234567') for first in '123']  # they differ by any few digits
    for seed in range(20):
        alike = needle.make_alike(np.random.default_rng(seed), 'numbers', facts)
        firsts = {value[0] for _, value in alike}
        assert len(firsts) == 3 and '0' not in firsts


def test_training_reads_complete_rows_with_weights(workspace):
    data = Dataset('data', 'needle')
    x, y, weights, _ = data.random('train', 50, 256, np.random.default_rng(0))
    rows = {row.tobytes() for row in data.read('train', range(0, 32 * 257, 257), 257)}
    assert {row.tobytes() for row in np.concatenate((x, y[:, -1:]), axis=1)} <= rows
    all_weights = data.map('train_weights', 0, 32 * 257, WEIGHT)
    of_targets = all_weights.reshape(32, 257)[:, 1:]
    assert abs(of_targets.mean() / data.mean_weight['train'] - 1) < 1e-12
    assert 0.8 < weights.mean() < 1.2 and weights.dtype == np.float32
    with pytest.raises(UserError, match='block_size=257: a row of'):
        data.random('train', 1, 257, np.random.default_rng(0))


# -- haystacks


@pytest.mark.parametrize('length', [0, 24, 1000, 200_000])
def test_fill_has_the_length_in_parts_and_keeps_sentences_whole(length):
    haystack = Haystack(needle.NOISE, WORDS)
    for u, depth in (0.0, 0.0), (0.3, 0.5), (0.99, 1.0), (0.5, 0.77):
        stop = haystack.place(u)
        parts = list(haystack.fill(stop, length, [(depth, [1]), (0.2, [2])]))
        ids = np.concatenate([part for part, _ in parts])
        assert len(ids) == length + 2 and max(len(part) for part, _ in parts) <= 65536
        hay = np.concatenate([ids[:0], *(part for part, mark in parts if mark is None)])
        want = np.tile(haystack.ids, length // len(haystack.ids) + 2)
        want = want[:len(want) - len(haystack.ids) + stop]
        assert np.array_equal(hay, want[len(want) - length:])
        place = int(np.flatnonzero(ids == 1)[0])
        assert abs(place - depth * length) <= 7  # half a sentence, and the other mark
        before = [i for i in ids[:place] if i != 2]
        assert not before or before[-1] == WORDS.ids[b'.']


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('tokenizer', tokenizers(), ids=lambda t: t.spec['kind'])
def test_contexts_are_equally_long_and_hold_every_needle(workspace, task, tokenizer):
    asker, evaluation = Asker.__new__(Asker), evaluation_set('data/needle')
    asker.haystacks = {HAYSTACKS[task]: haystack(HAYSTACKS[task], evaluation.text, tokenizer)}
    asker.samples = {task: [Asker.tokens(sample, tokenizer.encode)
                            for sample in evaluation.samples[task][:5]]}
    shortest = asker.shortest_context(task)
    for length in shortest, shortest + 2000:
        for depth in 0.0, 0.5, 1.0:
            for sample, texts in zip(asker.samples[task], evaluation.samples[task], strict=False):
                blocks = list(asker.prompt(task, sample, length, depth))
                assert {len(b) for b in blocks[:-1]} <= {eval_needle.PIECE} and len(blocks[-1]) >= 1
                assert sum(map(len, blocks)) == length - asker.answer_len(task)
                text = tokenizer.decode(np.concatenate(blocks).tolist())
                assert all(needle in text for needle, _ in texts['needles'])
                assert text.endswith(texts['ask'])


# -- scores


def evaluate(*argv):
    return eval_needle.main(['--out_dir=out/word', '--tasks=pass-key', '--lengths=96,160',
                             '--depths=0,100', '--samples=3', '--device=cpu', *argv])


def saved():
    with open(RESULTS, encoding='utf-8') as f:
        return json.load(f)


class Parrot(torch.nn.Module):
    """A perfect model: its answer is what followed the first `is: ` in its context."""

    def __init__(self, reader):
        super().__init__()
        self.config, self.tokenizer, self.wrong = reader.model.config, reader.tokenizer, ()

    def forward(self, idx, state=None, update_memory=True):
        read = idx if state is None else torch.cat((state, idx), dim=1)
        logits = torch.zeros(idx.size(0), 1, self.config.vocab_size)
        for row, ids in enumerate(read.tolist()):
            text = self.tokenizer.decode(ids)
            value = re.search(r'is: ([\w-]+)\.', text)
            answer = f" {value[1].upper()}." if value else ' .'
            done = text.rpartition('provided text is')[2] if 'provided text is' in text else ''
            logits[row, 0, self.tokenizer.encode(answer[len(done):] or ' ')[0]] = 1.0
            if row in self.wrong:
                logits[row] = float('nan')
        return logits, None, read


def open_asker(out_dir, **options):
    config = NeedleConfig(out_dir=out_dir, device='cpu', **options)
    return Asker(config.open(out_dir), config, evaluation_set('data/needle'))


@pytest.mark.parametrize('task', ['pass-key', 'uuid'])
def test_a_perfect_model_scores_1_and_a_row_of_nan_is_listed_as_failed(workspace, task):
    asker = open_asker('out/byte', tasks=task, samples=3)
    asker.reader.model = Parrot(asker.reader)
    cell = eval_needle.score(asker, task, 700, 50, 3, True, 2)
    assert cell['right'] == 3 and cell['accuracy'] == 1 and cell['failed'] == []
    assert 0.4 < cell['interval'][0] < 0.5
    asker.reader.model.wrong = (1,)
    cell = eval_needle.score(asker, task, 700, 50, 3, True, 2)
    assert cell['right'] == 2 and cell['failed'] == [1] and cell['accuracy'] == 2 / 3


def test_streamed_answers_equal_those_of_a_prompt_read_at_once(workspace):
    asker = open_asker('out/word', tasks='number', samples=2)
    sample = asker.samples['number'][0]
    text, = asker.answers('number', [sample], 2500, 0.3)
    prompt = np.concatenate(list(asker.prompt('number', sample, 2500, 0.3)))
    new = asker.answer_len('number') + eval_needle.SLACK
    ids = asker.reader.model.generate(torch.from_numpy(prompt)[None], new, temperature=0)
    assert asker.reader.tokenizer.decode(ids[0, -new:].tolist()) == text


@pytest.mark.parametrize('right, n, interval', [
    (100, 100, [0.963, 1.0]), (0, 4, [0.0, 0.4899]), (50, 100, [0.4038, 0.5962])])
def test_wilson_interval(right, n, interval):
    assert eval_needle.interval(right, n) == pytest.approx(interval, abs=1e-3)


def test_grid_is_kept_extended_and_drawn(workspace, monkeypatch):
    pytest.importorskip('matplotlib')
    assert evaluate('--baseline=out/gpt') == 0
    cells = saved()['cells']
    assert len(cells) == 12 and os.path.getsize('out/word/needle.png') > 5000
    assert {c['model'] for c in cells} == {'memory', 'never written', 'baseline'}
    calls, score = [], eval_needle.score
    monkeypatch.setattr(eval_needle, 'score',
                        lambda *args: calls.append(args[1:4]) or score(*args))
    assert evaluate('--baseline=out/gpt', '--lengths=96,160,300') == 0
    assert sorted(calls) == [('pass-key', 300, 0)] * 3 + [('pass-key', 300, 100)] * 3
    assert saved()['cells'][:12] == cells


def test_a_cell_is_used_again_only_if_computed_in_the_same_way(workspace, monkeypatch):
    """Another dtype or constant, or a file without them, adds a cell and keeps the old one."""
    pytest.importorskip('matplotlib')
    calls = []

    def score(*args):
        calls.append(args)
        return {'right': 1, 'accuracy': 1.0}

    def computed(*flags):
        calls.clear()
        assert evaluate('--lengths=96', '--depths=0', '--control=False', *flags) == 0
        return len(calls)
    monkeypatch.setattr(eval_needle, 'score', score)
    assert (computed(), computed(), computed('--dtype=bfloat16')) == (1, 0, 1)
    assert (computed('--dtype=float32'), computed('--dtype=bfloat16')) == (0, 0)
    for constant in 'PIECE', 'SLACK', 'SCORING':
        monkeypatch.setattr(eval_needle, constant, 7)
        assert computed() == 1
    content = saved()
    assert len(content['cells']) == 5
    known = 'task', 'model', 'length', 'depth', 'samples', 'accuracy'
    content['cells'] = [{k: cell[k] for k in known} for cell in content['cells']]
    with open(RESULTS, 'w') as f:
        json.dump(content, f)
    assert computed() == 1 and len(saved()['cells']) == 6


def test_ctrl_c_keeps_finished_cells_and_another_checkpoint_starts_anew(workspace, monkeypatch):
    done, real = [], eval_needle.score

    def score(*args):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(args)
        return real(*args)
    monkeypatch.setattr(eval_needle, 'score', score)
    assert evaluate() == 130
    content = saved()
    assert len(content['cells']) == 3
    content['sources']['memory'] = 'of another checkpoint'
    with open(RESULTS, 'w') as f:
        json.dump(content, f)
    results = eval_needle.Results(RESULTS, content['sources'] | {'memory': 'new'})
    assert {c['model'] for c in results.cells} == {'never written'}


def test_flat_reports_one_line(workspace, capsys):
    assert evaluate('--flat=8192') == 0
    assert re.fullmatch(
        r"pass-key, 8,192 tokens in one stream: (not )?found; [\d.]+ ms a token "
        r"\([+-][\d.]+% against 4,096 tokens\), peak memory [\d,]+ MB \(\+[\d.]+%\)\n",
        capsys.readouterr().out)


@pytest.mark.parametrize('flag, words', [
    ('--out_dir=out/char', "out/char/ckpt.pt cannot be asked for needles, the tokenizer lacks"),
    ('--lengths=40', "lengths=40: 40 is too short for 'pass-key'"),
    ('--lengths=0,512', "lengths='0,512' must be at least 1"),
    ('--lengths=', "lengths='' must be whole numbers with commas between"),
    ('--lengths=1k', "lengths='1k' must be whole numbers"),
    ('--depths=0,101', "depths='0,101' must be at least 0 and at most 100"),
    ('--tasks=passkey', "'passkey' is not one of pass-key"),
    ('--samples=0', "samples=0 must be at least 1"),
    ('--samples=500', "samples=500: the evaluation set has 200"),
    ('--flat=100', "flat=100 must be at least 8192"),
    ('--data_dir=nowhere', "no evaluation set here; run: python prepare.py needle"),
    ('--out_dir=nowhere', "nowhere/ckpt.pt: no such checkpoint"),
    ('--baseline=nowhere', "nowhere/ckpt.pt: no such checkpoint"),
])
def test_needle_refuses(workspace, flag, words):
    with refusal(words):
        evaluate(flag)
    assert not os.path.exists(RESULTS)


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
def test_prepare_needle_refuses(workspace, argv, words):
    with open('short.txt', 'w') as f:
        f.write("Too short. By far.")
    before = os.path.getmtime('data/needle/meta.json')
    with refusal(words):
        prepare.main(argv)
    assert os.path.getmtime('data/needle/meta.json') == before
    assert not os.path.exists('data/needle.partial')


@pytest.mark.parametrize('name', ['needle', 'ruler'])
def test_a_missing_evaluation_set_names_its_command(tmp_path, name):
    with pytest.raises(UserError, match=f'no evaluation set here; run: python prepare.py {name}'):
        evaluation_set(f'{tmp_path}/{name}')


@pytest.mark.parametrize('change', [
    lambda samples: samples.pop('latest'),
    lambda samples: samples.update({'pass-key': [{'facts': [['harbor', '4821907', 0.5]]}]})])
def test_an_evaluation_set_of_an_older_version_is_refused(workspace, tmp_path, change):
    with open('data/needle/eval.json') as f:
        content = json.load(f)
    change(content['samples'])
    (tmp_path / 'eval.json').write_text(json.dumps(content))
    with pytest.raises(UserError, match='older version; run: python prepare.py needle'):
        evaluation_set(str(tmp_path))


def test_any_prepared_text_is_a_haystack(workspace, tmp_path):
    prepare.main(['text', '--train_path=tale.txt', f'--data_dir={tmp_path}'])
    prepare.main(['needle', '--haystack=text', '--rows=16', f'--data_dir={tmp_path}'])
    assert evaluation_set(f'{tmp_path}/needle').text.strip() in TEXT


def test_update_memory_false_runs_only_the_control(workspace):
    assert evaluate('--update_memory=False', '--lengths=96', '--depths=0', '--samples=1') == 0
    assert {cell['model'] for cell in saved()['cells']} == {'never written'}


# -- loss against position


def measure_context(*argv):
    prepare.main(['text', '--train_path=tale.txt'])
    return eval_context.main(['--out_dir=out/byte', '--dataset=text', '--device=cpu', *argv])


def test_context_curve_is_the_mean_loss_of_its_positions(workspace):
    pytest.importorskip('matplotlib')
    assert measure_context('--length=2048', '--rows=3', '--baseline=out/byte/,out/byte') == 0
    with open('out/byte/context.json') as f:
        content = json.load(f)
    assert content['config']['rows'] == 3 and content['models']['memory']['dtype'] == 'float32'
    assert set(content['loss']) == {'memory', 'never written', 'byte'}
    assert content['loss']['byte'] == content['loss']['memory']
    assert os.path.getsize('out/byte/context.png') > 5000
    reader, data = Reader('out/byte/ckpt.pt', 'cpu', 'float32'), Dataset('data', 'text')
    last = data.tokens['val'] - 2049
    block = torch.from_numpy(data.read('val', [0, last // 2, last], 2049))
    with torch.no_grad():
        logits, _, _ = reader.model(block[:, :-1], block[:, 1:])
    ce = torch.nn.functional.cross_entropy(logits.mT, block[:, 1:], reduction='none')
    want = [half.mean().item() for half in ce.split(256, dim=1)]
    assert content['loss']['memory'] == pytest.approx(want, abs=1e-5)
    assert [(a, b) for a, b, _ in eval_context.octaves([1.0] * 8)] == [
        (0, 256), (256, 512), (512, 1024), (1024, 2048)]


@pytest.mark.parametrize('flag, words', [
    ('--length=3000', "length=3000 must be a power of two"),
    ('--rows=0', "rows=0 must be at least 1"), ('--length=65536', "val.bin has only"),
    ('--dataset=nothing', "data set 'nothing' is not prepared"),
    ('--out_dir=out/word', "has another tokenizer than data set 'text'"),
])
def test_context_refuses(workspace, flag, words):
    with refusal(words):
        measure_context('--length=1024', flag)
