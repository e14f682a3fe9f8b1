"""A memory that stays: kept, gone on with, refused where it does not belong; and how a sample is drawn and ends."""
import copy
import io
import itertools
import os
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import processes
import pytest
import torch
from test_cli import TEXT, TINY, refused

import prepare
import sample
import train
from nanotitans import checkpoint, configurator, conversation, memory_file
from nanotitans.configurator import UserError
from nanotitans.conversation import Conversation
from nanotitans.reader import Reader, until_stop
from nanotitans.tokenizer import Tokenizer
from sample import SampleConfig

HERE = Path(__file__).resolve().parent.parent
MEM = '--memory=me.mem'


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """A folder with a small model of every kind of memory, trained for 2 steps."""
    place = tmp_path_factory.mktemp('models')
    (place / 'a.txt').write_text(TEXT)
    prepare.main(['text', f'--train_path={place}/a.txt', '--tokenizer=char', f'--data_dir={place}/data'])
    for name, *flags in (('mac',), ('other', '--seed=1'), ('longer', '--max_iters=4'), ('mag', '--arch=mag', '--window_len=5'),
                         ('mal', '--arch=mal', '--memory_depth=2'), ('lmm', '--arch=lmm'), ('gpt', '--arch=gpt')):
        assert train.main(['--dataset=text', f'--data_dir={place}/data', f'--out_dir={place}/{name}', *TINY, *flags]) == 0
    return place


@pytest.fixture()
def here(models, tmp_path, monkeypatch):
    """A fresh current directory, from which the models are at their names."""
    monkeypatch.chdir(tmp_path)
    for name in 'mac', 'other', 'longer', 'mag', 'mal', 'lmm', 'gpt':
        os.symlink(models / name, name)
    return tmp_path


def talk(*flags):
    return Conversation(configurator.load(SampleConfig, ['--out_dir=mac', '--device=cpu', '--max_new_tokens=7', *flags]))


def say(conversation, text):
    """What is answered, after the conversation has heard text."""
    torch.manual_seed(0)
    conversation.hear(conversation.reader.encode(text))
    return list(conversation.tokens())


@pytest.mark.parametrize('arch', ['mac', 'mag', 'mal', 'lmm'])
def test_a_conversation_goes_on_as_if_never_broken_off(here, arch):
    """Saved and loaded after every turn: the same answers and the same state, to the bit."""
    whole = talk(f'--out_dir={arch}')
    for text in ('def f1(x):\n', 'return', ' x + 1\ndef f2(', 'x):\n' * 9):
        part = talk(f'--out_dir={arch}')
        if os.path.exists('me.mem'):
            part.load('me.mem')
        assert say(part, text) == say(whole, text)
        part.save('me.mem')
    a, b = (checkpoint.pack_state(c.state) for c in (part, whole))
    assert memory_file.digest(a) == memory_file.digest(b) and torch.equal(part.unread, whole.unread)
    assert sorted(os.listdir()) == sorted(['gpt', 'lmm', 'longer', 'mac', 'mag', 'mal', 'me.mem', 'other'])


def test_the_file_stays_small(here):
    """Its size does not grow with what was read."""
    conversation, sizes = talk(), []
    for start in range(0, 2000, 101):  # at other places of a segment each time
        conversation.hear(conversation.reader.encode(TEXT[start:start + 101]))
        conversation.save('me.mem')
        sizes.append(os.path.getsize('me.mem'))
    assert max(sizes[10:]) <= max(sizes[:10]) < 15_000


def test_main_keeps_resets_and_leaves_the_memory(here, capsys):
    """--memory goes on, --reset_memory begins anew, --update_memory=False changes nothing, on the disk or in M."""
    def run(*flags):
        assert sample.main(['--out_dir=mac', '--device=cpu', '--max_new_tokens=3', MEM, *flags]) == 0
        return capsys.readouterr()

    def pos():
        return torch.load('me.mem', weights_only=True)['tokens']
    assert 'after 9 tokens' in run('--prompt=def f1(').err and pos() == 9  # 7 and all but the last of what was said
    run('--prompt=x')
    assert pos() == 9 + 1 + 1 + 2
    before = Path('me.mem').read_bytes()
    run('--prompt=return', '--update_memory=False')
    assert Path('me.mem').read_bytes() == before
    off = talk('--update_memory=False')
    off.load('me.mem')
    memory = off.state.blocks[0].memory.weights[0]
    say(off, 'return x')
    assert torch.equal(off.state.blocks[0].memory.weights[0], memory)
    Path('b.txt').write_text(TEXT[:100])
    out = run('--learn=b.txt')
    assert pos() == 13 + 1 + 99 and out.out == '' and 'learned 100 tokens' in out.err
    run('--reset_memory', '--prompt=x')
    assert pos() == 1 + 2


def damaged(how):
    content, data = torch.load('me.mem', weights_only=True), Path('me.mem').read_bytes()
    if how == 'cut':
        Path('me.mem').write_bytes(data[:-200])
    elif how == 'empty':
        Path('me.mem').write_bytes(b'')
    elif how == 'text':
        Path('me.mem').write_text('my memory')
    elif how == 'flipped':
        at = data.index(memory_bytes(content)) + 5
        Path('me.mem').write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
    elif how == 'a checkpoint':
        Path('me.mem').write_bytes(Path('mac/ckpt.pt').read_bytes())
    elif how == 'other format':
        torch.save(content | {'memory': 99}, 'me.mem')
    elif how == 'old format':
        torch.save(content | {'memory': 1}, 'me.mem')
    elif how == 'a tensor':
        torch.save(torch.zeros(3), 'me.mem')
    elif how == 'no model':
        torch.save({k: v for k, v in content.items() if k != 'model'}, 'me.mem')
    else:
        memory = content['state']['blocks'][0]['memory']
        if how == 'edited':
            memory['weights'] += 1e-3
        elif how == 'edited, sum too':
            memory['weights'] = memory['weights'][:, :, :3]
        elif how == 'not a number, sum too':
            memory['weights'][0, 0, 0, 0] = float('nan')
        elif how == 'unread, sum too':
            content['unread'] = [10 ** 6]
        rest = {k: v for k, v in content.items() if k != 'sha256'}
        torch.save(content | ({'sha256': memory_file.digest(rest)} if 'sum too' in how else {}), 'me.mem')


def memory_bytes(content):
    return content['state']['blocks'][0]['memory']['weights'].numpy().tobytes()


@pytest.mark.parametrize('how, words', [
    ('cut', 'not a readable memory file, truncated'), ('empty', 'not a readable memory file'), ('text', 'not a readable'),
    ('flipped', 'differs from its checksum'), ('a checkpoint', 'not a memory file, and will not be made one'),
    ('other format', 'not a memory file of this version'), ('old format', 'not a memory file of this version (3)'),
    ('a tensor', 'not a memory file'), ('no model', 'not a memory file'),
    ('edited', 'changed after it was written: its sum differs'), ('edited, sum too', 'does not fit the model'),
    ('not a number, sum too', 'does not fit the model'), ('unread, sum too', 'what is no token'),
])
def test_a_damaged_file_is_refused_and_left(here, how, words):
    conversation = talk()
    say(conversation, 'def f1(x):\n')
    conversation.save('me.mem')
    damaged(how)
    before = Path('me.mem').read_bytes()
    message = refused(sample.main, '--out_dir=mac', '--device=cpu', MEM, '--prompt=x')
    assert words in message and 'me.mem' in message, message
    assert Path('me.mem').read_bytes() == before


@pytest.mark.parametrize('name, words', [('other', 'other weights'), ('longer', 'step=2 there, 4 here'),
                                         ('mag', 'arch=mac there, mag here'), ('mal', 'memory_depth=1 there, 2 here'),
                                         ('gpt', 'no long-term memory that could be kept')])
def test_another_model_is_refused(here, name, words):
    conversation = talk()
    say(conversation, 'def f1(x):\n')
    conversation.save('me.mem')
    before = Path('me.mem').read_bytes()
    assert words in refused(sample.main, f'--out_dir={name}', '--device=cpu', MEM, '--prompt=x')
    assert Path('me.mem').read_bytes() == before


@pytest.mark.parametrize('flags, words', [
    ('--memory=no/me.mem', 'cannot write into'), ('--memory=mac', 'that is a folder'), ('--memory=new/', 'that is a folder'),
    ('--memory=none.mem --update_memory=False', 'none.mem: no such memory file'),
    ('--reset_memory', 'needs the file: --memory=FILE'), ('--learn=b.txt', 'would be lost'),
    ('--memory=me.mem --learn=none.txt', 'none.txt: No such file'), ('--memory=me.mem --learn=mac', 'mac: Is a directory'),
    ('--memory=me.mem --learn=latin', 'not UTF-8 text (byte 2)'), ('--memory=me.mem --learn=zero', 'binary (a zero byte at 3)'),
    ('--memory=me.mem --learn=nothing', 'is empty'), ('--memory=me.mem --learn=emoji', "lacks 'é'"),
    ('--memory=me.mem --learn=b.txt --update_memory=False', 'learns nothing'),
    ('--memory=me.mem --num_samples=2', 'num_samples=2'), ('--seed=-1', 'seed=-1'),
    ('--interactive --prompt=x', 'prompt is not for'), ('--interactive --learn=-', 'takes the standard input'),
])
def test_what_cannot_be_is_one_line(here, flags, words):
    for name, data in ('latin', b'ab\xff'), ('zero', b'abc\0'), ('nothing', b''), ('emoji', 'dé'.encode()):
        Path(name).write_bytes(data)
    assert words in refused(sample.main, '--out_dir=mac', '--device=cpu', *flags.split())
    assert not Path('me.mem').exists()


def test_a_write_that_fails_leaves_the_old_file(here, monkeypatch):
    conversation = talk()
    say(conversation, 'def f1(x):\n')
    conversation.save('me.mem')
    before = Path('me.mem').read_bytes()

    def full(*_):
        raise OSError(28, 'No space left on device')
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', full)
        with pytest.raises(UserError, match='cannot save me.mem: No space left on device; the one before it is untouched'):
            conversation.save('me.mem')
    conversation.state.blocks[0].memory.weights[0].fill_(float('nan'))
    with pytest.raises(UserError, match='me.mem is left as it was: .* not finite'):
        conversation.save('me.mem')
    assert Path('me.mem').read_bytes() == before and not list(Path().glob('*.partial'))


def test_a_memory_is_private_and_stays_in_its_place(here, monkeypatch):
    """Nobody else can read a new file, nor the unfinished one; what the user has made of it since stays: permissions, links."""
    modes, save = [], torch.save
    monkeypatch.setattr(torch, 'save', lambda content, f: modes.append(os.stat(f.name).st_mode & 0o777) or save(content, f))
    os.mkdir('elsewhere')
    os.symlink('elsewhere/real.mem', 'me.mem')
    conversation = talk()
    say(conversation, 'def f1(x):\n')
    before = os.umask(0o022)
    try:
        for mode in 0o600, 0o640, 0o666:
            conversation.save('me.mem')
            modes.append(os.stat('elsewhere/real.mem').st_mode & 0o777)
            assert modes == [mode, mode]
            os.chmod('elsewhere/real.mem', {0o600: 0o640}.get(mode, 0o666))
            modes.clear()
    finally:
        os.umask(before)
    assert os.readlink('me.mem') == 'elsewhere/real.mem' and os.listdir('elsewhere') == ['real.mem']


def test_what_was_typed_is_private(tmp_path, monkeypatch):
    pytest.importorskip('readline')
    monkeypatch.setattr(conversation, 'HISTORY', str(tmp_path / 'history'))
    monkeypatch.setattr(sys, 'stdin', types.SimpleNamespace(isatty=lambda: True))
    (tmp_path / 'history').write_text('')
    for _ in range(2):
        (tmp_path / 'history').chmod(0o644)
        with conversation.history():
            pass
        assert (tmp_path / 'history').stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize('name', ['me.mem', 'link.mem'])
def test_one_conversation_a_memory(here, monkeypatch, capsys, name):
    """Whether the file is there yet or not, and under any name; to read it alone is free; nothing is left behind."""
    argv, there = ['--out_dir=mac', '--device=cpu', '--max_new_tokens=3', '--prompt=x'], os.listdir()
    os.symlink('me.mem', 'link.mem')
    for _ in range(2):
        with memory_file.lock('me.mem'):
            assert f'{name}: another conversation keeps its memory' in refused(sample.main, *argv, f'--memory={name}')
            said = converse(monkeypatch, capsys, f'def\n/save {name}', '--memory=other.mem')
            assert f'{name}: another conversation keeps its memory' in said.err
            if Path('me.mem').exists():
                assert sample.main([*argv, f'--memory={name}', '--update_memory=False']) == 0
        assert sample.main([*argv, f'--memory={name}']) == 0
    said = converse(monkeypatch, capsys, f'def\n/save {name}\n/save a.mem\n/save a.mem', f'--memory={name}')
    assert 'another conversation' not in said.err
    assert sorted(os.listdir()) == sorted([*there, 'me.mem', 'link.mem', 'other.mem', 'a.mem'])


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


@pytest.mark.parametrize('name, words', [('other', 'other weights'), ('mag', 'arch=mac there, mag here')])
def test_another_models_memory_is_not_replaced(here, monkeypatch, capsys, name, words):
    conversation = talk()
    say(conversation, 'def f1(x):\n')
    conversation.save('me.mem')
    before = Path('me.mem').read_bytes()
    message = refused(sample.main, f'--out_dir={name}', '--device=cpu', MEM, '--reset_memory', '--prompt=x')
    said = converse(monkeypatch, capsys, 'def\n/save me.mem', f'--out_dir={name}').err
    for line in message, said:
        assert words in line and 'remove it, or give another name' in line
    assert Path('me.mem').read_bytes() == before


def test_a_forgotten_memory_is_gone_from_behind_a_link(here, monkeypatch, capsys):
    os.symlink('real.mem', 'me.mem')
    converse(monkeypatch, capsys, 'def', MEM)
    assert Path('real.mem').exists()
    converse(monkeypatch, capsys, '/reset', MEM)
    assert not Path('real.mem').exists()


@pytest.mark.parametrize('a, b', [
    ([1, 23], [12, 3]), (['ab', 'c'], ['a', 'bc']), ({1: 2}, [(1, 2)]), (1, '1'), (1, True), (1, 1.0), (None, 'None'),
    ([[1], 2], [[1, 2]]), ([[], []], [[[]]]), ({'a': {'b': 1}}, {'a': 1, 'b': {}}), ((1,), [1]), (0.0, -0.0), ('', []),
    ('\U0001f600', '\ud83d\ude00'), (['1', 1], [1, '1']), ('int 1:1', 1), (torch.zeros(2, 3), torch.zeros(3, 2)),
    ([torch.zeros(2), torch.zeros(1)], [torch.zeros(1), torch.zeros(2)]), (torch.zeros(1), torch.zeros(1, dtype=torch.int32)),
    (torch.zeros(1, dtype=torch.uint8), '\0'), (torch.zeros(0), []),
], ids=repr)
def test_no_two_contents_have_one_sum(a, b):
    assert memory_file.digest(a) != memory_file.digest(b) and memory_file.digest([a, b]) != memory_file.digest([b, a])
    assert memory_file.digest([a]) == memory_file.digest([copy.deepcopy(a)])


def test_an_interrupted_answer_is_remembered(here):
    """Broken off after 3 tokens of an answer: the state is that of all that was heard and said."""
    conversation = talk('--temperature=0')
    conversation.hear(conversation.reader.encode('def f1(x):\n'))
    said = list(itertools.islice(conversation.tokens(), 3))
    heard = torch.cat((conversation.reader.encode('def f1(x):\n'), torch.tensor([said])), dim=1)
    want = conversation.reader.read(heard[:, :-1])
    assert conversation.state.pos == want.pos == heard.size(1) - 1 and conversation.unread.tolist() == [[said[-1]]]
    for a, b in zip(conversation.state.blocks[0].memory.weights, want.blocks[0].memory.weights, strict=True):
        torch.testing.assert_close(a, b)


def test_an_interrupted_reading_is_remembered(here, monkeypatch):
    """Broken off in the middle of a long text: what was read by then can be loaded, and nothing of the rest comes after it."""
    conversation, read = talk(), Reader.read
    heard = conversation.reader.encode(TEXT[:100])
    pieces = iter(range(3))

    def twice(*args):
        if next(pieces) == 2:
            raise KeyboardInterrupt
        return read(*args)
    with monkeypatch.context() as patch:
        patch.setattr(Reader, 'read', twice)
        with pytest.raises(KeyboardInterrupt):
            conversation.hear(heard)
    block = conversation.model.config.block_size
    assert conversation.state.pos == 2 * block and conversation.unread.tolist() == heard[:, 2 * block:2 * block + 1].tolist()
    conversation.save('me.mem')
    again = talk()
    again.load('me.mem')
    assert say(again, 'return') == say(conversation, 'return') and again.state.pos == 2 * block + 1 + 6 + 7 - 1


def test_signals_that_come_together(here):
    """The second does not break off the saving that the first asks for; one that is to be ignored, as by nohup, is."""
    command = [sys.executable, str(HERE / 'sample.py'), '--out_dir=mac', '--device=cpu', MEM, '--prompt=def']
    process = subprocess.Popen([*command, '--max_new_tokens=99999'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.stdout.read(20)
    process.send_signal(signal.SIGHUP)
    assert len(process.stdout.read(20)) == 20
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    conversation = talk()
    conversation.load('me.mem')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves(here, number):
    """In the middle of a long answer: the memory of all until then is there, and can be loaded."""
    command = [sys.executable, str(HERE / 'sample.py'), '--out_dir=mac', '--device=cpu', MEM, '--prompt=def']
    process = subprocess.Popen([*command, '--max_new_tokens=99999'], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=processes.hear_signals)
    process.stdout.read(20)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and b'Traceback' not in err, err
    conversation = talk()
    conversation.load('me.mem')
    assert 18 < conversation.state.pos < 99999


# -- the conversation at the terminal


def converse(monkeypatch, capsys, lines, *flags):
    """What is printed, and what is noted, when these lines are typed."""
    typed = iter(lines.split('\n'))

    def ask(prompt):
        line = next(typed, None)
        if line is None:
            raise EOFError
        if line == '^C':
            raise KeyboardInterrupt
        return line
    monkeypatch.setattr('builtins.input', ask)
    assert sample.main(['--out_dir=mac', '--device=cpu', '--max_new_tokens=5', '--interactive', *flags]) == 0
    return capsys.readouterr()


def test_commands(here, monkeypatch, capsys):
    said = converse(monkeypatch, capsys, '/surprise\ndef f1(x):\n/memory\n/surprise\n/save\n/save a.mem\n/memory maybe\n'
                    '/nothing\n/reset\n/memory off\n/load a.mem\n/memory\n/load none\n/help\n/quit\nnever read')
    notes = said.err
    for words in ('nothing has been read yet', 'written and read; 15 tokens so far', "theta 0.", "'d'", '/save needs a name',
                  'a.mem: ', ', after 15 tokens', '/memory maybe: on or off', '/nothing is not one of', 'everything is',
                  'goes on after 15 tokens', 'read, not written; 15 tokens', 'none: no such memory file', 'Ctrl-D quits'):
        assert words in notes, words
    assert said.out.count('\n') == 15 + 1  # one answer among what was typed
    again = talk()
    again.load('a.mem')
    assert again.state.pos == 15
    assert 'no long-term memory to be surprised' in converse(monkeypatch, capsys, 'def\n/surprise', '--out_dir=gpt').err


def test_what_is_forgotten_is_gone(here, monkeypatch, capsys):
    """/reset takes the file away; a file that is no memory is never written over; another's name is said."""
    converse(monkeypatch, capsys, 'def', MEM)
    assert Path('me.mem').exists()
    said = converse(monkeypatch, capsys, '/reset\n/save', MEM)
    assert 'and me.mem removed' in said.err and 'nothing to save yet' in said.err and not Path('me.mem').exists()
    Path('book.txt').write_text('dear')
    said = converse(monkeypatch, capsys, 'def\n/save book.txt\n/save other.mem\n/load other.mem', MEM)
    assert 'book.txt: not a readable memory file' in said.err and 'what comes is kept in me.mem' in said.err
    for flags in (), ('--reset_memory',):
        assert 'book.txt: not a readable' in refused(sample.main, '--out_dir=mac', '--memory=book.txt', '--prompt=x', *flags)
    assert 'will not be made one' in refused(sample.main, '--out_dir=mac', '--memory=mac/ckpt.pt', '--reset_memory')
    assert Path('book.txt').read_text() == 'dear'


def test_memory_off_leaves_the_file(here, monkeypatch, capsys):
    """What was heard before is saved, what comes after is not, nor does /reset then take it away."""
    converse(monkeypatch, capsys, 'def\n/memory off\nreturn\n/reset\nx', MEM)
    assert torch.load('me.mem', weights_only=True)['tokens'] == 4 + 5 - 1


def test_quotes_and_traces(here, monkeypatch, capsys):
    """A text in quotes is no command, whatever it begins with; what was forgotten surprises nobody."""
    said = converse(monkeypatch, capsys, '"""/reset\n"""\ndef\n/reset\n/surprise\n/q')
    assert "lacks '/'" in said.err and 'everything is forgotten' in said.err and 'nothing has been read yet' in said.err
    assert 'theta' not in said.err and '/q is not one of' in said.err


def test_lines_that_cannot_be(here, monkeypatch, capsys):
    """A character the tokenizer lacks, before /surprise; a text that ends before its quotes; bytes that are no text."""
    said = converse(monkeypatch, capsys, 'def\ndéf\n/surprise\n"""x', MEM)
    assert "lacks 'é'" in said.err and "theta 0." in said.err
    assert torch.load('me.mem', weights_only=True)['tokens'] == 3 + 1 + 5 + 2 + 5 - 1
    command = [sys.executable, str(HERE / 'sample.py'), '--out_dir=mac', '--device=cpu', '--max_new_tokens=5', '--interactive']
    strict = os.environ | {'PYTHONIOENCODING': ':strict'}
    done = subprocess.run(command, input=b'd\xffef\ndef\n', capture_output=True, env=strict)
    assert done.returncode == 0 and b'Traceback' not in done.stderr and b'lacks' in done.stderr, done.stderr
    done = subprocess.run(['sh', '-c', f'{shlex.join(command)} <&-'], capture_output=True)
    assert done.returncode == 1 and done.stderr.count(b'\n') == 1 and b'no standard input' in done.stderr


def test_lines_of_several_and_answers_kept(here, monkeypatch, capsys):
    """What is heard is what was typed, line ends and all; after each answer the memory is on the disk."""
    heard, saved, hear, save = [], [], Conversation.hear, Conversation.save
    monkeypatch.setattr(Conversation, 'hear', lambda self, idx: heard.append(self.tokenizer.decode(idx[0])) or hear(self, idx))
    monkeypatch.setattr(Conversation, 'save', lambda self, path: saved.append(self.state.pos) or save(self, path))
    converse(monkeypatch, capsys, 'def f1(x):\\\n    return x\n"""def f2(x):\n    return x\n"""\n\nx\n^C', MEM)
    assert heard == ['def f1(x):\n    return x\n', 'def f2(x):\n    return x\n', 'x\n']
    assert saved == [28, 28 + 24 + 5, 57 + 2 + 5, 64]  # each but for the token said last, and once more at the end


def test_a_tokenizer_without_line_ends(here, monkeypatch, capsys):
    """A line is heard without its end, and this is said once."""
    content = checkpoint.load('mac/ckpt.pt')
    chars = content['tokenizer']['chars'].replace('\n', '~')
    os.mkdir('flat')
    checkpoint.save('flat/ckpt.pt', content | {'tokenizer': {'kind': 'char', 'chars': chars}})
    heard, hear = [], Conversation.hear
    monkeypatch.setattr(Conversation, 'hear', lambda self, idx: heard.append(self.tokenizer.decode(idx[0])) or hear(self, idx))
    said = converse(monkeypatch, capsys, 'def\nreturn\nde\udcc3\udca9', '--out_dir=flat', '--stop=\\n')
    assert heard == ['def', 'return'] and said.err.count('this tokenizer has no line end') == 1
    assert "lacks '\u00e9'" in said.err
    assert 'has no line end' not in converse(monkeypatch, capsys, 'def').err


def test_interrupted_answers_go_on(here, monkeypatch, capsys):
    """Ctrl-C in an answer stops it, keeps what was said, and the conversation goes on."""
    tokens = Conversation.tokens

    def broken(self):
        for i, token in enumerate(tokens(self)):
            if i == 2:
                raise KeyboardInterrupt
            yield token
    monkeypatch.setattr(Conversation, 'tokens', broken)
    said = converse(monkeypatch, capsys, 'def f1(x):\nreturn', MEM)
    assert said.err.count('(stopped)') == 2
    assert torch.load('me.mem', weights_only=True)['tokens'] == 11 + 3 + 7 + 3 - 1


# -- samples


HOSTILE = 'a\x1b[2J\x9b1m\u202e\u2066\x00\x7f\tb\r\n'


@pytest.mark.parametrize('flags', ['', '--num_samples=2', '--interactive'])
def test_what_a_model_says_cannot_steer_the_terminal(here, monkeypatch, capsys, flags):
    """Shown on a terminal, tabs and new lines as they are; in a file all to the letter. /surprise shows all of it."""
    def said(terminal):
        out, lines = io.StringIO(), iter(['def', '/surprise', '/quit'])
        out.isatty = lambda: terminal
        with monkeypatch.context() as patch:
            patch.setattr(sys, 'stdout', out)
            patch.setattr(Tokenizer, 'bytes_of', lambda self, token: HOSTILE.encode())
            patch.setattr('builtins.input', lambda prompt: next(lines))
            assert sample.main(['--out_dir=mac', '--device=cpu', '--max_new_tokens=2', *flags.split()]) == 0
        return out.getvalue()
    assert HOSTILE * 2 in said(False) and not set(capsys.readouterr().err) & set('\x1b\x9b\u202e')
    assert r'a\x1b[2J\x9b1m\u202e\u2066\x00\x7f' + '\tb\\r\n' in said(True) and not set(said(True)) & set('\x1b\x9b\u202e')


def test_what_a_file_says_cannot_steer_the_terminal(here, monkeypatch, capsys):
    """In an error of a script, and in one within a conversation."""
    content = checkpoint.load('mac/ckpt.pt')
    conversation = talk()
    say(conversation, 'def')
    memory_file.save('a.mem', conversation.fingerprint() | {'arch': HOSTILE}, conversation.state, [])
    checkpoint.save('bad.pt', content | {'tokenizer': {'kind': HOSTILE}})
    assert r"\x1b[2J\x9b1m\u202e" in (err := converse(monkeypatch, capsys, '/load a.mem').err) and '\x1b' not in err
    with pytest.raises(SystemExit):
        configurator.run(lambda argv: Reader('bad.pt', 'cpu', 'auto'))
    err = capsys.readouterr().err
    assert r"\x1b[2J\x9b1m\u202e\u2066\x00\x7f\tb\r\n" in err and err.count('\n') == 1 and not set(err) & set('\x1b\x9b\u202e')


@pytest.mark.parametrize('texts, stops, want', [
    (['ab', 'cd'], [], 'abcd'), (['ab', 'cd'], ['bc'], 'a'), (['ab', 'xcd'], ['bc'], 'abxcd'), (['a', 'b'], ['cd', 'b'], 'a'),
    (['aab'], ['ab'], 'a'), (['a', 'a', 'a', 'b', 'c'], ['aab'], 'a'), (['ab'], ['abc'], 'ab'), (['x'], ['x'], ''),
])
def test_until(texts, stops, want):
    assert ''.join(until_stop(iter(texts), stops)) == want


def test_until_streams():
    """Text that cannot be part of a stop is passed on at once, and nothing is asked for after one."""
    asked = []
    stream = until_stop((asked.append(t) or t for t in 'abcdef'), ['cd'])
    assert next(stream) == 'a' and asked == ['a']
    assert ''.join(stream) == 'b' and asked == list('abcd')


def test_stop_and_batches(here, capsys):
    """Samples of a batch end where each meets a stop; one sample is the continuation up to there."""
    def run(*flags):
        assert sample.main(['--out_dir=mac', '--device=cpu', '--prompt=def', '--max_new_tokens=60', *flags]) == 0
        return capsys.readouterr()
    whole = run('--temperature=0').out
    end = whole[9:11]
    assert run('--temperature=0', f'--stop=zzz|{end}').out == whole[:whole.index(end, 3)] + '\n'
    many = run('--num_samples=3', '--stop=x', '--temperature=2')
    parts = many.out.split('--- sample ')[1:]
    assert len(parts) == 3 and all(part[7:].startswith('def') and 'x' not in part for part in parts)
    assert len({part[7:] for part in parts}) == 3 and 'tokens/s' in many.err
    greedy = run('--num_samples=2', '--temperature=0').out
    assert greedy == f'--- sample 1 of 2\n{whole}--- sample 2 of 2\n{whole}'
