"""The tasks of RULER: their answers are right, and nothing but the needle asked for gives them."""
import collections
import hashlib
import json
import re

import numpy as np
import pytest

from eval_needle import Asker
from nanotitans.tokenizer import word_tokenizer
from tasks import needle, ruler

TEXT = needle.held_out(needle.reference())[1]
TOKENIZER = word_tokenizer(ruler.vocabulary(), TEXT, 768)
SAMPLES = ruler.evaluation_set(7, TEXT, samples=20)
FACT = re.compile(r" One of the special magic \w+ for ([\w -]+?) is: ([\w-]+)\.")


def solve(text):
    """Answer the question at the end of a text, by reading the text. -> {value}"""
    if 'VAR' in text:
        told = dict(re.findall(r'VAR (\w+) = (?:VAR )?(\w+)\.', text))
        names = set()
        for name in told:
            value = name
            while value in told:
                value = told[value]
            names |= {name} if f'assigned the value {value} in' in text else set()
        return names
    if 'the above list' in text:
        entries = re.findall(r' (\d+)\. (\w+)', text.partition(' What')[0])
        assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
        return most_common((word for _, word in entries), 10)
    if 'coded text' in text:
        return most_common(re.findall(r'\b[a-z]{6}\b', text.partition(' What')[0]), 3)
    latest, asked = re.search(r'The (latest )?special magic \w+ for ([\w, -]+) mentioned in the '
                              r'provided text (?:is|are)$', text).groups()
    keys = set(re.split(', and |, | and ', asked))
    values = [value for key, value in FACT.findall(text) if key in keys]
    return set(values[-1:] if latest else values)


def most_common(words, n):
    counts = collections.Counter(words).most_common(n + 1)
    assert counts[n - 1][1] > counts[n][1]
    return {word for word, _ in counts[:n]}


def prompt(task, sample, length, depth):
    """The text of a context without its answer."""
    asker = Asker.__new__(Asker)
    kind = ruler.HAYSTACKS[task]
    asker.haystacks = {kind: ruler.haystack(kind, TEXT, TOKENIZER)}
    asker.samples = {task: [Asker.tokens(sample, TOKENIZER.encode)]}
    blocks = asker.prompt(task, asker.samples[task][0], length, depth)
    return TOKENIZER.decode(np.concatenate(list(blocks)).tolist())


@pytest.mark.parametrize('task', ruler.TASKS)
def test_answers_are_right_and_only_the_needles_have_them(task):
    for sample, depth in zip(SAMPLES[task], (0, 0.3, 1) * 2, strict=False):
        text = prompt(task, sample, 2500, depth)
        assert solve(text) == set(sample['values'])
        assert not any(value in sample['ask'] for value in sample['values'])
        for told, _ in sample['needles']:
            text = text.replace(told, '')
        assert not any(re.search(rf'\b{value}\b', text) for value in sample['values'])


def test_words_are_as_frequent_as_in_ruler():
    assert ruler.CodedText.counts(1000)[:5] == [607, 151, 67, 37, 24]  # 1000 / (k^2 zeta(2))
    list_of_words = ruler.WordList(TOKENIZER, ruler.words_of(TEXT))
    asked = [TOKENIZER.encode(f' {word}') for word in SAMPLES['common-words'][0]['values']]
    entries = list_of_words.entries(np.random.default_rng(0), asked, 6000)
    times = collections.Counter(TOKENIZER.decode(ids).split()[1] for ids in entries)
    often, seldom = times.most_common(10), times.most_common()[10:-1]  # the last is cut off
    assert {n for _, n in often} == {30} and {n for _, n in seldom} == {3}


def test_samples_of_the_first_tasks_are_drawn_as_before():
    first = {task: SAMPLES[task] for task in list(SAMPLES)[:6]}
    assert hashlib.sha256(json.dumps(first).encode()).hexdigest() == \
        '391a7d7fac7a25cf1dab8be69be9c424ee280ca6b10e2534d60b7169133c0da1'


def test_nothing_but_the_key_tells_which_needle_is_asked_for():
    samples = ruler.evaluation_set(7, TEXT, samples=200)
    for task, count in ('multi-key', 4), ('16-keys', 16), ('unseen-keys', 4):
        places = [i for sample in samples[task]
                  for i, (_, depth) in enumerate(sample['needles']) if depth is None]
        assert abs(np.mean(places) - (count - 1) / 2) < count / 10
        values = [sample['values'][0] for sample in samples[task]]
        assert len(set(values)) == 200 and len({value[0] for value in values}) == 9
    for task, kind in ('multi-key-2', 'numbers'), ('multi-key-3', 'uuids'):
        text, keys = needle.ring(kind)
        assert all(FACT.fullmatch(sample['needles'][0][0])[1] in keys for sample in samples[task])
        told = FACT.findall(text)
        assert len({key for key, _ in told} | set(keys)) == len(told) + len(keys) \
            == needle.RING[kind] + 1000


def test_latest_value_comes_after_others():
    for sample in SAMPLES['latest']:
        keys = [FACT.fullmatch(text)[1] for text, _ in sample['needles']]
        assert keys[0] == keys[-1] and len(set(keys)) == 4
        assert sample['span'] == 'before' and sample['needles'][-1][1] is None


def test_rows_of_training_are_one_text_or_two(monkeypatch):
    def text(rng, tokenizer, haystacks, length):
        lengths.append(length)
        return np.full(length, len(lengths)), np.arange(length)
    monkeypatch.setattr(ruler, 'training_text', text)
    seen = set()
    for seed in range(20):
        lengths = []
        ids, weights = ruler.training_row(np.random.default_rng(seed), None, None, 11)
        assert ids.tolist() == [i for i, n in enumerate(lengths, 1) for _ in range(n)]
        assert weights.tolist() == [j for n in lengths for j in range(n)]
        seen.add(tuple(lengths))
    assert seen == {(11,), (5, 6)}


def test_texts_of_training_have_right_answers_and_no_unseen_key(monkeypatch):
    monkeypatch.setattr(needle, 'QUESTION_WEIGHT', 65535)  # a weight that no answer has
    haystacks = {kind: ruler.haystack(kind, TEXT, TOKENIZER)
                 for kind in ('noise', 'text', 'list', 'code')}
    unseen = {FACT.fullmatch(text)[1] for sample in SAMPLES['unseen-keys']
              for text, _ in sample['needles']}
    evaluated = {text for samples in SAMPLES.values() for sample in samples
                 for text, _ in sample['needles'] if 'special' in text or 'VAR' in text}
    asked = collections.Counter()
    for seed in range(150):
        ids, weights = ruler.training_text(np.random.default_rng(seed), TOKENIZER, haystacks, 1025)
        assert len(ids) == len(weights) == 1025
        text = TOKENIZER.decode(ids.tolist())
        assert not any(f' {key} ' in text for key in unseen)
        assert not any(needle in text for needle in evaluated)
        answers = ~np.isin(weights, (1, needle.QUESTION_WEIGHT))
        edges = np.flatnonzero(np.diff(answers.astype(int), prepend=0, append=0)).reshape(-1, 2)
        for start, stop in edges:
            before = TOKENIZER.decode(ids[:start].tolist())
            answer = TOKENIZER.decode(ids[start:stop].tolist())
            if before.endswith(' is:'):  # a question in the words of the needle
                key = re.search(r' for ([\w -]+) is:$', before)[1]
                before += f' The special magic number for {key} mentioned in the provided text is'
                answer = f' for {key} is:{answer}'
            keys, values = zip(*re.findall(r' (?:for|from) ([\w -]+) is: ([\w-]+)[,.]', answer)
                               or [('', value) for value in answer.strip(' .').split(', ')],
                               strict=True)
            if ' from ' in answer:  # all first digits are tried
                assert [value[0] for value in values] == list('123456789')
                told = {v[0]: v for key, v in FACT.findall(before) if key == keys[0]}
                values = [value for value in values if len(value) > 1]
                assert set(values) == set(told.values()) and len(set(keys)) == 1
            else:
                assert solve(before) == set(values)
                assert keys[0] == '' or set(zip(keys, values, strict=True)) <= set(
                    FACT.findall(before))
            several = len(set(keys)) > 1
            if several:
                listed = f'{", ".join(keys[:-1])}, and {keys[-1]} mentioned in the provided'
                assert f' for {listed}' in before
            asked['several keys' if several else before.split()[-1]] += 1
    assert asked['is'] > 200 and asked['are'] > 20 and asked['are:'] > 10
    assert asked['several keys'] > 40


def test_made_up_words_are_of_training_or_of_evaluation():
    rng = np.random.default_rng(0)
    seen = {needle.made_up(rng) for _ in range(500)}
    unseen = {needle.made_up(rng, unseen=True) for _ in range(500)}
    assert not seen & unseen and not unseen & set(needle.KEYS)
    assert min(len(TOKENIZER.encode(f' {word}')) for word in unseen) > 3
