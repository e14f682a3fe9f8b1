"""Conversations to learn from, and what is measured of what was learned."""
import json
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from test_cli import TINY, refused

import eval_learning
import eval_talk
import prepare
import train
from eval_learning import Phrase, ask
from model import TitansConfig
from nanotitans.dataset import Dataset
from nanotitans.reader import Reader, ReaderConfig
from nanotitans.seeds import generator
from nanotitans.tokenizer import Tokenizer
from tasks import needle, talk

SENTENCES = [['The grass is green.', 'The sky is blue and the sun is yellow.'], ['Here we go, there and back again.']]
BYTES = Tokenizer({'kind': 'byte'})


@pytest.mark.parametrize('seed', range(6))
def test_every_answer_is_right(seed):
    """What is asked for was told last as it is answered; 'I do not know.' only where nothing was; weights stand on answers."""
    ids, weights = talk.conversation(np.random.default_rng(seed), BYTES, SENTENCES, 4000)
    assert len(ids) == len(weights) == 4000
    told, phrases, answered, end = {}, set(), 0, 0
    lines = BYTES.decode(ids.tolist()).split('\n')[:-1]
    for said, answer in zip(lines[::2], lines[1::2], strict=False):
        start, end = end + len(said) + 1, end + len(said) + len(answer) + 2
        if end > 4000:
            break
        assert weights[start:end].min() > 1  # all of an answer counts
        for _, tell, asks, reply in talk.FAMILIES:
            pattern = {name: re.escape(x).replace(r'\{\}', r'(\w+)') for name, x in
                       (('tell', tell), ('asks', asks), ('reply', reply))}
            if match := re.fullmatch(pattern['tell'] + r' (\w+)\.', said):
                told[tell, match[1]] = match[2]
                assert answer + '\n' == talk.TOLD
            elif match := re.fullmatch(pattern['asks'], said):
                answered += 1
                value = told.get((tell, match[1]))
                assert answer == ('I do not know.' if value is None else f'{reply.format(match[1])} {value}.')
        if said.startswith('Learn: '):
            phrases.add(said[7:-1])
            assert answer + '\n' == talk.TOLD
        if said.startswith('Recite: '):
            answered += 1
            assert f'{said[8:]}{answer[:-1]}' in phrases
    assert answered > 5 and weights.max() > 100


def test_prepare_talk(tmp_path, capsys):
    """Rows of whole conversations whose words are tokens; the same for the same seed."""
    for name in 'a', 'b':
        prepare.main(['talk', f'--data_dir={tmp_path / name}', '--rows=32'])
    data = Dataset(str(tmp_path / 'a'), 'talk')
    assert data.meta == Dataset(str(tmp_path / 'b'), 'talk').meta and data.row_len == 257
    tokenizer = Tokenizer(data.tokenizer)
    assert len(tokenizer.encode('My dog is called Bruno.')) == 6 and len(tokenizer.encode('Your dog is called Xq.')) == 8
    assert 'at least the' in refused(prepare.main, 'talk', f'--data_dir={tmp_path}', '--words=9')
    assert 'needle' not in capsys.readouterr().err


def test_evaluations_read_what_training_did_not(tmp_path, monkeypatch):
    """No sentence that talk and learning are evaluated on is among the training rows' text, nor any line of Python there."""
    texts, read = {}, []
    monkeypatch.setattr(talk, 'conversation', lambda rng, tokenizer, others, length: texts.update({len(texts): others})
                        or (np.zeros(length, int), np.ones(length, int)))
    prepare.main(['talk', f'--data_dir={tmp_path}', '--rows=16'])
    noise, sentences, code = ({' '.join(line.split()) for line in text} for text in texts[0])

    class Text(Exception):
        pass

    def haystack(text, *_, **__):
        read.append(text)
        raise Text
    reader = mock.MagicMock(content={'provenance': {'dataset': 'talk'}})
    monkeypatch.setattr(ReaderConfig, 'open', lambda *_: reader)
    for module in eval_talk, eval_learning:
        monkeypatch.setattr(module, 'Haystack', haystack)
        monkeypatch.setattr(module, 'reach', lambda _: 0, raising=False)
        monkeypatch.setattr(module, 'Phrase', mock.MagicMock(), raising=False)
        with pytest.raises(Text):
            module.main([])
    assert len(read) == 2
    for text in read:
        assert len(text) > 30_000 and not {s.strip() for s in needle.sentences(text)} & (noise | sentences)
        assert len(code) > 1000 and not [line for line in code if len(line) >= 40 and line in text]


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    place = tmp_path_factory.mktemp('talk')
    prepare.main(['talk', f'--data_dir={place}', '--rows=32'])
    for arch in 'mac', 'gpt', 'mag':
        assert train.main(['--dataset=talk', f'--data_dir={place}', f'--out_dir={place}/{arch}', f'--arch={arch}', *TINY,
                           '--block_size=32']) == 0
    return place


def learning(place, *flags):
    return [f'--out_dir={place}/mac', '--device=cpu', '--words=6', '--phrases=2', '--times=3', '--between=20', '--hold=30,50',
            *flags]


def test_learning_measures_what_it_says(model, capsys):
    """Every number of the first phrase again, from plain forwards over the whole text so far."""
    pytest.importorskip('matplotlib')
    assert eval_learning.main(learning(model, f'--baseline={model}/gpt')) == 0
    found = json.loads((model / 'mac' / 'learning.json').read_text())
    assert (model / 'mac' / 'learning.png').read_bytes()[:4] == b'\x89PNG'
    assert found['config']['times'] == 3 and [(m['step'], m['dtype']) for m in found['models']] == [(2, 'float32')] * 2
    reader = Reader(str(model / 'mac' / 'ckpt.pt'), 'cpu', 'float32')
    phrase = Phrase(found['phrases'][0], 3, reader)
    assert phrase.given == ' '.join(phrase.text.split()[:3]) == found['given'][0]
    other = needle.Haystack(needle.held_out(needle.reference())[1], reader.tokenizer)
    at = other.place(generator('text between phrases', 1337, 0).random())
    text = other.cut(at, at + 200).tolist()
    for name, update_memory in ('memory', True), ('never written', False):
        lesson, read, states = found[name][0], text[:20], []
        for n, row in enumerate([*lesson['times'], *lesson['hold']]):
            if 0 < n <= 3:
                before = reader.read(torch.tensor([read]), None, update_memory)
                after = reader.read(torch.tensor([read + phrase.shown]), None, update_memory)
                read = read + phrase.shown + text[20 * n:20 * n + 20]
                m, w = (s.blocks[0].memory.weights[0] for s in (before, after))
                assert row['moved'] == pytest.approx((m - w).norm().item(), abs=1e-5) and (row['moved'] > 0) == update_memory
            elif n > 3:
                read = read + (text[80:110] if n == 4 else text[110:130])
                assert row['tokens'] == (30, 50)[n - 4]
            idx = torch.tensor([read + phrase.ids])
            logits = reader.model(idx[:, :-1], idx[:, 1:], update_memory=update_memory)[0][0, -len(phrase.ids) + phrase.start:]
            rest = idx[0, -len(phrase.ids) + phrase.start:]
            right = logits.gather(1, rest[:, None])
            assert row['log_prob'] == pytest.approx(logits.log_softmax(-1).gather(1, rest[:, None]).mean().item(), abs=1e-4)
            assert row['rank'] == pytest.approx((logits > right).sum(1).float().mean().item() + 1, abs=1e-3)
            states.append(row)
        assert len(states) == 6
    assert list(found['in the window']) == ['gpt']  # a segment of the other is shorter than the phrase
    out = capsys.readouterr().out.splitlines()
    labels = [*(f'shown {n} times' for n in range(4)), 'and 30 tokens later', 'and 50 tokens later']
    for label, (part, i) in zip(labels, [*(('times', n) for n in range(4)), ('hold', 0), ('hold', 1)], strict=True):
        line, = (line for line in out if line.startswith(label))
        assert line.removeprefix(label).split() == [
            f'{np.mean([f[part][i][key] for f in found[name]]):{form}}'
            for key, form in (('recalled', '.1%'), ('log_prob', '.3f'), ('rank', '.1f'))
            for name in ('memory', 'never written')]
    found = found['in the window']['gpt']
    assert (f"in the window of gpt: {np.mean([f['recalled'] for f in found]):.1%} of the words, log-probability "
            f"{np.mean([f['log_prob'] for f in found]):.3f}") in out


def test_words_recalled(model):
    """Words at their place: a model made to say the phrase has all of them, one that slips once all but one."""
    reader = Reader(str(model / 'mac' / 'ckpt.pt'), 'cpu', 'float32')
    phrase = Phrase('Learn: red oak stone lamp tea.', 2, reader)
    say = {'now': phrase.ids[phrase.start:]}
    reader.model.stream = lambda *_, **__: ((torch.tensor([[i]]), None) for i in say['now'])
    with torch.no_grad():
        assert ask(reader, phrase, None, True)['recalled'] == 1
        say['now'] = reader.tokenizer.encode(' oak iron lamp tea.')
        assert ask(reader, phrase, None, True)['recalled'] == 0.75
        say['now'] = reader.tokenizer.encode(' iron oak stone lamp')
        assert ask(reader, phrase, None, True)['recalled'] == 0


def test_talk_asks_for_what_it_told(model, monkeypatch):
    """One who has heard every word answers all right, and one who adds a letter nothing; the gap is as long as it says."""
    pytest.importorskip('matplotlib')
    sizes, end = [], []

    def answer(reader, question, heard, update_memory):
        text = reader.tokenizer.decode(heard)
        told = text[:text.rindex(talk.TOLD) + len(talk.TOLD)]
        sizes.append(len(heard) - len(reader.tokenizer.encode(told + '\n' + talk.SEEN)))
        for _, tell, asked, reply in talk.FAMILIES:
            if key := re.fullmatch(re.escape(asked).replace(r'\{\}', r'(\w+)'), question):
                found = re.search(f'{re.escape(tell.format(key[1]))} (\\w+)\\.\n', text)
                return f'{reply.format(key[1])} {found[1]}{end[-1]}.' if found else 'I do not know.'
    monkeypatch.setattr(eval_talk, 'answer', answer)
    monkeypatch.setattr(eval_talk, 'read', lambda reader, text, heard, _: (heard or []) + (
        text if isinstance(text, list) else reader.tokenizer.encode(text)))
    for slip, right in ('', 1), ('s', 0):
        end.append(slip)
        assert eval_talk.main([f'--out_dir={model}/mac', '--device=cpu', '--facts=4', '--gaps=0,30', '--samples=2']) == 0
        found = json.loads((model / 'mac' / 'talk.json').read_text())
        assert found['config']['seed'] == 1337 and found['models'][0]['dtype'] == 'float32'
        for rows in found['facts']['4'].values():
            assert [(r['gap'], r['right'], r['unknown']) for r in rows] == [(0, right, 1), (30, right, 1)]
    assert sizes == ([0] * 8 + [30] * 8) * 8


@pytest.mark.parametrize('flags, words', [
    ('--between=5', ('attention reaches 8 tokens', '--between=8')), ('--out_dir={}/mag --between=100', ('reaches 128', )),
    ('--out_dir={}/gpt', ('no long-term memory that could learn',)), ('--phrase=red', ('its first 2 words, of 1',)),
    ('--words=2', ('longer than its beginning',)), ('--hold=x', ("hold='x'",)), ('--times=0', ('times=0',)),
    ('--other=none.txt', ('none.txt: No such file',)),
])
def test_learning_refuses(model, flags, words):
    message = refused(eval_learning.main, *learning(model, *flags.format(model).split()))
    assert all(word in message for word in words), message


@pytest.mark.parametrize('arch, tokens', [('lmm', 0), ('mac', 32), ('mag', 3 * 16), ('gpt', 64)])
def test_how_far_attention_reaches(arch, tokens):
    config = TitansConfig(arch=arch, n_layer=3, block_size=64, segment_len=32, window_len=16)
    assert eval_learning.reach(config) == tokens


def test_the_least_that_can_be_asked_for():
    eval_learning.LearningConfig(words=2, phrases=1, begin=1, times=1, between=1, hold='1')
    eval_talk.TalkConfig(facts='1', gaps='0', samples=1)
    for config, option in ((eval_learning.LearningConfig, {'times': 0}), (eval_talk.TalkConfig, {'facts': '0'}),
                           (eval_talk.TalkConfig, {'samples': 0})):
        with pytest.raises(ValueError, match=next(iter(option))):
            config(**option)


def test_binary_text_is_refused(model, tmp_path):
    Path(tmp_path / 'x').write_bytes(b'abc\0def')
    assert 'binary (a zero byte at 3)' in refused(eval_learning.main, *learning(model, f'--other={tmp_path}/x'))
