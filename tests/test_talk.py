"""Conversations have right answers, and the two evaluations measure what they say."""
import json
import re
from unittest import mock

import numpy as np
import pytest
import torch
from test_cli import TINY, refused

import eval_learning
import eval_talk
import prepare
import train
from eval_learning import Phrase, measure_recall
from model import TitansConfig
from nanotitans.dataset import Dataset
from nanotitans.reader import Reader, ReaderConfig
from nanotitans.seeds import generator
from nanotitans.tokenizer import Tokenizer
from tasks import needle, talk

SENTENCES = [['The grass is green.', 'The sky is blue and the sun is yellow.'],
             ['Here we go, there and back again.']]
BYTES = Tokenizer({'kind': 'byte'})


def pattern(text):
    """A regular expression for a sentence of talk.FAMILIES, with a group for its key."""
    return re.escape(text).replace(r'\{\}', r'(\w+)')


@pytest.mark.parametrize('seed', range(6))
def test_every_answer_is_right(seed):
    """An answer is what was told last, or 'I do not know.' if nothing was. Answers weigh more."""
    ids, weights = talk.conversation(np.random.default_rng(seed), BYTES, SENTENCES, 4000)
    assert len(ids) == len(weights) == 4000
    told, phrases, answered, end = {}, set(), 0, 0
    lines = BYTES.decode(ids.tolist()).split('\n')[:-1]
    for line, answer in zip(lines[::2], lines[1::2], strict=False):
        start = end + len(line) + 1
        end = start + len(answer) + 1
        if end > 4000:
            break
        assert weights[start:end].min() > 1
        for _, tell, question, reply in talk.FAMILIES:
            if match := re.fullmatch(pattern(tell) + r' (\w+)\.', line):
                told[tell, match[1]] = match[2]
                assert answer + '\n' == talk.TOLD
            elif match := re.fullmatch(pattern(question), line):
                answered += 1
                value = told.get((tell, match[1]))
                want = f'{reply.format(match[1])} {value}.' if value else 'I do not know.'
                assert answer == want
        if line.startswith('Learn: '):
            phrases.add(line[7:-1])
            assert answer + '\n' == talk.TOLD
        if line.startswith('Recite: '):
            answered += 1
            assert f'{line[8:]}{answer[:-1]}' in phrases
    assert answered > 5 and weights.max() > 100


def test_prepare_talk(tmp_path, capsys):
    """Words are tokens, and the same seed gives the same rows."""
    for name in 'a', 'b':
        prepare.main(['talk', f'--data_dir={tmp_path / name}', '--rows=32'])
    data, again = (Dataset(str(tmp_path / name), 'talk') for name in ('a', 'b'))
    assert data.meta == again.meta and data.row_len == 257
    tokenizer = Tokenizer(data.tokenizer)
    assert len(tokenizer.encode('My dog is called Bruno.')) == 6
    assert len(tokenizer.encode('Your dog is called Xq.')) == 8
    words = refused(prepare.main, 'talk', f'--data_dir={tmp_path}', '--words=9')
    assert 'at least the' in words and 'needle' not in capsys.readouterr().err


def test_evaluations_use_text_that_training_does_not(tmp_path, monkeypatch):
    """No sentence of the text of the two evaluations, nor a long line of code, is trained on."""
    trained_on, evaluated_on = [], []

    def conversation(rng, tokenizer, texts, length):
        trained_on.append(texts)
        return np.zeros(length, int), np.ones(length, int)
    monkeypatch.setattr(talk, 'conversation', conversation)
    prepare.main(['talk', f'--data_dir={tmp_path}', '--rows=16'])
    noise, sentences, code = ({' '.join(line.split()) for line in text} for text in trained_on[0])

    class Stop(Exception):
        pass

    def haystack(text, *_, **__):
        evaluated_on.append(text)
        raise Stop
    reader = mock.MagicMock(content={'provenance': {'dataset': 'talk'}})
    monkeypatch.setattr(ReaderConfig, 'open', lambda *_: reader)
    for module in eval_talk, eval_learning:
        monkeypatch.setattr(module, 'Haystack', haystack)
        monkeypatch.setattr(module, 'reach', lambda _: 0, raising=False)
        monkeypatch.setattr(module, 'Phrase', mock.MagicMock(), raising=False)
        with pytest.raises(Stop):
            module.main([])
    assert len(evaluated_on) == 2 and len(code) > 1000
    for text in evaluated_on:
        held_out = {sentence.strip() for sentence in needle.sentences(text)}
        assert len(text) > 30_000 and not held_out & (noise | sentences)
        assert not [line for line in code if len(line) >= 40 and line in text]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with the data and three models: mac, gpt and mag."""
    place = tmp_path_factory.mktemp('talk')
    prepare.main(['talk', f'--data_dir={place}', '--rows=32'])
    for arch in 'mac', 'gpt', 'mag':
        assert train.main(['--dataset=talk', f'--data_dir={place}', f'--out_dir={place}/{arch}',
                           f'--arch={arch}', *TINY, '--block_size=32']) == 0
    return place


def learning(folder, *flags):
    return [f'--out_dir={folder}/mac', '--device=cpu', '--words=6', '--phrases=2', '--times=3',
            '--between=20', '--hold=30,50', *flags]


def check_lesson(lesson, reader, phrase, text, update_memory):
    """The numbers of a phrase equal those of plain forwards over the whole text so far."""
    read = text[:20]
    for n, row in enumerate([*lesson['times'], *lesson['hold']]):
        if 0 < n <= 3:
            before = reader.read(torch.tensor([read]), None, update_memory)
            after = reader.read(torch.tensor([read + phrase.shown_ids]), None, update_memory)
            read = read + phrase.shown_ids + text[20 * n:20 * n + 20]
            m, w = (state.blocks[0].memory.weights[0] for state in (before, after))
            assert row['moved'] == pytest.approx((m - w).norm().item(), abs=1e-5)
            assert (row['moved'] > 0) == update_memory
        elif n > 3:
            read = read + (text[80:110] if n == 4 else text[110:130])
            assert row['tokens'] == (30, 50)[n - 4]
        idx, rest = torch.tensor([read + phrase.ids]), torch.tensor(phrase.ids[phrase.start:])
        logits = reader.model(idx[:, :-1], idx[:, 1:], update_memory=update_memory)[0]
        logits = logits[0, -len(rest):]
        right = logits.gather(1, rest[:, None])
        log_prob = (right - logits.logsumexp(-1, keepdim=True)).mean().item()
        assert row['log_prob'] == pytest.approx(log_prob, abs=1e-4)
        rank = (logits > right).sum(1).float().mean().item() + 1
        assert row['rank'] == pytest.approx(rank, abs=1e-3)
    assert n == 5


def check_table(result, lines):
    """The printed table has the means over phrases."""
    labels = {f'shown {n} times': ('times', n) for n in range(4)} | {
        'and 30 tokens later': ('hold', 0), 'and 50 tokens later': ('hold', 1)}
    for label, (part, i) in labels.items():
        line, = (line for line in lines if line.startswith(label))
        assert line.removeprefix(label).split() == [
            f'{np.mean([lesson[part][i][key] for lesson in result[name]]):{form}}'
            for key, form in (('recalled', '.1%'), ('log_prob', '.3f'), ('rank', '.1f'))
            for name in ('memory', 'never written')]
    assert list(result['in the window']) == ['gpt']  # the phrase does not fit in a segment of mac
    rows = result['in the window']['gpt']
    recalled, log_prob = (np.mean([row[key] for row in rows]) for key in ('recalled', 'log_prob'))
    assert (f"in the window of gpt: {recalled:.1%} of the words, log-probability {log_prob:.3f}"
            in lines)


@torch.no_grad()
def test_learning_measures_what_it_says(folder, capsys):
    pytest.importorskip('matplotlib')
    assert eval_learning.main(learning(folder, f'--baseline={folder}/gpt')) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads((folder / 'mac' / 'learning.json').read_text())
    assert (folder / 'mac' / 'learning.png').read_bytes()[:4] == b'\x89PNG'
    assert result['config']['times'] == 3
    assert [(m['step'], m['dtype']) for m in result['models']] == [(2, 'float32')] * 2
    reader = Reader(str(folder / 'mac' / 'ckpt.pt'), 'cpu', 'float32')
    phrase = Phrase(result['phrases'][0], 3, reader)
    assert phrase.given == ' '.join(phrase.text.split()[:3]) == result['given'][0]
    other = needle.Haystack(needle.held_out(needle.reference())[1], reader.tokenizer)
    start = other.place(generator('text between phrases', 1337, 0).random())
    text = other.cut(start, start + 200).tolist()
    check_lesson(result['memory'][0], reader, phrase, text, True)
    check_lesson(result['never written'][0], reader, phrase, text, False)
    check_table(result, lines)


@pytest.mark.parametrize('answer, share', [
    (' oak stone lamp tea.', 1), (' oak iron lamp tea.', 0.75), (' iron oak stone lamp', 0)])
def test_words_recalled(folder, answer, share):
    """The model's answer is replaced; the share of words in their place is counted."""
    reader = Reader(str(folder / 'mac' / 'ckpt.pt'), 'cpu', 'float32')
    phrase = Phrase('Learn: red oak stone lamp tea.', 2, reader)
    ids = reader.tokenizer.encode(answer)
    reader.model.stream = lambda *_, **__: ((torch.tensor([[i]]), None) for i in ids)
    with torch.no_grad():
        assert measure_recall(reader, phrase, None, True)['recalled'] == share


@pytest.mark.parametrize('suffix, right', [('', 1), ('s', 0)])
def test_talk_asks_for_what_it_told(folder, monkeypatch, suffix, right):
    """A model that remembers everything scores 1, one that adds a letter 0. Gaps fit."""
    pytest.importorskip('matplotlib')
    gaps = []

    def answer(reader, question, heard, update_memory):
        text = reader.tokenizer.decode(heard)
        told = text[:text.rindex(talk.TOLD) + len(talk.TOLD)]
        gaps.append(len(heard) - len(reader.tokenizer.encode(told + '\n' + talk.SEEN)))
        for _, tell, family_question, reply in talk.FAMILIES:
            if key := re.fullmatch(pattern(family_question), question):
                value = re.search(f'{re.escape(tell.format(key[1]))} (\\w+)\\.\n', text)
                return f'{reply.format(key[1])} {value[1]}{suffix}.' if value else 'I do not know.'

    def read(reader, text, heard, update_memory):
        return (heard or []) + (text if isinstance(text, list) else reader.tokenizer.encode(text))
    monkeypatch.setattr(eval_talk, 'answer', answer)
    monkeypatch.setattr(eval_talk, 'read', read)
    assert eval_talk.main([f'--out_dir={folder}/mac', '--device=cpu', '--facts=4', '--gaps=0,30',
                           '--samples=2']) == 0
    result = json.loads((folder / 'mac' / 'talk.json').read_text())
    assert result['config']['seed'] == 1337 and result['models'][0]['dtype'] == 'float32'
    for rows in result['facts']['4'].values():
        assert [(row['gap'], row['right'], row['unknown']) for row in rows] == [
            (0, right, 1), (30, right, 1)]
    assert gaps == ([0] * 8 + [30] * 8) * 4


@pytest.mark.parametrize('flags, words', [
    ('--between=5', ('attention reaches 8 tokens', '--between=8')),
    ('--out_dir={}/mag --between=100', ('reaches 128', )),
    ('--out_dir={}/gpt', ('no long-term memory that could learn',)),
    ('--phrase=red', ('its first 2 words, of 1',)), ('--words=2', ('longer than its beginning',)),
    ('--hold=x', ("hold='x'",)), ('--times=0', ('times=0',)),
    ('--other=none.txt', ('none.txt: No such file',)),
    ('--other={}/binary', ('binary (a zero byte at 3)',)),
])
def test_learning_refuses(folder, flags, words):
    (folder / 'binary').write_bytes(b'abc\0def')
    message = refused(eval_learning.main, *learning(folder, *flags.format(folder).split()))
    assert all(word in message for word in words), message


@pytest.mark.parametrize('arch, tokens', [('lmm', 0), ('mac', 32), ('mag', 3 * 16), ('gpt', 64)])
def test_how_far_attention_reaches(arch, tokens):
    config = TitansConfig(arch=arch, n_layer=3, block_size=64, segment_len=32, window_len=16)
    assert eval_learning.reach(config) == tokens


def test_smallest_options():
    eval_learning.LearningConfig(words=2, phrases=1, begin=1, times=1, between=1, hold='1')
    eval_talk.TalkConfig(facts='1', gaps='0', samples=1)
    for config, option, value in ((eval_learning.LearningConfig, 'times', 0),
                                  (eval_talk.TalkConfig, 'facts', '0'),
                                  (eval_talk.TalkConfig, 'samples', 0)):
        with pytest.raises(ValueError, match=option):
            config(**{option: value})
