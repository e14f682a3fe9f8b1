"""What a user types, and what comes back: one clear line for every mistake, and nothing half-written."""
import dataclasses
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import bench
import eval_learning
import eval_needle
import eval_recall
import eval_talk
import plot
import prepare
import sample
import train
from model import BLOCKS, TitansConfig
from nanotitans import checkpoint, configurator
from nanotitans.configurator import UserError
from nanotitans.dataset import NAMES, Dataset
from nanotitans.device import pick_device
from nanotitans.figures import run_names, save_figure
from nanotitans.files import read_text
from nanotitans.tokenizer import Tokenizer
from tasks.needle import held_out, reference

HERE = Path(__file__).resolve().parent.parent
TEXT = ''.join(f"def f{i % 7}(x):\n    return x + {i % 13}\n" for i in range(300))
TINY = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--memory_heads=2', '--block_size=16', '--segment_len=8',
        '--batch_size=2', '--max_iters=2', '--eval_interval=2', '--eval_iters=1', '--device=cpu']


@pytest.fixture()
def place(tmp_path, monkeypatch):
    """A folder with a prepared data set 'text' (characters) and nothing else, as the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.txt').write_text(TEXT)
    prepare.main(['text', '--train_path=a.txt', '--tokenizer=char'])
    return tmp_path


@pytest.fixture()
def trained(place):
    assert train.main(['--dataset=text', *TINY]) == 0
    return place


def refused(main, *argv):
    with pytest.raises(UserError) as error:
        main(list(argv))
    assert '\n' not in str(error.value)
    return str(error.value)


# -- configuration


@pytest.mark.parametrize('flag, words', [
    ('--learning_rat=1', ("unknown option 'learning_rat'", "did you mean 'learning_rate'?")),
    ('--zzz=1', ("unknown option 'zzz'", '--help')),
    ('--n_layer=six', ('n_layer must be a value of type int', "'six'")),
    ('--compile=maybe', ('compile must be True or False',)),
    ('--arch=rnn', ('arch must be one of', "'mac'")),
    ('--n_embd', ('needs a value', '--n_embd=VALUE')),
    ('--carry_state --block_size=100', ('block_size=100', 'of 128, where mac can begin', 'block_size=128 is')),
    ('--arch=mag --window_len=0', ('window_len=0', 'at least 1')),
    ('--segment_len=0', ('segment_len=0', 'at least 1')),
    ('--batch_size=0', ('batch_size=0',)),
    ('--learning_rate=nan', ('learning_rate', 'float')),
    ('--beta1=2', ('beta1=2.0',)),
    ('--device=cpu:x', ("device='cpu:x'",)),
    ('--reset_prob=2', ('reset_prob=2.0',)),
    ('config/no_such.py', ('config/no_such.py: no such config file',)),
    ('--seed=9223372036854775808', ('seed must be between -9223372036854775807 and',)),
    (f"--n_layer={'9' * 400}", ('n_layer must be between',)),
    ('--learning_rate=1e300', ('learning_rate', 'float', '1e+300')),
])
def test_a_wrong_flag_gets_one_line(flag, words):
    message = refused(train.main, *flag.split())
    assert all(word in message for word in words), message


@pytest.mark.parametrize('source, words', [
    ('learning_rat = 1', ("unknown option 'learning_rat'", "did you mean 'learning_rate'?")),
    ('n_layer = "six"', ('n_layer must be a value of type int', "'six'")),
    ('compile = 1', ('compile must be a value of type bool',)),
    ('n_layer = 1 +', ('line 1', 'SyntaxError')),
    ('\nn_layer = 1 / 0', ('line 2', 'ZeroDivisionError')),
    ('seed = 10 ** 5000', ('seed must be between',)),
    ('learning_rate = 10 ** 400', ('learning_rate must be between',)),
    ('learning_rate = float("nan")', ('learning_rate', 'nan')),
])
def test_a_wrong_config_file_gets_one_line(tmp_path, source, words):
    path = tmp_path / 'c.py'
    path.write_text(source)
    message = refused(train.main, str(path))
    assert str(path) in message and all(word in message for word in words), message


def test_precedence_and_types(tmp_path):
    path = tmp_path / 'c.py'
    path.write_text("n_layer = 3\nlearning_rate = 1\n_hidden = 'no option'\nout_dir = 'a=b'\n")
    config = configurator.load(train.TrainConfig, ['--n_layer=4', str(path), '--wandb_run_name=x=y', '--compile'])
    assert (config.n_layer, config.learning_rate, config.out_dir) == (4, 1.0, 'a=b')
    assert (config.wandb_run_name, config.compile, config.n_head) == ('x=y', True, train.TrainConfig.n_head)


@pytest.mark.parametrize('path', sorted((HERE / 'config').glob('*.py')), ids=lambda p: p.name)
def test_every_config_can_be_switched_to_every_arch(path):
    for arch in BLOCKS:
        config = configurator.load(train.TrainConfig, [str(path), f'--arch={arch}'])
        assert not config.drop_unused() and set(config.ignored) <= config.unused()
        TitansConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(TitansConfig)})


def test_what_the_arch_does_not_use_is_said_once(place, capsys):
    flags = ['--dataset=text', *TINY, '--arch=gpt', '--write_cost=1', '--carry_state', '--tbptt=8', '--memory_heads=3',
             '--memory_depth=-1']
    assert train.main(flags) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if 'not used by gpt' in line]
    assert len(said) == 1 and set(said[0].split('gpt')[1].strip().split(', ')) == {
        'write_cost', 'carry_state', 'tbptt', 'memory_heads', 'segment_len', 'memory_depth'}
    assert train.main(['--dataset=text', *TINY, '--arch=mac', '--max_iters=0']) == 0
    assert 'not used' not in capsys.readouterr().out


def test_print_config_and_help_exit_zero(capsys):
    for flag, words in ('--print_config', "arch = 'mac'"), ('--help', '--learning_rate='):
        with pytest.raises(SystemExit) as end:
            train.main([flag])
        assert not end.value.code and words in capsys.readouterr().out


@pytest.mark.parametrize('seed', ['-1', '18446744073709551616'])
@pytest.mark.parametrize('config', [train.TrainConfig, sample.SampleConfig, eval_talk.TalkConfig, eval_learning.LearningConfig,
                                    eval_recall.RecallConfig], ids=lambda c: c.__name__)
def test_a_seed_is_one_that_every_generator_takes(config, seed):
    assert 'seed' in refused(lambda argv: configurator.load(config, argv), f'--seed={seed}')


@pytest.mark.parametrize('config, flag, words', [
    (bench.BenchConfig, '--gpus=0', 'gpus=0 must be at least 1'),
    (bench.BenchConfig, '--gpu_flops=0', 'gpu_flops=0.0 must be above 0'),
    (bench.BenchConfig, '--threads=100000', 'threads=100000 must be in [0, 1024]'),
    (bench.BenchConfig, '--sizes=1x99999999999999999999', 'sizes=1x99999999999999999999 must be rows x tokens'),
    (eval_talk.TalkConfig, '--gaps=99999999999999999999', "gaps='99999999999999999999' must be at least 0 and at most"),
    (eval_needle.NeedleConfig, '--lengths=99999999999999999999', 'must be at least 1 and at most 1099511627776'),
])
def test_numbers_that_no_machine_can_do(config, flag, words):
    assert words in refused(lambda argv: configurator.load(config, argv), flag)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    assert pick_device('cuda') == 'cuda' and pick_device('cuda:0') == 'cuda:0'
    assert "device='cuda:1' is not there" in refused(lambda argv: pick_device(*argv), 'cuda:1')


def test_a_text_that_is_shorter_than_asked_for_is_read(place):
    """However much is asked for: no memory is taken for what is not there."""
    assert read_text('a.txt', most=2 ** 62) == TEXT


# -- what comes out


def outcome(monkeypatch, main, *argv):
    """What configurator.run makes of main at a terminal that knows ASCII alone. -> exit status, what is printed"""
    streams = [io.TextIOWrapper(io.BytesIO(), 'ascii', errors='strict', write_through=True) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, 'stdout', streams[0])
        patch.setattr(sys, 'stderr', streams[1])
        patch.setattr(sys, 'argv', ['script.py', *argv])
        with pytest.raises(SystemExit) as end:
            configurator.run(main)
    return end.value.code, *(stream.buffer.getvalue().decode() for stream in streams)


def test_what_a_terminal_does_not_know_comes_out_escaped(place, monkeypatch):
    """Text, and the bytes of a file's name that are no text."""
    assert outcome(monkeypatch, lambda argv: print('d\u00e9 \udcff')) == (None, 'd\\xe9 \\udcff\n', '')
    os.rename('a.txt', b'\xff.txt')
    status, out, _ = outcome(monkeypatch, prepare.main, 'text', '--train_path=\udcff.txt', '--data_dir=\udcff')
    assert status is None and out.startswith('\\udcff/text: ')
    status, _, err = outcome(monkeypatch, prepare.main, 'text', '--train_path=FILE:\udcff')
    assert (status, err) == (1, 'script.py: FILE:\\udcff: No such file or directory\n')


def test_what_was_typed_is_utf8_whatever_the_locale():
    """A locale of ASCII leaves the bytes of a character as surrogates; what is no character keeps its byte."""
    assert sample.read_prompt('d\udcc3\udca9\udcff') == 'd\u00e9\udcff'
    assert sample.SampleConfig(stop='\udcc3\udca9|\u00e9').stops() == ['\u00e9', '\u00e9']
    assert Tokenizer({'kind': 'byte'}).encode(sample.read_prompt('d\udcc3\udca9\udcff')) == [*'d\u00e9'.encode(), 255]
    assert 'prompt is not text' in refused(lambda argv: sample.read_prompt(*argv), '\ud800')


@pytest.mark.parametrize('error', [MemoryError(), RuntimeError('CUDA out of memory. Tried to allocate 2 GiB.\nMore'),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), OverflowError('too large')])
def test_too_little_memory_is_one_line(monkeypatch, error):
    def fail(argv):
        raise error
    status, out, err = outcome(monkeypatch, fail)
    assert (status, out) == (1, '') and err.startswith('script.py: not enough memory') and err.count('\n') == 1


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    def fail(argv):
        raise RuntimeError('a shape is wrong')
    with pytest.raises(RuntimeError):
        outcome(monkeypatch, fail)


def test_a_picture_can_name_what_is_no_text(tmp_path):
    plt = pytest.importorskip('matplotlib.pyplot')
    figure, axes = plt.subplots()
    axes.plot([0, 1], label='run \udcff')
    axes.legend()
    save_figure(figure, str(tmp_path / 'a.png'))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ['run ?']


def test_a_script_prints_the_line_and_fails():
    for script in ('train.py', 'prepare.py'):
        done = subprocess.run([sys.executable, script, '--learning_rat=1'], cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count('\n') == 1 and done.stderr.startswith(f"{script}: ")
        assert 'Traceback' not in done.stderr


# -- data


def test_prepare_text_and_decode(place):
    data = Dataset('data', 'text')
    tokenizer = Tokenizer(data.tokenizer)
    cut = int(len(TEXT) * 0.9)
    assert data.tokens == {'train': cut, 'val': len(TEXT) - cut}
    assert tokenizer.decode(data.read('train', [0], cut)[0]) == TEXT[:cut]
    assert sorted(os.listdir('data')) == ['text'] and sorted(os.listdir('data/text')) == ['meta.json', 'train.bin', 'val.bin']


def test_prepare_stdlib_does_not_leak(tmp_path, capsys):
    """
    Twice the same. Of the validation bytes in lines of 30 or more, less than 2% stand in the training text, and in no module
    more than half; the language reference, whose last tenth is held out elsewhere, is not in it.
    """
    for name in ('one', 'two'):
        prepare.main(['stdlib', f'--data_dir={tmp_path / name}'])
    one, two = (Dataset(str(tmp_path / name), 'stdlib') for name in ('one', 'two'))
    assert one.meta == two.meta and one.meta['about'] == {'python': platform.python_version()}
    assert f'validation tokens, vocabulary 256; python {platform.python_version()}' in capsys.readouterr().out
    assert sum(one.tokens.values()) > 7e6 and 0.05 < one.tokens['val'] / sum(one.tokens.values()) < 0.25
    text = {split: one.flat(split, 0, n).astype('uint8').tobytes() for split, n in one.tokens.items()}

    def long_lines(text):
        return [line.strip() for line in text.splitlines() if len(line.strip()) >= 30]
    known = set(long_lines(text['train']))
    modules = [long_lines(module) for module in text['val'].split(b'\0')]
    copied = [sum(len(line) for line in module if line in known) for module in modules]
    sizes = [sum(map(len, module)) for module in modules]
    assert sum(copied) < 0.02 * sum(sizes) and all(c <= 0.5 * size for c, size in zip(copied, sizes, strict=True))
    hidden = held_out(reference())[1].encode()
    assert not [line for line in known if len(line) >= 40 and line in hidden]


def test_prepare_stdlib_from_another_folder(tmp_path):
    """What only looks like a module is passed over; every package is in one split; one package alone cannot be split."""
    for i in range(20):
        folder = tmp_path / 'src' / f'config-{i}'
        folder.mkdir(parents=True)
        for j in range(2):
            (folder / f'm{j}.py').write_text(f'# package {i:02}\n' + f'x{i} = {j}\n' * 50)
    (tmp_path / 'src' / 'dir.py').mkdir()
    (tmp_path / 'src' / 'gone.py').symlink_to('nowhere.py')
    (tmp_path / 'src' / os.fsdecode(b'na\xefve.py')).write_text('# package 20\n' + 'y = 1\n' * 100)
    prepare.main(['stdlib', f'--source={tmp_path}/src', f'--data_dir={tmp_path}/data'])
    data = Dataset(str(tmp_path / 'data'), 'stdlib')
    packages = {split: {m[:12] for m in data.flat(split, 0, n).astype('uint8').tobytes().split(b'\0') if m}
                for split, n in data.tokens.items()}
    assert len(packages['train']) + len(packages['val']) == 21 and not packages['train'] & packages['val']
    assert sum(data.documents['train']) + sum(data.documents['val']) == 41
    shutil.rmtree(tmp_path / 'src')
    (tmp_path / 'src').mkdir()
    (tmp_path / 'src' / 'm.py').write_text('x = 1\n' * 50)
    assert 'a single module or package' in refused(prepare.main, 'stdlib', f'--source={tmp_path}/src', f'--data_dir={tmp_path}')


needs_gpt2 = pytest.mark.skipif('TIKTOKEN_CACHE_DIR' not in os.environ, reason='no TIKTOKEN_CACHE_DIR with the GPT-2 files')


@needs_gpt2
def test_prepare_openwebtext(place, monkeypatch):
    """The library's stream, faked: every document in order, ended by <|endoftext|>, the first in 2,000 for validation."""
    texts = [f'document {i}' for i in range(20)]
    fake = types.ModuleType('datasets')
    fake.load_dataset = lambda name, split, streaming: [{'text': text} for text in texts]
    monkeypatch.setitem(sys.modules, 'datasets', fake)
    prepare.main(['openwebtext', '--num_proc=1'])
    data = Dataset('data', 'openwebtext')
    got = Tokenizer(data.tokenizer).decode(data.read('train', [0], data.tokens['train'])[0])
    assert got == ''.join(f'{text}<|endoftext|>' for text in texts[1:])


@needs_gpt2
def test_prepare_gpt2_text(place):
    prepare.main(['text', '--train_path=a.txt', '--val_path=a.txt', '--tokenizer=gpt2'])
    data = Dataset('data', 'text')
    assert data.vocab_size == 50257 and data.dtype == 'uint16'
    assert Tokenizer(data.tokenizer).decode(data.read('val', [0], data.tokens['val'])[0]) == TEXT


def test_a_tokenizer_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    assert 'the gpt2 tokenizer needs tiktoken: pip install' in refused(lambda argv: Tokenizer(*argv), {'kind': 'gpt2'})


def test_a_character_that_a_tokenizer_lacks_is_named():
    tokenizer = Tokenizer({'kind': 'char', 'chars': 'ab'})
    assert "lacks 'x' (character 3 of the text); it knows 'ab'" in refused(lambda argv: tokenizer.encode(*argv), 'abx')


def test_tokenizers_stream_whole_characters():
    tokenizer = Tokenizer({'kind': 'byte'})
    parts = list(tokenizer.decode_stream('aé€'.encode()))
    assert ''.join(parts) == 'aé€' and '\ufffd' not in parts
    assert tokenizer.decode([0xe2, 0x82]) == '\ufffd'


@pytest.mark.parametrize('argv, words', [
    ((), ('say which data set', 'stdlib')),
    (('stdlb',), ('stdlb', 'stdlib')),
    (('text',), ('train_path is missing', '--train_path=FILE')),
    (('text', '--train_path=none.txt'), ('none.txt', 'No such file')),
    (('text', '--train_path=binary'), ('binary: the text is not UTF-8 text (byte 0)',)),
    (('text', '--train_path=empty'), ('empty: the text is empty',)),
    (('shakespeare_char', '--source=none.txt'), ('none.txt',)),
    (('talk', '--haystack=empty'), ('empty: the text is empty',)), (('talk', '--haystack=b.txt'), ('b.txt is too short',)),
    (('stdlib', '--source=empty_folder'), ('no Python source',)),
    (('text', '--train_path=a.txt', '--tokenizer=words'), ('tokenizer must be one of',)),
    (('needle', '--block_size=99999999'), ('block_size=99999999 must be in [128, 16777216]',)),
])
def test_prepare_refuses(place, argv, words):
    (place / 'binary').write_bytes(b'\xff\xfe\x00')
    (place / 'empty').write_bytes(b'')
    (place / 'b.txt').write_text('One word.')
    (place / 'empty_folder').mkdir()
    before = (place / 'data/text/train.bin').read_bytes()
    message = refused(prepare.main, *argv)
    assert all(word in message for word in words), message
    assert os.listdir('data') == ['text'] and (place / 'data/text/train.bin').read_bytes() == before


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob('*') if path.is_file()}


def test_a_second_text_has_a_name_of_its_own(place, capsys):
    """The same files again are no loss, whatever tokens they become; another text replaces nothing."""
    Path('b.txt').write_text(TEXT[::-1])
    before = files('data')
    message = refused(prepare.main, 'text', '--train_path=b.txt')
    assert 'data/text was made from another text' in message and '--name=' in message and files('data') == before
    prepare.main(['text', '--train_path=b.txt', '--name=my_b-2'])
    prepare.main(['text', '--train_path=a.txt', '--tokenizer=byte'])
    assert Dataset('data', 'text').tokenizer['kind'] == 'byte'
    prepare.main(['text', '--train_path=a.txt', '--tokenizer=char'])
    assert {k: v for k, v in files('data').items() if k.startswith('text')} == before
    assert train.main(['--dataset=my_b-2', *TINY]) == 0
    prepare.main(['text', '--name=my_b-2', '--check'])
    assert 'data/my_b-2: 2 files are as they were written' in capsys.readouterr().out
    Path('data/my_b-2/train.bin').write_bytes(b'')
    for main, argv in (train.main, ['--dataset=my_b-2', *TINY]), (prepare.main, ['text', '--name=my_b-2', '--check']):
        assert 'run: python prepare.py text --train_path=FILE --name=my_b-2' in refused(main, *argv)
    prepare.main(['text', '--train_path=b.txt', '--name=my_b-2'])
    Path('data/my_b-2/meta.json').write_text('{')
    prepare.main(['text', '--train_path=b.txt', '--name=my_b-2'])
    assert sorted(os.listdir('data')) == ['my_b-2', 'text']


@pytest.mark.parametrize('name', ['', '.', '..', 'a/b', '/tmp/a', 'a.old', '-a', 'a b', 'stdlib', 'needle', 'downloads'])
def test_a_name_for_a_text(place, name):
    assert f"name='{name}' must be letters" in refused(prepare.main, 'text', '--train_path=a.txt', f'--name={name}')
    assert os.listdir('data') == ['text']


def test_text_comes_through_standard_input(monkeypatch):
    ours, theirs = os.pipe()
    stdin = os.dup(0)
    try:
        os.dup2(ours, 0)
        os.write(theirs, b'from a pipe')
        os.close(theirs)
        assert read_text('-') == 'from a pipe'
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
        os.close(ours)


def test_a_copy_that_is_not_in_the_way_stays(place):
    """A folder that only looks like one that was replaced; the data set itself is gone, so nothing has to be."""
    os.rename('data/text', 'data/text.old')
    Path('data/text.old/notes.txt').write_text('dear')
    prepare.main(['text', '--train_path=a.txt', '--tokenizer=char'])
    assert Path('data/text.old/notes.txt').exists() and Path('data/text/meta.json').exists()


def test_names_of_data_sets():
    assert {*NAMES, 'text'} == set(prepare.CORPORA)
    assert '--name is for text' in refused(prepare.main, 'stdlib', '--name=mine')


@pytest.mark.parametrize('folder, file', [('text', 'a.txt'), ('text.old', 'a.txt'), ('text.old', 'meta.json'),
                                          ('text.partial', 'a.txt')])
def test_what_prepare_has_not_written_stays(place, folder, file):
    """A file of the user's, or a copy that the user has made, in a folder that would be removed."""
    os.makedirs(f'data/{folder}', exist_ok=True)
    Path(f'data/{folder}/{file}').write_text('dear')
    before = files('data')
    message = refused(prepare.main, 'text', '--train_path=a.txt', '--tokenizer=char')
    assert f'data/{folder} is in the way' in message and files('data') == before


@pytest.mark.parametrize('broken, error', [('data/text', KeyboardInterrupt), ('data/text.partial', KeyboardInterrupt),
                                           ('data/text.partial', OSError(5, 'Input/output error'))])
def test_a_data_set_replaced_half_way(place, monkeypatch, broken, error):
    """Killed before one of the two renames, or one fails: nothing is lost, the same command mends it; another text waits."""
    Path('b.txt').write_text(TEXT[::-1])
    before, replace = files('data'), os.replace

    def breaks(source, target):
        if source == broken:
            raise error
        replace(source, target)
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', breaks)
        with pytest.raises((KeyboardInterrupt, UserError)):
            prepare.main(['text', '--train_path=a.txt', '--tokenizer=char'])
    if isinstance(error, OSError):
        assert files('data') == before
    assert 'another text' in refused(prepare.main, 'text', '--train_path=b.txt')
    assert before.items() <= files('data').items()
    prepare.main(['text', '--train_path=a.txt', '--tokenizer=char'])
    assert files('data') == before


def test_meta_json_names_no_other_files(place):
    """A sum of a file elsewhere, though it is right, is no part of a data set."""
    Path('data/b.bin').write_bytes(b'b')
    path = Path('data/text/meta.json')
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {'sha256': meta['sha256'] | {'../b': hashlib.sha256(b'b').hexdigest()}}))
    assert 'meta.json is damaged' in refused(prepare.main, 'text', '--check')


def test_no_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, 'SHAKESPEARE', 'http://127.0.0.1:9/none.txt')
    message = refused(prepare.main, 'shakespeare_char', f'--data_dir={tmp_path}')
    assert 'refused' in message and '--source=PATH' in message
    assert os.listdir(tmp_path / 'downloads') == []


def test_a_wrong_download_is_refused(tmp_path):
    (tmp_path / 'file').write_text('not Shakespeare')
    with pytest.raises(UserError, match='checksum'):
        prepare.download(f'file://{tmp_path}/file', str(tmp_path / 'd' / 'copy'), prepare.SHAKESPEARE_SHA256)
    assert os.listdir(tmp_path / 'd') == []
    assert prepare.download(f'file://{tmp_path}/file', str(tmp_path / 'd' / 'copy')) == str(tmp_path / 'd' / 'copy')


def damage(name):
    path = Path('data/text')
    if name == 'truncated':
        (path / 'train.bin').write_bytes((path / 'train.bin').read_bytes()[:-5])
    elif name == 'missing':
        (path / 'val.bin').unlink()
    elif name == 'emptied':
        (path / 'val.bin').write_bytes(b'')
    elif name == 'flipped':
        (path / 'train.bin').write_bytes(b'\x00' + (path / 'train.bin').read_bytes()[1:])
    elif name == 'meta':
        (path / 'meta.json').write_text('{"dtype":')
    else:
        meta = json.loads((path / 'meta.json').read_text())
        (path / 'meta.json').write_text(json.dumps({**meta, 'dtype': 'uint16'}))


@pytest.mark.parametrize('name, words', [('truncated', 'bytes where meta.json says'), ('missing', 'is missing where'),
                                         ('emptied', 'val.bin is 0 bytes where'),
                                         ('flipped', 'train.bin is damaged: its checksum'), ('meta', 'meta.json is damaged'),
                                         ('dtype', 'bytes where meta.json says')])
def test_damaged_data_is_refused(place, name, words):
    damage(name)
    message = refused(train.main, '--dataset=text', *TINY)
    assert words in message and 'python prepare.py text --train_path=FILE' in message


def test_unprepared_and_short_data(place):
    assert 'is not prepared' in refused(train.main, '--dataset=text', *TINY, '--data_dir=a.txt')
    assert 'cannot write' in refused(prepare.main, 'text', '--train_path=a.txt', '--data_dir=a.txt')
    assert 'run: python prepare.py text --train_path=FILE --name=nothing' in refused(train.main, '--dataset=nothing', *TINY)
    assert 'fewer than block_size' in refused(train.main, '--dataset=text', *TINY, '--block_size=4096')
    assert 'vocab_size=3 is smaller' in refused(train.main, '--dataset=text', *TINY, '--vocab_size=3')


# -- curves


def test_plot_draws_a_run(trained, capsys):
    pytest.importorskip('matplotlib')
    pytest.importorskip('plotext')
    assert plot.main(['out']) == 0
    assert 'last validation loss' in capsys.readouterr().out
    assert Path('out/loss.png').read_bytes()[:4] == b'\x89PNG'


def test_plot_draws_several_runs(trained, capsys, monkeypatch):
    """Of the same name, one of them being written, one whose memories are others; against steps, tokens or hours."""
    pytest.importorskip('matplotlib')
    pytest.importorskip('plotext')
    assert train.main(['--dataset=text', *TINY, '--out_dir=b/out', '--memory_layers=none', '--log_interval=1']) == 0
    assert train.main(['--dataset=text', *TINY, '--out_dir=c/out', '--n_layer=2', '--log_interval=1', '--batch_size=4']) == 0
    whole = {x: plot.read('c/out', x) for x in ('step', 'tokens', 'hours')}
    with open('c/out/log.jsonl', 'a') as f:
        f.write('{"step": 3, "lo')
    assert {x: plot.read('c/out', x) for x in whole} == whole
    assert whole['step']['loss'][0] == [1, 2] and whole['tokens']['loss'][0] == [4 * 16, 2 * 4 * 16]
    first, second = whole['hours']['loss'][0]
    assert 0 < first < second == whole['hours']['val_loss'][0][-1]
    assert run_names(['c/out', './b/out']) == ['c/out', 'b/out'] and run_names(['c/out', 'c/x']) == ['out', 'x']
    drawn = []
    monkeypatch.setattr(plot, 'draw_memory', lambda runs, *_: drawn.append(list(runs)))
    monkeypatch.setattr(plot, 'draw_loss', lambda runs, x, _: drawn.append((list(runs), x)))
    assert plot.main(['b/out', 'c/out/', 'c/out', '--x=hours']) == 0
    assert drawn == [(['b/out', 'c/out'], 'hours'), ['c/out']]
    monkeypatch.undo()
    monkeypatch.chdir(trained)
    assert plot.main(['b/out', 'c/out', 'out', '--x=tokens']) == 0
    assert {'loss.png', 'memory.png'} <= set(os.listdir('b/out')) and not os.path.exists('c/out/loss.png')


@pytest.mark.parametrize('n', [1, 12])
def test_a_runs_curves_share_a_colour(tmp_path, monkeypatch, n):
    plt = pytest.importorskip('matplotlib.pyplot')
    monkeypatch.setattr(plt, 'close', lambda figure: None)
    losses = [5.5, 2.0, 1.5]
    runs = {f'run {i}': {'loss': ([1.0, 2.0], losses[1:]), 'val_loss': ([0.0, 1.0, 2.0], losses)} for i in range(n)}
    plot.draw_loss(runs, 'step', str(tmp_path / 'loss.png'))
    figure = plt.gcf()
    lines = figure.axes[0].lines
    assert [line.get_color() is not None and str(line.get_color()) for line in lines[::2]] == [
        str(line.get_color()) for line in lines[1::2]]
    assert len({str(line.get_color()) for line in lines}) == n
    monkeypatch.undo()
    plt.close('all')


@pytest.mark.parametrize('argv, words', [((), 'out_dir of at least one run'), (('none',), 'none/log.jsonl: No such file'),
                                         (('bad',), 'not the log of a run'), (('empty',), 'nothing has been logged'),
                                         (('begun',), 'nothing has been logged'), (('old', '--x=hours'), 'give --x=step'),
                                         (('old', '--x=time'), "x must be one of 'step'")])
def test_plot_refuses(tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    for name, text in ('bad', 'no json'), ('empty', ''), ('begun', '{"step": 0, "tr'), ('old', '{"step": 0, "loss": 5}\n'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'log.jsonl').write_text(text)
    assert words in refused(plot.main, *argv)


# -- checkpoints and samples


def test_sample_streams_and_is_seeded(trained, capsys):
    outs = []
    for seed in (1, 1, 2):
        assert sample.main(['--prompt=def f', '--max_new_tokens=40', f'--seed={seed}', '--num_samples=2']) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]
    assert outs[0].count('def f') >= 2 and len(outs[0]) > 80


def test_sample_reads_files_and_stdin(trained, capsys):
    Path('p.txt').write_text('def f3(x)')
    flags = ['--max_new_tokens=5', '--device=cpu']
    outs = [subprocess.run([sys.executable, str(HERE / 'sample.py'), *flags, '--prompt=-'], input='def f3(x)',
                           capture_output=True, text=True).stdout]
    capsys.readouterr()
    for prompt in 'FILE:p.txt', 'def f3(x)':
        assert sample.main([*flags, f'--prompt={prompt}']) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] == outs[2] and outs[0].startswith('def f3(x)')


def test_interactive_carries_the_state(trained):
    done = subprocess.run([sys.executable, str(HERE / 'sample.py'), '--interactive', '--max_new_tokens=5', '--device=cpu'],
                          input='def f\nreturn\n', capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count('> ') == 3 and 'Traceback' not in done.stderr


@pytest.mark.parametrize('argv, words', [
    (('--prompt=',), ('the prompt is empty',)),
    (('--prompt=def\u00e9',), ("lacks '\u00e9'", 'character 4')),
    (('--prompt=FILE:none',), ('none: No such file',)),
    (('--prompt=FILE:',), ("'': No such file",)),
    (('--out_dir=none',), ('no such checkpoint', '--out_dir=')),
    (('--temperature=-1',), ('temperature=-1.0',)), (('--repetition_penalty=0',), ('repetition_penalty=0.0',)),
    (('--repetition_penalty=-0.5',), ('repetition_penalty=-0.5',)),
    (('--top_p=0',), ('top_p=0.0',)),
])
def test_sample_refuses(trained, argv, words):
    message = refused(sample.main, *argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize('keep', [0, -1])
def test_truncated_checkpoint_is_refused(trained, keep):
    path = Path('out/ckpt.pt')
    path.write_bytes(path.read_bytes()[:keep])
    for main, argv in (sample.main, ()), (train.main, ('--dataset=text', *TINY, '--init_from=resume')):
        assert 'not a readable checkpoint' in refused(main, *argv)


def test_foreign_checkpoints_are_refused(trained):
    path = 'out/ckpt.pt'
    message = refused(train.main, '--dataset=text', *TINY, '--init_from=resume', '--n_embd=32')
    assert 'another architecture' in message and 'n_embd=16 there, 32 asked for' in message
    message = refused(train.main, '--dataset=text', *TINY, '--init_from=resume', '--arch=mal', '--window_len=4')
    assert all(words in message for words in ("arch='mac' there, 'mal' asked for", 'segment_len=8 there', '4 asked for'))
    content = checkpoint.load(path)
    checkpoint.save(path, content | {'model_config': content['model_config'] | {'n_layer': 2}})
    assert 'do not fit the configuration' in refused(sample.main)
    torch.save({'weights': torch.zeros(3)}, path)
    assert 'not a checkpoint of this version' in refused(sample.main)
    assert 'no such checkpoint' in refused(train.main, '--dataset=text', *TINY, '--init_from=resume', '--out_dir=new')


@pytest.mark.parametrize('flags, words', [
    ('--init_from=resume --n_head=3', 'n_head=3'), ('--init_from=auto --n_embd=33', 'n_embd=33'),
    ('--init_from=auto --memory_layers=9', 'outside 0 to n_layer-1=0'), ('--init_from=', 'stand alone'),
    ('--init_from=auto:auto', 'as in auto:gpt2'), ('--init_from=auto:resume', 'as in auto:gpt2'),
])
def test_where_a_run_cannot_begin(trained, flags, words):
    """One line, and the run that is there stays where it is."""
    assert words in refused(train.main, '--dataset=text', *TINY, *flags.split())
    assert os.path.exists('out/ckpt.pt') and not os.path.exists('out/earlier-1')


def test_eval_only_leaves_the_log(trained, capsys):
    before = Path('out/log.jsonl').read_text()
    assert train.main(['--dataset=text', *TINY, '--init_from=resume', '--eval_only']) == 0
    assert 'val loss' in capsys.readouterr().out and Path('out/log.jsonl').read_text() == before


def test_resume_refuses_other_data_and_rows(place):
    assert train.main(['--dataset=text', *TINY, '--carry_state']) == 0
    assert 'batch_size x gradient_accumulation_steps=2 there, 3 asked for' in refused(
        train.main, '--dataset=text', *TINY, '--carry_state', '--init_from=resume', '--batch_size=3')
    Path('b.txt').write_text(TEXT[::-1])
    shutil.rmtree('data/text')
    prepare.main(['text', '--train_path=b.txt', '--tokenizer=char'])
    assert 'other data' in refused(train.main, '--dataset=text', *TINY, '--carry_state', '--init_from=resume')


# -- examples


@pytest.mark.slow
def test_examples_run_from_anywhere(tmp_path):
    def run(name, *argv):
        command = [sys.executable, str(HERE / 'examples' / name), *argv]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    rows = {line[:28].strip(): line[28:].split() for line in run('standalone_memory.py').stdout.splitlines()}
    assert rows['linear'][0] == rows['two layers, 4 x wide'][0] == '100'  # per cent of 16 pairs
    assert int(rows['linear'][8]) < 60 < 90 < int(rows['two layers, 4 x wide'][8])  # and of 256
    for arch in 'mac', 'lmm', 'gpt':
        lines = run('long_stream.py', arch, '16384').stdout.splitlines()
        assert len(lines) == 4 and lines[2].split()[1] == lines[3].split()[1]  # the state has the same size
    assert 'give an architecture' in run('long_stream.py', 'rnn').stderr


@pytest.mark.parametrize('asked', [True, False])
def test_the_traceback_behind_a_line_is_shown_on_request(monkeypatch, capsys, asked):
    def main(argv):
        raise configurator.UserError("a.pt: damaged") from KeyError('format')
    monkeypatch.setenv('NANOTITANS_TRACE', '1' if asked else '')
    monkeypatch.setattr(sys, 'argv', ['script.py'])
    with pytest.raises(SystemExit):
        configurator.run(main)
    said = capsys.readouterr().err
    assert said.endswith('script.py: a.pt: damaged\n') and ("KeyError: 'format'" in said) == asked
