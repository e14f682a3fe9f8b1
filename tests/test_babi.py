"""Answers follow from the facts and from nothing else; eval_babi.py counts right answers."""
import itertools
import json
import re

import numpy as np
import pytest
import torch
from helpers import refusal
from test_cli import TINY

import eval_babi
import prepare
import train
from nanotitans.dataset import WEIGHT, Dataset
from nanotitans.reader import Reader
from nanotitans.tokenizer import Tokenizer, word_tokenizer
from tasks import babi, needle

NAME, OF = '|'.join(babi.PEOPLE), {'moves': babi.MOVE, 'takes': babi.TAKE, 'drops': babi.DROP}
FACT = re.compile(f"({NAME}) (?:" + '|'.join(f"(?P<{what}>{'|'.join(verbs)})"
                                             for what, verbs in OF.items()) + r') the (\w+)\.')
ASKED = re.compile(r'(Where|Who) (is|was|took) (the )?(\w+)(?: before the (\w+))?\? '
                   r'(?:In the|It was) (\w+)\.')


# -- the answer by looking through all facts so far, for every question anew


def facts_of(text):
    """-> [(person, what, place or object)], where `what` is moves, takes or drops"""
    return [(m[1], next(what for what in OF if m[what]), m[5]) for m in FACT.finditer(text)]


def path(person, facts):
    return [thing for who, what, thing in facts if (who, what) == (person, 'moves')]


def place_of(thing, facts):
    """Where an object is, or None: with the person who took it last, if it was not put down."""
    handled = [i for i, (_, what, x) in enumerate(facts) if x == thing and what != 'moves']
    if not handled:
        return None
    who, what, _ = facts[handled[-1]]
    return path(who, facts if what == 'takes' else facts[:handled[-1]])[-1]


def trail(thing, facts):
    places = [place_of(thing, facts[:n]) for n in range(len(facts) + 1)]
    return [b for a, b in itertools.pairwise(places) if a != b]


def solve(text, who, was, the, name, before):
    """The answer to a question about the facts of a text."""
    facts = facts_of(text)
    if who == 'Who':
        return [person for person, what, thing in facts if (what, thing) == ('takes', name)][-1]
    places = trail(name, facts) if the else path(name, facts)
    if was == 'is':
        return places[-1]
    return places[len(places) - 2 - places[::-1].index(before)]


# -- rows and samples


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with the data and two models: mac and gpt."""
    place = tmp_path_factory.mktemp('babi')
    prepare.main(['babi', f'--data_dir={place}', '--rows=256'])
    for arch in 'mac', 'gpt':
        assert train.main(['--dataset=babi', f'--data_dir={place}', f'--out_dir={place}/{arch}',
                           f'--arch={arch}', *TINY, '--block_size=256']) == 0
    return place


@pytest.fixture(scope='module')
def rows(folder):
    """-> [(text, [weight of each token], tokenizer)] of the training rows"""
    data = Dataset(str(folder), 'babi')
    tokenizer, count = Tokenizer(data.tokenizer), data.tokens['train'] // data.row_len
    ids = data.read('train', range(0, data.tokens['train'], data.row_len), data.row_len)
    weights = np.fromfile(folder / 'babi' / 'train_weights.bin', WEIGHT).reshape(count, -1)
    return [(tokenizer.decode(row.tolist()), row, weight.tolist(), tokenizer)
            for row, weight in zip(ids, weights, strict=True)]


def test_every_answer_of_a_row_follows_from_its_facts_and_weighs_most(rows):
    kinds = {}
    for text, ids, weights, tokenizer in rows:
        answers = [tokenizer.decode([i]) for i, weight in zip(ids.tolist(), weights, strict=True)
                   if weight == babi.ANSWER_WEIGHT]
        questions = list(ASKED.finditer(text))
        assert answers == [' ' + m[6] for m in questions]
        for m in questions:
            assert m[6] == solve(text[:m.start()], *m.groups()[:5]), (m[0], text)
            kinds[m[1], m[2], m[3]] = kinds.get((m[1], m[2], m[3]), 0) + 1
    assert len(kinds) == 5 and min(kinds.values()) > 50


def test_every_answer_of_the_evaluation_follows_from_its_facts(folder):
    samples = eval_babi.evaluation_set(str(folder / 'babi')).samples['stories']
    news = []
    for sample in samples:
        text = ''.join(fact for fact, _ in sample['facts'])
        facts, depths = facts_of(text), [depth for _, depth in sample['facts']]
        assert len(facts) == len(depths) == babi.FACTS and depths == sorted(depths)
        for task, asked in babi.ASKED.items():
            assert len(sample['questions'][task]) == asked
            for ask, answer, new in sample['questions'][task]:
                m = ASKED.fullmatch(f'{ask} {answer}.'[1:])
                assert answer == solve(text, *m.groups()[:5]), (ask, text)
                if task == 'qa1':
                    assert new == babi.held_out(m[4], answer)
                news.append(new)
    assert len(samples) == 200 and 0.2 < np.mean(news) < 0.5


def test_training_rows_keep_some_pairs_for_the_evaluation(rows, folder):
    """No row brings them together, and no row has the facts of a sample."""
    told = {(person, thing) for text, *_ in rows for person, _, thing in facts_of(text)}
    assert not {pair for pair in told if babi.held_out(*pair)}
    pairs = {(person, thing) for person in babi.PEOPLE for thing in babi.PLACES + babi.OBJECTS}
    kept = {pair for pair in pairs if babi.held_out(*pair)}
    assert len(kept) == len(pairs) / 4 and 0.9 < len(told) / len(pairs - kept) <= 1
    for sample in eval_babi.evaluation_set(str(folder / 'babi')).samples['stories']:
        story = facts_of(''.join(fact for fact, _ in sample['facts']))
        assert story and not [text for text, *_ in rows if facts_of(text)[:len(story)] == story]


def test_the_haystack_and_a_guess_do_not_give_the_answer(folder):
    """No haystack names a place, person or object. The best guess is wrong two times in three."""
    words = set(re.findall(r'\w+', needle.reference()))
    assert not words & {*babi.PLACES, *babi.PEOPLE, *babi.OBJECTS}
    samples = eval_babi.evaluation_set(str(folder / 'babi')).samples['stories']
    shares = babi.guess(samples)
    assert all(1 / 12 < share < 1 / 3 for share in shares.values())
    fact = [' Mary went to the park.', 0.5]
    story = {'facts': [fact, fact, [' John went to the attic.', 0.6]],
             'questions': {task: [['', 'park', False], ['', 'attic', False], ['', 'park', False]]
                           for task in babi.TASKS}}
    assert babi.guess([story]) == dict.fromkeys(babi.TASKS, 2 / 3)


# -- scores


class Solver(torch.nn.Module):
    """A perfect model: it keeps what it reads while it may write, and looks the answer up in it."""

    def __init__(self, reader):
        super().__init__()
        self.config, self.tokenizer = reader.model.config, reader.tokenizer
        self.asked = []  # for each question the tokens before its answer, and whether it may write

    def forward(self, idx, state=None, update_memory=True):
        read = idx if state is None else torch.cat((state, idx), dim=1)
        logits = torch.zeros(idx.size(0), 1, self.config.vocab_size)
        for row, ids in enumerate(read.tolist()):
            text = self.tokenizer.decode(ids)
            if text.endswith(' In the'):
                self.asked.append((len(ids), update_memory))
                m = ASKED.search(text[text.rindex(' Where'):] + ' nowhere.')
                answer = solve(text, *m.groups()[:5]) if FACT.search(text) else 'nowhere'
                logits[row, 0, self.tokenizer.encode(f' {answer}')[0]] = 1
        return logits, None, read if update_memory else torch.zeros_like(read)


def evaluate(folder, *argv):
    return eval_babi.main([f'--out_dir={folder}/mac', f'--data_dir={folder}', '--device=cpu',
                           '--lengths=170,3000', '--samples=3', *argv])


def saved(folder):
    return json.loads((folder / 'mac' / 'babi.json').read_text())


@pytest.fixture()
def results(folder):
    """The folder, without the results of other tests."""
    pytest.importorskip('matplotlib')
    (folder / 'mac' / 'babi.json').unlink(missing_ok=True)
    return folder


def test_a_perfect_model_scores_100_and_without_writing_0(results, monkeypatch, capsys):
    build, solvers = eval_babi.Asker, []

    def asker(reader, evaluation):
        solvers.append(Solver(reader))
        reader.model = solvers[-1]
        reader.model.config.memory_blocks = lambda: [0]
        return build(reader, evaluation)
    monkeypatch.setattr(eval_babi, 'Asker', asker)
    assert evaluate(results, f'--baseline={results}/gpt') == 0
    cells = saved(results)['cells']
    assert [(c['length'], c['model']) for c in cells] == [
        (n, name) for n in (170, 3000) for name in ('memory', 'never written', 'baseline')]
    for cell in cells:
        share = float(cell['model'] != 'never written')
        assert {task: (s['asked'], s['accuracy']) for task, s in cell['tasks'].items()} == {
            task: (3 * asked, share) for task, asked in babi.ASKED.items()}
        new = cell['tasks']['qa3']['new_pairs']
        assert new['right'] == share * new['asked'] and 0 < new['asked'] < 9
    memory, baseline = (sorted(solver.asked) for solver in solvers)
    assert memory[-1] == (2999, True) and memory[0][0] > 160
    assert [n for n, write in memory if write] == [n for n, write in memory if not write]
    assert [question for question in memory if question[1]] == baseline
    out = capsys.readouterr().out
    assert 'qa1  memory           170 100.0%   3000 100.0%' in out and 'never written' in out
    assert (results / 'mac' / 'babi.png').read_bytes()[:4] == b'\x89PNG'


@torch.no_grad()
def test_a_streamed_answer_is_that_of_the_text_read_at_once(folder):
    reader = Reader(str(folder / 'mac' / 'ckpt.pt'), 'cpu', 'float32')
    asker = eval_babi.Asker(reader, eval_babi.evaluation_set(str(folder / 'babi')))
    samples = asker.samples[:2]
    questions = [(np.concatenate(list(asker.text(sample, 1100))), *question)
                 for sample in samples for question in sample['questions']]
    logits = []
    reader.model.register_forward_hook(lambda model, args, out: logits.append(out[0]))
    for update_memory in True, False:
        found = list(asker.answers(samples, 1100, update_memory, lambda tokens: None))
        streamed = logits[-len(questions):]
        for (text, task, ask, answer, new), got, row in zip(questions, streamed, found,
                                                            strict=True):
            idx = torch.tensor([[*text, *ask]])
            want = reader.model(idx, update_memory=update_memory)[0]
            assert torch.allclose(got, want, atol=1e-6)
            assert row == (task, want.argmax().item() == answer[0], new)


def test_ctrl_c_keeps_finished_cells(results, monkeypatch, capsys):
    done, real = [], eval_babi.score

    def score(asker, cell, *args):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((cell['length'], cell['model']))
        return real(asker, cell, *args)
    monkeypatch.setattr(eval_babi, 'score', score)
    assert evaluate(results) == 130
    assert len(saved(results)['cells']) == 3 and 'same command' in capsys.readouterr().err
    done.clear()
    assert evaluate(results) == 0 and done == [(3000, 'never written')]


@pytest.mark.parametrize('flag, words', [
    ('--lengths=90', '90 is too short'), ('--lengths=x', "lengths='x'"),
    ('--samples=201', 'the evaluation set has 200'), ('--out_dir=nowhere', 'no such checkpoint'),
    ('--data_dir=nowhere', 'no evaluation set here; run: python prepare.py babi')])
def test_babi_refuses(results, flag, words):
    with refusal(words):
        evaluate(results, flag)
    assert not (results / 'mac' / 'babi.json').exists()


def test_a_model_without_these_words_is_refused(folder):
    reader = Reader(str(folder / 'mac' / 'ckpt.pt'), 'cpu', 'float32')
    reader.tokenizer = word_tokenizer(' Mary', '', 1)
    with refusal('an answer has several tokens', 'prepare.py babi'):
        eval_babi.Asker(reader, eval_babi.evaluation_set(str(folder / 'babi')))
