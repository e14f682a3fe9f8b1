"""Conversations and their memory files: saved, continued, refused to other models; sampling."""
import copy
import io
import itertools
import math
import os
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path
from unittest.mock import Mock

import processes
import pytest
import torch
from test_cli import HERE, PREPARE, TEXT, TINY, refused

import prepare
import sample
import train
from nanotitans import checkpoint, configurator, conversation, memory_file
from nanotitans.configurator import UserError
from nanotitans.conversation import Conversation
from nanotitans.reader import Reader, until_stop
from nanotitans.tokenizer import Tokenizer
from sample import SampleConfig

MEM = '--memory=me.mem'
MAC = ['--out_dir=mac', '--device=cpu']
SCRIPT = [sys.executable, str(HERE / 'sample.py'), *MAC]
MODELS = {'mac': [], 'other': ['--seed=1'], 'longer': ['--max_iters=4'],
          'mag': ['--arch=mag', '--window_len=5'], 'mal': ['--arch=mal', '--memory_depth=2'],
          'lmm': ['--arch=lmm'], 'gpt': ['--arch=gpt']}


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """A folder with the trained MODELS."""
    folder = tmp_path_factory.mktemp('models')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path('a.txt').write_text(TEXT)
        prepare.main(PREPARE)
        for name, flags in MODELS.items():
            assert train.main(['--dataset=text', f'--out_dir={name}', *TINY, *flags]) == 0
    return folder


@pytest.fixture()
def here(models, tmp_path, monkeypatch):
    """A fresh current directory, with a link to each of the models."""
    monkeypatch.chdir(tmp_path)
    for name in MODELS:
        os.symlink(models / name, name)
    return tmp_path


def talk(*flags):
    return Conversation(configurator.load(SampleConfig, [*MAC, '--max_new_tokens=7', *flags]))


def say(conversation, text):
    """-> the tokens of the answer to a text"""
    torch.manual_seed(0)
    conversation.read(conversation.reader.encode(text))
    return list(conversation.tokens())


@pytest.fixture()
def saved(here):
    """me.mem holds the memory of a conversation with the model mac. -> the conversation"""
    conversation = talk()
    say(conversation, 'def f1(x):\n')
    conversation.save('me.mem')
    return conversation


def tokens_saved():
    return torch.load('me.mem', weights_only=True)['tokens']


@pytest.mark.parametrize('arch', ['mac', 'mag', 'mal', 'lmm'])
def test_a_conversation_goes_on_as_if_never_broken_off(here, arch):
    """Saved and loaded after every turn: the same answers and the same state, to the bit."""
    unbroken = talk(f'--out_dir={arch}')
    for text in ('def f1(x):\n', 'return', ' x + 1\ndef f2(', 'x):\n' * 9):
        resumed = talk(f'--out_dir={arch}')
        if os.path.exists('me.mem'):
            resumed.load('me.mem')
        assert say(resumed, text) == say(unbroken, text)
        resumed.save('me.mem')
    a, b = (memory_file.digest(checkpoint.pack_state(c.state)) for c in (resumed, unbroken))
    assert a == b and torch.equal(resumed.unread, unbroken.unread)
    assert sorted(os.listdir()) == sorted([*MODELS, 'me.mem'])


def test_the_size_of_the_file_does_not_grow(here):
    conversation, sizes = talk(), []
    for start in range(0, 2000, 101):  # each text ends at another place in a segment
        conversation.read(conversation.reader.encode(TEXT[start:start + 101]))
        conversation.save('me.mem')
        sizes.append(os.path.getsize('me.mem'))
    assert max(sizes[10:]) <= max(sizes[:10]) < 15_000


def test_main_keeps_resets_and_leaves_the_memory(here, capsys):
    """--update_memory=False changes neither the file nor M."""
    def run(*flags):
        assert sample.main([*MAC, '--max_new_tokens=3', MEM, *flags]) == 0
        return capsys.readouterr()
    assert 'after 9 tokens' in run('--prompt=def f1(').err
    assert tokens_saved() == 7 + 2  # the last token of an answer is still unread
    run('--prompt=x')
    assert tokens_saved() == 9 + 1 + 1 + 2
    before = Path('me.mem').read_bytes()
    run('--prompt=return', '--update_memory=False')
    assert Path('me.mem').read_bytes() == before
    frozen = talk('--update_memory=False')
    frozen.load('me.mem')
    memory = frozen.state.blocks[0].memory.weights[0]
    say(frozen, 'return x')
    assert torch.equal(frozen.state.blocks[0].memory.weights[0], memory)
    Path('b.txt').write_text(TEXT[:100])
    out, err = run('--learn=b.txt')
    assert tokens_saved() == 13 + 1 + 99 and out == '' and 'learned 100 tokens' in err
    run('--reset_memory', '--prompt=x')
    assert tokens_saved() == 1 + 2


def edited(change, new_sum=True):
    """-> a damage: the content of a memory file is changed; new_sum: its checksum, too."""
    def damage(data):
        content = change(torch.load(io.BytesIO(data), weights_only=True))
        if new_sum:
            rest = {k: v for k, v in content.items() if k != 'sha256'}
            content = rest | {'sha256': memory_file.digest(rest)}
        file = io.BytesIO()
        torch.save(content, file)
        return file.getvalue()
    return damage


def edited_weights(change, new_sum=True):
    def edit(content):
        memory = content['state']['blocks'][0]['memory']
        memory['weights'] = change(memory['weights'])
        return content
    return edited(edit, new_sum)


def flip_a_bit_of_the_weights(data):
    content = torch.load(io.BytesIO(data), weights_only=True)
    weights = content['state']['blocks'][0]['memory']['weights']
    at = data.index(weights.numpy().tobytes()) + 5
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]


@pytest.mark.parametrize('damage, words', [
    (lambda data: data[:-200], 'not a readable memory file, truncated'),
    (lambda data: b'', 'not a readable memory file'), (lambda data: b'my memory', 'not a readable'),
    (flip_a_bit_of_the_weights, 'differs from its checksum'),
    (lambda data: Path('mac/ckpt.pt').read_bytes(), 'not a memory file, and will not be made one'),
    (edited(lambda content: content | {'memory': 99}), 'not a memory file of this version'),
    (edited(lambda content: content | {'memory': 1}), 'not a memory file of this version (3)'),
    (edited(lambda content: content | {'model': None}), 'not a memory file'),
    (edited(lambda content: torch.zeros(3), new_sum=False), 'not a memory file'),
    (edited(lambda content: content | {'unread': [10 ** 6]}), 'what is no token'),
    (edited_weights(lambda x: x + 1e-3, new_sum=False),
     'changed after it was written: its sum differs'),
    (edited_weights(lambda x: x[:, :, :3]), 'does not fit the model'),
    (edited_weights(lambda x: x.masked_fill(x == x.max(), math.nan)), 'does not fit the model')])
def test_a_damaged_file_is_refused_and_left(saved, damage, words):
    damaged = damage(Path('me.mem').read_bytes())
    Path('me.mem').write_bytes(damaged)
    message = refused(sample.main, *MAC, MEM, '--prompt=x')
    assert words in message and 'me.mem' in message, message
    assert Path('me.mem').read_bytes() == damaged


@pytest.mark.parametrize('name, words', [
    ('other', 'other weights'), ('longer', 'step=2 there, 4 here'),
    ('mag', 'arch=mac there, mag here'), ('mal', 'memory_depth=1 there, 2 here')])
def test_another_models_memory_is_refused_and_left(saved, monkeypatch, capsys, name, words):
    """To read it, to reset it and to save another one in its place."""
    before = Path('me.mem').read_bytes()
    argv = [*MAC, f'--out_dir={name}', MEM, '--prompt=x']
    assert words in refused(sample.main, *argv)
    reset = refused(sample.main, *argv, '--reset_memory')
    save = converse(monkeypatch, capsys, 'def\n/save me.mem', f'--out_dir={name}').err
    for message in reset, save:
        assert words in message and 'remove it, or give another name' in message
    assert Path('me.mem').read_bytes() == before


@pytest.mark.parametrize('flags, words', [
    ('--memory=no/me.mem', 'cannot write into'), ('--memory=mac', 'that is a folder'),
    ('--memory=new/', 'that is a folder'),
    ('--memory=none.mem --update_memory=False', 'none.mem: no such memory file'),
    ('--memory=me.mem --out_dir=gpt', 'no long-term memory that could be kept'),
    ('--reset_memory', 'needs the file: --memory=FILE'), ('--learn=b.txt', 'would be lost'),
    ('--memory=me.mem --learn=none.txt', 'none.txt: No such file'),
    ('--memory=me.mem --learn=mac', 'mac: Is a directory'),
    ('--memory=me.mem --learn=latin', 'not UTF-8 text (byte 2)'),
    ('--memory=me.mem --learn=zero', 'binary (a zero byte at 3)'),
    ('--memory=me.mem --learn=nothing', 'is empty'),
    ('--memory=me.mem --learn=emoji', "lacks 'é'"),
    ('--memory=me.mem --learn=b.txt --update_memory=False', 'learns nothing'),
    ('--memory=me.mem --num_samples=2', 'num_samples=2'),
    ('--interactive --prompt=x', 'prompt is not for'),
    ('--interactive --learn=-', 'takes the standard input'),
])
def test_what_cannot_be_is_one_line(here, flags, words):
    for name, data in (('latin', b'ab\xff'), ('zero', b'abc\0'), ('nothing', b''),
                       ('emoji', 'dé'.encode())):
        Path(name).write_bytes(data)
    assert words in refused(sample.main, *MAC, *flags.split())
    assert not Path('me.mem').exists()


def test_a_write_that_fails_leaves_the_old_file(saved, monkeypatch):
    before, full = Path('me.mem').read_bytes(), OSError(28, 'No space left on device')
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', Mock(side_effect=full))
        message = 'cannot save me.mem: No space left on device; the one before it is untouched'
        with pytest.raises(UserError, match=message):
            saved.save('me.mem')
    saved.state.blocks[0].memory.weights[0].fill_(float('nan'))
    with pytest.raises(UserError, match='me.mem is left as it was: .* not finite'):
        saved.save('me.mem')
    assert Path('me.mem').read_bytes() == before and not list(Path().glob('*.partial'))


def test_a_memory_is_private_and_stays_in_its_place(here, monkeypatch):
    """Only the user can read a new file; later permissions stay as they are, and so does a link."""
    modes, save = [], torch.save

    def record_mode(content, file):
        modes.append(os.stat(file.name).st_mode & 0o777)
        save(content, file)
    monkeypatch.setattr(torch, 'save', record_mode)
    os.mkdir('elsewhere')
    os.symlink('elsewhere/real.mem', 'me.mem')
    conversation = talk()
    say(conversation, 'def f1(x):\n')
    umask = os.umask(0o022)
    try:
        for mode, next_mode in (0o600, 0o640), (0o640, 0o666), (0o666, 0o666):
            conversation.save('me.mem')
            assert modes.pop() == mode == os.stat('elsewhere/real.mem').st_mode & 0o777
            os.chmod('elsewhere/real.mem', next_mode)
    finally:
        os.umask(umask)
    assert os.readlink('me.mem') == 'elsewhere/real.mem'
    assert os.listdir('elsewhere') == ['real.mem']


def test_what_was_typed_is_private(tmp_path, monkeypatch):
    pytest.importorskip('readline')
    path = tmp_path / 'history'
    monkeypatch.setattr(conversation, 'HISTORY', str(path))
    monkeypatch.setattr(sys, 'stdin', types.SimpleNamespace(isatty=lambda: True))
    path.write_text('')
    for _ in range(2):
        path.chmod(0o644)
        with conversation.history():
            pass
        assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize('name', ['me.mem', 'link.mem'])
def test_only_one_conversation_keeps_a_memory(here, monkeypatch, capsys, name):
    """Before the file exists and after, also through a link; others may still read it."""
    flag, argv = f'--memory={name}', [*MAC, '--max_new_tokens=3', '--prompt=x']
    message, before = f'{name}: another conversation keeps its memory', os.listdir()
    os.symlink('me.mem', 'link.mem')
    for _ in range(2):
        with memory_file.lock('me.mem'):
            assert message in refused(sample.main, *argv, flag)
            notes = converse(monkeypatch, capsys, f'def\n/save {name}', '--memory=other.mem').err
            assert message in notes
            if Path('me.mem').exists():
                assert sample.main([*argv, flag, '--update_memory=False']) == 0
        assert sample.main([*argv, flag]) == 0
    notes = converse(monkeypatch, capsys, f'def\n/save {name}\n/save a.mem\n/save a.mem', flag).err
    assert 'another conversation' not in notes
    written = ['me.mem', 'link.mem', 'other.mem', 'a.mem']
    assert sorted(os.listdir()) == sorted([*before, *written])


def test_a_killed_conversation_leaves_no_lock(here):
    child = os.fork()
    if not child:
        memory_file.lock('me.mem').__enter__()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with memory_file.lock('me.mem'):
        pass
    assert not list(Path().glob('*.lock'))


def test_a_file_named_like_the_lock_is_left(here):
    Path('me.mem.lock').write_text('mine')
    with memory_file.lock('me.mem'):
        pass
    assert Path('me.mem.lock').read_text() == 'mine'


@pytest.mark.parametrize('a, b', [
    ([1, 23], [12, 3]), (['ab', 'c'], ['a', 'bc']), ({1: 2}, [(1, 2)]), (1, '1'), (1, True),
    (1, 1.0), (None, 'None'), ([[1], 2], [[1, 2]]), ([[], []], [[[]]]),
    ({'a': {'b': 1}}, {'a': 1, 'b': {}}), ((1,), [1]), (0.0, -0.0), ('', []),
    ('\U0001f600', '\ud83d\ude00'), (['1', 1], [1, '1']), ('int 1:1', 1),
    (torch.zeros(2, 3), torch.zeros(3, 2)), (torch.zeros(1, dtype=torch.uint8), '\0'),
    ([torch.zeros(2), torch.zeros(1)], [torch.zeros(1), torch.zeros(2)]),
    (torch.zeros(1), torch.zeros(1, dtype=torch.int32)), (torch.zeros(0), []),
], ids=repr)
def test_no_two_contents_have_one_sum(a, b):
    digest = memory_file.digest
    assert digest(a) != digest(b) and digest([a, b]) != digest([b, a])
    assert digest([a]) == digest([copy.deepcopy(a)])


def test_an_interrupted_answer_is_remembered(here):
    """After 3 tokens of an answer the state is that of all that was heard and said."""
    conversation = talk('--temperature=0')
    heard = conversation.reader.encode('def f1(x):\n')
    conversation.read(heard)
    answer = list(itertools.islice(conversation.tokens(), 3))
    expected = conversation.reader.read(torch.cat((heard, torch.tensor([answer[:2]])), dim=1))
    assert conversation.state.pos == expected.pos == heard.size(1) + 2
    assert conversation.unread.tolist() == [answer[2:]]
    a, b = (state.blocks[0].memory.weights for state in (conversation.state, expected))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


def test_an_interrupted_reading_is_remembered(here, monkeypatch):
    """Ctrl-C in a long text: what was read until then is kept, and nothing of the rest."""
    conversation, read, calls = talk(), Reader.read, itertools.count()
    heard = conversation.reader.encode(TEXT[:100])

    def read_twice(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return read(*args)
    with monkeypatch.context() as patch:
        patch.setattr(Reader, 'read', read_twice)
        with pytest.raises(KeyboardInterrupt):
            conversation.read(heard)
    pos = 2 * conversation.model.config.block_size
    assert conversation.state.pos == pos
    assert conversation.unread.tolist() == heard[:, pos:pos + 1].tolist()
    conversation.save('me.mem')
    resumed = talk()
    resumed.load('me.mem')
    assert say(resumed, 'return') == say(conversation, 'return')
    assert resumed.state.pos == pos + 1 + 6 + 7 - 1


def start_long_answer(preexec_fn):
    """-> a process of sample.py in the middle of an answer without end"""
    command = [*SCRIPT, MEM, '--prompt=def', '--max_new_tokens=99999']
    process = subprocess.Popen(command, preexec_fn=preexec_fn, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.read(20)
    return process


def test_signals_that_come_together(here):
    """A second SIGTERM does not stop the save; SIGHUP does nothing where it is ignored (nohup)."""
    process = start_long_answer(lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    assert len(process.stdout.read(20)) == 20
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM
    talk().load('me.mem')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves(here, number):
    process = start_long_answer(processes.hear_signals)
    process.send_signal(number)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 128 + number and b'Traceback' not in err, err
    conversation = talk()
    conversation.load('me.mem')
    assert 18 < conversation.state.pos < 99999


# -- the conversation at the terminal


def converse(monkeypatch, capsys, lines, *flags):
    """Type these lines (^C: Ctrl-C), then Ctrl-D. -> what was printed: out and err"""
    typed = [KeyboardInterrupt if line == '^C' else line for line in lines.split('\n')]
    typed = itertools.chain(typed, itertools.repeat(EOFError))
    monkeypatch.setattr('builtins.input', Mock(side_effect=typed))
    assert sample.main([*MAC, '--max_new_tokens=5', '--interactive', *flags]) == 0
    return capsys.readouterr()


@pytest.fixture()
def heard(monkeypatch):
    """The texts that conversations hear."""
    texts, read = [], Conversation.read

    def record(self, idx):
        texts.append(self.tokenizer.decode(idx[0]))
        read(self, idx)
    monkeypatch.setattr(Conversation, 'read', record)
    return texts


def test_commands(here, monkeypatch, capsys):
    lines = ('/surprise\ndef f1(x):\n/memory\n/surprise\n/save\n/save a.mem\n/memory maybe\n'
             '/nothing\n/reset\n/memory off\n/load a.mem\n/memory\n/load none\n/help\n/quit\n'
             'never read')
    out, err = converse(monkeypatch, capsys, lines)
    for words in ('nothing has been read yet', 'written and read; 15 tokens so far', 'theta 0.',
                  "'d'", '/save needs a name', 'a.mem: ', ', after 15 tokens',
                  '/memory maybe: on or off', '/nothing is not one of', 'everything is',
                  'goes on after 15 tokens', 'read, not written; 15 tokens',
                  'none: no such memory file', 'Ctrl-D quits'):
        assert words in err, words
    assert out.count('\n') == 15 + 1  # the 15 lines up to /quit, and one answer
    resumed = talk()
    resumed.load('a.mem')
    assert resumed.state.pos == 15
    err = converse(monkeypatch, capsys, 'def\n/surprise', '--out_dir=gpt').err
    assert 'no long-term memory to be surprised' in err


def test_reset_removes_the_file(here, monkeypatch, capsys):
    """Also behind a link."""
    os.symlink('real.mem', 'me.mem')
    converse(monkeypatch, capsys, 'def', MEM)
    assert Path('real.mem').exists()
    err = converse(monkeypatch, capsys, '/reset\n/save', MEM).err
    assert 'and me.mem removed' in err and 'nothing to save yet' in err
    assert not Path('real.mem').exists()


def test_a_file_that_is_no_memory_is_not_replaced(here, monkeypatch, capsys):
    Path('book.txt').write_text('dear')
    lines = 'def\n/save book.txt\n/save other.mem\n/load other.mem'
    err = converse(monkeypatch, capsys, lines, MEM).err
    assert 'book.txt: not a readable memory file' in err and 'what comes is kept in me.mem' in err
    for flags in [], ['--reset_memory']:
        message = refused(sample.main, *MAC, '--memory=book.txt', '--prompt=x', *flags)
        assert 'book.txt: not a readable' in message
    message = refused(sample.main, *MAC, '--memory=mac/ckpt.pt', '--reset_memory')
    assert 'will not be made one' in message and Path('book.txt').read_text() == 'dear'


def test_memory_off_leaves_the_file(here, monkeypatch, capsys):
    """It has what was heard before /memory off, and a later /reset does not remove it."""
    converse(monkeypatch, capsys, 'def\n/memory off\nreturn\n/reset\nx', MEM)
    assert tokens_saved() == 4 + 5 - 1


def test_a_text_in_quotes_is_no_command(here, monkeypatch, capsys):
    """Nor is /q short for /quit; after /reset no token is left to /surprise."""
    err = converse(monkeypatch, capsys, '"""/reset\n"""\ndef\n/reset\n/surprise\n/q').err
    assert "lacks '/'" in err and 'everything is forgotten' in err and 'theta' not in err
    assert 'nothing has been read yet' in err and '/q is not one of' in err


def test_lines_that_cannot_be(here, monkeypatch, capsys):
    """An unknown character, a quoted text without an end, bytes that are not UTF-8, no stdin."""
    err = converse(monkeypatch, capsys, 'def\ndéf\n/surprise\n"""x', MEM).err
    assert "lacks 'é'" in err and "theta 0." in err
    assert tokens_saved() == 3 + 1 + 5 + 2 + 5 - 1
    command = [*SCRIPT, '--max_new_tokens=5', '--interactive']
    strict = os.environ | {'PYTHONIOENCODING': ':strict'}
    done = subprocess.run(command, input=b'd\xffef\ndef\n', capture_output=True, env=strict)
    assert done.returncode == 0 and done.stdout.count(b'> ') == 3
    assert b'Traceback' not in done.stderr and b'lacks' in done.stderr, done.stderr
    done = subprocess.run(['sh', '-c', f'{shlex.join(command)} <&-'], capture_output=True)
    assert done.returncode == 1 and done.stderr.count(b'\n') == 1
    assert b'no standard input' in done.stderr


def test_texts_of_several_lines_and_a_save_after_each_answer(here, monkeypatch, capsys, heard):
    positions, save = [], Conversation.save

    def record(self, path):
        positions.append(self.state.pos)
        return save(self, path)
    monkeypatch.setattr(Conversation, 'save', record)
    lines = 'def f1(x):\\\n    return x\n"""def f2(x):\n    return x\n"""\n\nx\n^C'
    converse(monkeypatch, capsys, lines, MEM)
    assert heard == ['def f1(x):\n    return x\n', 'def f2(x):\n    return x\n', 'x\n']
    # without the last token, which is still unread; and once more at the end
    assert positions == [28, 28 + 24 + 5, 57 + 2 + 5, 64]


def test_a_tokenizer_without_line_ends(here, monkeypatch, capsys, heard):
    """Lines are heard without their ends, and one note says so."""
    content = checkpoint.load('mac/ckpt.pt')
    chars = content['tokenizer']['chars'].replace('\n', '~')
    os.mkdir('flat')
    checkpoint.save('flat/ckpt.pt', content | {'tokenizer': {'kind': 'char', 'chars': chars}})
    lines = 'def\nreturn\nde\udcc3\udca9'
    err = converse(monkeypatch, capsys, lines, '--out_dir=flat', '--stop=\\n').err
    assert heard == ['def', 'return'] and err.count('this tokenizer has no line end') == 1
    assert "lacks '\u00e9'" in err
    assert 'has no line end' not in converse(monkeypatch, capsys, 'def').err


def test_interrupted_answers_go_on(here, monkeypatch, capsys):
    """Ctrl-C stops an answer, not the conversation; the tokens until then are part of it."""
    tokens = Conversation.tokens

    def interrupted(self):
        for i, token in enumerate(tokens(self)):
            if i == 2:
                raise KeyboardInterrupt
            yield token
    monkeypatch.setattr(Conversation, 'tokens', interrupted)
    err = converse(monkeypatch, capsys, 'def f1(x):\nreturn', MEM).err
    assert err.count('(stopped)') == 2
    assert tokens_saved() == 11 + 3 + 7 + 3 - 1


# -- samples


HOSTILE = 'a\x1b[2J\x9b1m\u202e\u2066\x00\x7f\tb\r\n'
CONTROLS = set('\x1b\x9b\u202e')


@pytest.mark.parametrize('flags', ['', '--num_samples=2', '--interactive'])
def test_what_a_model_says_cannot_steer_the_terminal(here, monkeypatch, capsys, flags):
    """Tabs and line ends are printed as they are, and in a file everything is."""
    def printed(terminal):
        out, typed = io.StringIO(), ['def', '/surprise', '/quit']
        out.isatty = lambda: terminal
        with monkeypatch.context() as patch:
            patch.setattr(sys, 'stdout', out)
            patch.setattr(Tokenizer, 'bytes_of', lambda self, token: HOSTILE.encode())
            patch.setattr('builtins.input', Mock(side_effect=typed))
            assert sample.main([*MAC, '--max_new_tokens=2', *flags.split()]) == 0
        return out.getvalue()
    assert HOSTILE * 2 in printed(terminal=False)
    assert not set(capsys.readouterr().err) & CONTROLS
    text = printed(terminal=True)
    assert r'a\x1b[2J\x9b1m\u202e\u2066\x00\x7f' + '\tb\\r\n' in text and not set(text) & CONTROLS


def test_what_a_file_says_cannot_steer_the_terminal(saved, monkeypatch, capsys):
    """In an error of a script, and in one within a conversation."""
    fingerprint = saved.fingerprint() | {'arch': HOSTILE}
    memory_file.save('a.mem', fingerprint, saved.state, [])
    err = converse(monkeypatch, capsys, '/load a.mem').err
    assert r"\x1b[2J\x9b1m\u202e" in err and '\x1b' not in err
    content = checkpoint.load('mac/ckpt.pt')
    checkpoint.save('bad.pt', content | {'tokenizer': {'kind': HOSTILE}})
    with pytest.raises(SystemExit):
        configurator.run(lambda argv: Reader('bad.pt', 'cpu', 'auto'))
    err = capsys.readouterr().err
    assert r"\x1b[2J\x9b1m\u202e\u2066\x00\x7f\tb\r\n" in err
    assert err.count('\n') == 1 and not set(err) & CONTROLS


@pytest.mark.parametrize('texts, stops, want', [
    (['ab', 'cd'], [], 'abcd'), (['ab', 'cd'], ['bc'], 'a'), (['ab', 'xcd'], ['bc'], 'abxcd'),
    (['a', 'b'], ['cd', 'b'], 'a'), (['aab'], ['ab'], 'a'), (['ab'], ['abc'], 'ab'),
    (['a', 'a', 'a', 'b', 'c'], ['aab'], 'a'), (['x'], ['x'], ''),
])
def test_until_stop(texts, stops, want):
    assert ''.join(until_stop(iter(texts), stops)) == want


def test_until_stop_streams():
    """Text that cannot begin a stop is passed on at once; after a stop no more is taken."""
    source = iter('abcdef')
    assert next(until_stop(source, ['cd'])) == 'a' and list(source) == list('bcdef')
    source = iter('abcdef')
    assert ''.join(until_stop(source, ['cd'])) == 'ab' and list(source) == list('ef')


def test_stop_and_batches(here, capsys):
    """One sample ends at its stop, and each sample of a batch at its own."""
    def run(*flags):
        assert sample.main([*MAC, '--prompt=def', '--max_new_tokens=60', *flags]) == 0
        return capsys.readouterr()
    full = run('--temperature=0').out
    stop = full[9:11]
    assert run('--temperature=0', f'--stop=zzz|{stop}').out == full[:full.index(stop, 3)] + '\n'
    out, err = run('--num_samples=3', '--stop=x', '--temperature=2')
    samples = [part[7:] for part in out.split('--- sample ')[1:]]
    assert len(samples) == len(set(samples)) == 3 and 'tokens/s' in err
    assert all(text.startswith('def') and 'x' not in text for text in samples)
    greedy = run('--num_samples=2', '--temperature=0').out
    assert greedy == f'--- sample 1 of 2\n{full}--- sample 2 of 2\n{full}'
