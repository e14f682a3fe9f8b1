"""What a user types, and what comes back: a mistake gives one line and leaves no half file."""
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
from unittest.mock import Mock

import pytest
import torch
from helpers import TEXT

import bench
import eval_learning
import eval_needle
import eval_rows
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
TINY = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--memory_heads=2', '--block_size=16',
        '--segment_len=8', '--batch_size=2', '--max_iters=2', '--eval_interval=2', '--eval_iters=1',
        '--device=cpu']
RUN = ['--dataset=text', *TINY]
PREPARE = ['text', '--train_path=a.txt', '--tokenizer=char']


@pytest.fixture()
def place(tmp_path, monkeypatch):
    """The current directory, with a text a.txt and the data set 'text' of its characters."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.txt').write_text(TEXT)
    prepare.main(PREPARE)
    return tmp_path


@pytest.fixture()
def trained(place):
    assert train.main(RUN) == 0
    return place


def refused(main, *argv):
    """-> the message, one line, of the UserError that main raises."""
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
    ('--carry_state --block_size=100',
     ('block_size=100', 'of 128, where mac can begin', 'block_size=128 is')),
    ('--arch=mag --window_len=0', ('window_len=0', 'at least 1')),
    ('--segment_len=0', ('segment_len=0', 'at least 1')),
    ('--batch_size=0', ('batch_size=0',)), ('--beta1=2', ('beta1=2.0',)),
    ('--reset_prob=2', ('reset_prob=2.0',)), ('--device=cpu:x', ("device='cpu:x'",)),
    ('--learning_rate=nan', ('learning_rate', 'float')),
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
    argv = ['--n_layer=4', str(path), '--wandb_run_name=x=y', '--compile']
    config = configurator.load(train.TrainConfig, argv)
    assert (config.n_layer, config.learning_rate, config.out_dir) == (4, 1.0, 'a=b')
    assert config.wandb_run_name == 'x=y' and config.compile is True
    assert config.n_head == train.TrainConfig.n_head


@pytest.mark.parametrize('path', sorted((HERE / 'config').glob('*.py')), ids=lambda p: p.name)
def test_every_config_can_be_switched_to_every_arch(path):
    for arch in BLOCKS:
        config = configurator.load(train.TrainConfig, [str(path), f'--arch={arch}'])
        assert not config.drop_unused() and set(config.ignored) <= config.unused()
        TitansConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(TitansConfig)})


def test_options_that_the_arch_does_not_use_are_named_once(place, capsys):
    assert train.main([*RUN, '--arch=gpt', '--write_cost=1', '--carry_state', '--tbptt=8',
                       '--memory_heads=3', '--memory_depth=-1']) == 0
    line, = [line for line in capsys.readouterr().out.splitlines() if 'not used by gpt' in line]
    assert set(line.split('gpt')[1].strip().split(', ')) == {
        'write_cost', 'carry_state', 'tbptt', 'memory_heads', 'segment_len', 'memory_depth'}
    assert train.main([*RUN, '--arch=mac', '--max_iters=0']) == 0
    assert 'not used' not in capsys.readouterr().out


def test_print_config_and_help_exit_zero(capsys):
    for flag, words in ('--print_config', "arch = 'mac'"), ('--help', '--learning_rate='):
        with pytest.raises(SystemExit) as end:
            train.main([flag])
        assert not end.value.code and words in capsys.readouterr().out


@pytest.mark.parametrize('config, flag, words', [
    *((config, '--seed=-1', 'seed=-1') for config in (
        train.TrainConfig, sample.SampleConfig, eval_talk.TalkConfig, eval_learning.LearningConfig,
        eval_rows.RowsConfig)),
    (bench.BenchConfig, '--gpus=0', 'gpus=0 must be at least 1'),
    (bench.BenchConfig, '--gpu_flops=0', 'gpu_flops=0.0 must be above 0'),
    (bench.BenchConfig, '--threads=100000', 'threads=100000 must be in [0, 1024]'),
    (bench.BenchConfig, '--sizes=1x99999999999999999999',
     'sizes=1x99999999999999999999 must be rows x tokens'),
    (eval_talk.TalkConfig, '--gaps=99999999999999999999',
     "gaps='99999999999999999999' must be at least 0 and at most"),
    (eval_needle.NeedleConfig, '--lengths=99999999999999999999',
     'must be at least 1 and at most 1099511627776'),
])
def test_numbers_out_of_range_are_refused(config, flag, words):
    assert words in refused(lambda argv: configurator.load(config, argv), flag)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    assert pick_device('cuda') == 'cuda' and pick_device('cuda:0') == 'cuda:0'
    assert "device='cuda:1' is not there" in refused(lambda argv: pick_device(*argv), 'cuda:1')


def test_a_limit_far_above_the_size_of_a_text_takes_no_memory(place):
    assert read_text('a.txt', max_chars=2 ** 62) == TEXT


# -- what is printed


def outcome(monkeypatch, main, *argv):
    """configurator.run(main) at a terminal that knows only ASCII. -> exit status, stdout, stderr"""
    streams = [io.TextIOWrapper(io.BytesIO(), 'ascii', errors='strict', write_through=True)
               for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, 'stdout', streams[0])
        patch.setattr(sys, 'stderr', streams[1])
        patch.setattr(sys, 'argv', ['script.py', *argv])
        with pytest.raises(SystemExit) as end:
            configurator.run(main)
    return end.value.code, *(stream.buffer.getvalue().decode() for stream in streams)


def test_what_a_terminal_does_not_know_comes_out_escaped(place, monkeypatch):
    """A character, and bytes in a file name that are not UTF-8."""
    result = outcome(monkeypatch, lambda argv: print('d\u00e9 \udcff'))
    assert result == (None, 'd\\xe9 \\udcff\n', '')
    os.rename('a.txt', b'\xff.txt')
    argv = ['text', '--train_path=\udcff.txt', '--data_dir=\udcff']
    status, out, _ = outcome(monkeypatch, prepare.main, *argv)
    assert status is None and out.startswith('\\udcff/text: ')
    status, _, err = outcome(monkeypatch, prepare.main, 'text', '--train_path=FILE:\udcff')
    assert (status, err) == (1, 'script.py: FILE:\\udcff: No such file or directory\n')


def test_what_was_typed_is_utf8_whatever_the_locale():
    """In an ASCII locale each byte of a character is a surrogate; bytes that are not UTF-8 stay."""
    prompt = sample.read_prompt('d\udcc3\udca9\udcff')
    assert prompt == 'd\u00e9\udcff'
    assert sample.SampleConfig(stop='\udcc3\udca9|\u00e9').stops() == ['\u00e9', '\u00e9']
    assert Tokenizer({'kind': 'byte'}).encode(prompt) == [*'d\u00e9'.encode(), 255]
    assert 'prompt is not text' in refused(lambda argv: sample.read_prompt(*argv), '\ud800')


@pytest.mark.parametrize('error', [
    MemoryError(), RuntimeError('CUDA out of memory. Tried to allocate 2 GiB.\nMore'),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), OverflowError('too large')])
def test_too_little_memory_is_one_line(monkeypatch, error):
    status, out, err = outcome(monkeypatch, Mock(side_effect=error))
    assert (status, out) == (1, '') and err.count('\n') == 1
    assert err.startswith('script.py: not enough memory')


def test_a_bug_keeps_its_traceback(monkeypatch):
    with pytest.raises(RuntimeError):
        outcome(monkeypatch, Mock(side_effect=RuntimeError('a shape is wrong')))


@pytest.mark.parametrize('trace', ['1', ''])
def test_a_users_mistake_shows_its_traceback_on_request(monkeypatch, trace):
    def fail(argv):
        raise UserError("a.pt: damaged") from KeyError('format')
    monkeypatch.setenv('NANOTITANS_TRACE', trace)
    _, _, err = outcome(monkeypatch, fail)
    assert err.endswith('script.py: a.pt: damaged\n')
    assert ("KeyError: 'format'" in err) == bool(trace)


def test_a_label_in_a_figure_may_hold_what_is_not_text(tmp_path):
    plt = pytest.importorskip('matplotlib.pyplot')
    figure, axes = plt.subplots()
    axes.plot([0, 1], label='run \udcff')
    axes.legend()
    save_figure(figure, str(tmp_path / 'a.png'))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ['run ?']


@pytest.mark.parametrize('script', ['train.py', 'prepare.py'])
def test_a_script_prints_the_line_and_fails(script):
    command = [sys.executable, script, '--learning_rat=1']
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert done.stderr.startswith(f"{script}: ")


# -- data


def test_prepare_text_and_decode(place):
    data = Dataset('data', 'text')
    cut = int(len(TEXT) * 0.9)
    assert data.tokens == {'train': cut, 'val': len(TEXT) - cut}
    assert Tokenizer(data.tokenizer).decode(data.read('train', [0], cut)[0]) == TEXT[:cut]
    assert os.listdir('data') == ['text']
    assert sorted(os.listdir('data/text')) == ['meta.json', 'train.bin', 'val.bin']


def test_prepare_stdlib_does_not_leak(tmp_path, capsys):
    """
    Of the validation bytes in lines of 30 or more, less than 2% are in the training text too, and
    in no module more than half. The held-out tenth of the language reference is not in it at all.
    """
    for name in ('one', 'two'):
        prepare.main(['stdlib', f'--data_dir={tmp_path / name}'])
    one, two = (Dataset(str(tmp_path / name), 'stdlib') for name in ('one', 'two'))
    python = platform.python_version()
    assert one.meta == two.meta and one.meta['about'] == {'python': python}
    assert f'validation tokens, vocabulary 256; python {python}' in capsys.readouterr().out
    total = sum(one.tokens.values())
    assert total > 7e6 and 0.05 < one.tokens['val'] / total < 0.25
    train_text, val_text = (one.flat(split, 0, one.tokens[split]).astype('uint8').tobytes()
                            for split in ('train', 'val'))

    def long_lines(text):
        return [line.strip() for line in text.splitlines() if len(line.strip()) >= 30]
    known = set(long_lines(train_text))
    modules = [long_lines(module) for module in val_text.split(b'\0')]
    copied = [sum(len(line) for line in module if line in known) for module in modules]
    sizes = [sum(map(len, module)) for module in modules]
    assert sum(copied) < 0.02 * sum(sizes)
    assert all(c <= 0.5 * size for c, size in zip(copied, sizes, strict=True))
    hidden = held_out(reference())[1].encode()
    assert not [line for line in known if len(line) >= 40 and line in hidden]


def test_prepare_stdlib_from_another_folder(tmp_path):
    """It skips what is not a readable module, and keeps a package in one split; so it needs two."""
    source = tmp_path / 'src'
    argv = ['stdlib', f'--source={source}', f'--data_dir={tmp_path}/data']
    for i in range(20):
        folder = source / f'config-{i}'
        folder.mkdir(parents=True)
        for j in range(2):
            (folder / f'm{j}.py').write_text(f'# package {i:02}\n' + f'x{i} = {j}\n' * 50)
    (source / 'dir.py').mkdir()
    (source / 'gone.py').symlink_to('nowhere.py')
    (source / os.fsdecode(b'na\xefve.py')).write_text('# package 20\n' + 'y = 1\n' * 100)
    prepare.main(argv)
    data = Dataset(str(tmp_path / 'data'), 'stdlib')
    texts = {split: data.flat(split, 0, n).astype('uint8').tobytes()
             for split, n in data.tokens.items()}
    in_train, in_val = ({module[:12] for module in texts[split].split(b'\0') if module}
                        for split in ('train', 'val'))
    assert len(in_train) + len(in_val) == 21 and not in_train & in_val
    assert sum(data.documents['train']) + sum(data.documents['val']) == 41
    shutil.rmtree(source)
    source.mkdir()
    (source / 'm.py').write_text('x = 1\n' * 50)
    assert 'a single module or package' in refused(prepare.main, *argv)


needs_gpt2 = pytest.mark.skipif('TIKTOKEN_CACHE_DIR' not in os.environ,
                                reason='no TIKTOKEN_CACHE_DIR with the GPT-2 files')


@needs_gpt2
def test_prepare_openwebtext(place, monkeypatch):
    """<|endoftext|> ends each document; the first of 2,000 is for validation. No network."""
    texts = [f'document {i}' for i in range(20)]
    fake = types.ModuleType('datasets')
    fake.load_dataset = lambda name, split, streaming: [{'text': text} for text in texts]
    monkeypatch.setitem(sys.modules, 'datasets', fake)
    prepare.main(['openwebtext', '--num_proc=1'])
    data = Dataset('data', 'openwebtext')
    text = Tokenizer(data.tokenizer).decode(data.read('train', [0], data.tokens['train'])[0])
    assert text == ''.join(f'{text}<|endoftext|>' for text in texts[1:])


@needs_gpt2
def test_prepare_gpt2_text(place):
    prepare.main(['text', '--train_path=a.txt', '--val_path=a.txt', '--tokenizer=gpt2'])
    data = Dataset('data', 'text')
    assert data.vocab_size == 50257 and data.dtype == 'uint16'
    assert Tokenizer(data.tokenizer).decode(data.read('val', [0], data.tokens['val'])[0]) == TEXT


def test_a_tokenizer_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    message = refused(lambda argv: Tokenizer(*argv), {'kind': 'gpt2'})
    assert 'the gpt2 tokenizer needs tiktoken: pip install' in message


def test_a_character_that_a_tokenizer_lacks_is_named():
    tokenizer = Tokenizer({'kind': 'char', 'chars': 'ab'})
    message = refused(lambda argv: tokenizer.encode(*argv), 'abx')
    assert "lacks 'x' (character 3 of the text); it knows 'ab'" in message


def test_token_ids_are_numbers_of_the_vocabulary():
    tokenizer = Tokenizer({'kind': 'ids', 'vocab_size': 300})
    assert tokenizer.encode('5 299\n0') == [5, 299, 0] and tokenizer.decode([5, 299]) == ' 5 299'
    for text, wrong in ('5 300', '300'), ('-1', '-1'), ('5 x', 'x'), ('\n', r'\n'):
        message = refused(lambda argv: tokenizer.encode(*argv), text)
        assert f"'{wrong}' is not a token id: this model reads numbers from 0 to 299" in message


def test_tokenizers_stream_whole_characters():
    tokenizer = Tokenizer({'kind': 'byte'})
    parts = list(tokenizer.decode_stream('aé€'.encode()))
    assert ''.join(parts) == 'aé€' and '\ufffd' not in parts
    assert tokenizer.decode([0xe2, 0x82]) == '\ufffd'


@pytest.mark.parametrize('argv, words', [
    ('', ('say which data set', 'stdlib')),
    ('stdlb', ('stdlb', 'stdlib')),
    ('text', ('train_path is missing', '--train_path=FILE')),
    ('text --train_path=none.txt', ('none.txt', 'No such file')),
    ('text --train_path=binary', ('binary: the text is not UTF-8 text (byte 0)',)),
    ('text --train_path=empty', ('empty: the text is empty',)),
    ('shakespeare_char --source=none.txt', ('none.txt',)),
    ('talk --haystack=empty', ('empty: the text is empty',)),
    ('talk --haystack=b.txt', ('b.txt is too short',)),
    ('babi --haystack=b.txt', ('b.txt (train) is too short',)),
    ('babi --tokenizer=char', ("tokenizer='char' must be word",)),
    ('babi --source=b.txt', ('--source is not for babi; give --haystack=FILE',)),
    ('stdlib --source=empty_folder', ('no Python source',)),
    ('text --train_path=a.txt --tokenizer=words', ('tokenizer must be one of',)),
    ('needle --block_size=99999999', ('block_size=99999999 must be in [128, 16777216]',)),
])
def test_prepare_refuses(place, argv, words):
    (place / 'binary').write_bytes(b'\xff\xfe\x00')
    (place / 'empty').write_bytes(b'')
    (place / 'b.txt').write_text('One word.')
    (place / 'empty_folder').mkdir()
    before = files('data')
    message = refused(prepare.main, *argv.split())
    assert all(word in message for word in words), message
    assert os.listdir('data') == ['text'] and files('data') == before


def files(folder):
    """-> {path within the folder: content}"""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in Path(folder).rglob('*') if path.is_file()}


def test_a_second_text_needs_a_name_of_its_own(place, capsys):
    """The same text may be prepared again, with any tokenizer; another text replaces nothing."""
    Path('b.txt').write_text(TEXT[::-1])
    before = files('data')
    message = refused(prepare.main, 'text', '--train_path=b.txt')
    assert 'data/text was made from another text' in message and '--name=' in message
    assert files('data') == before
    second = ['text', '--train_path=b.txt', '--name=my_b-2']
    prepare.main(second)
    prepare.main(['text', '--train_path=a.txt', '--tokenizer=byte'])
    assert Dataset('data', 'text').tokenizer['kind'] == 'byte'
    prepare.main(PREPARE)
    assert {k: v for k, v in files('data').items() if k.startswith('text')} == before
    assert train.main(['--dataset=my_b-2', *TINY]) == 0
    check = ['text', '--name=my_b-2', '--check']
    prepare.main(check)
    assert 'data/my_b-2: 2 files are as they were written' in capsys.readouterr().out
    Path('data/my_b-2/train.bin').write_bytes(b'')
    for main, argv in (train.main, ['--dataset=my_b-2', *TINY]), (prepare.main, check):
        remedy = 'run: python prepare.py text --train_path=FILE --name=my_b-2'
        assert remedy in refused(main, *argv)
    prepare.main(second)
    Path('data/my_b-2/meta.json').write_text('{')
    prepare.main(second)
    assert sorted(os.listdir('data')) == ['my_b-2', 'text']


@pytest.mark.parametrize('name', ['', '.', '..', 'a/b', '/tmp/a', 'a.old', '-a', 'a b', 'stdlib',
                                  'needle', 'downloads'])
def test_a_text_cannot_have_this_name(place, name):
    message = refused(prepare.main, 'text', '--train_path=a.txt', f'--name={name}')
    assert f"name='{name}' must be letters" in message and os.listdir('data') == ['text']


def test_names_of_data_sets():
    assert {*NAMES, 'text'} == set(prepare.CORPORA)
    assert '--name is for text' in refused(prepare.main, 'stdlib', '--name=mine')


def test_a_copy_that_is_not_in_the_way_stays(place):
    """text.old looks like the rest of a replaced data set, but there is no text to be replaced."""
    os.rename('data/text', 'data/text.old')
    Path('data/text.old/notes.txt').write_text('dear')
    prepare.main(PREPARE)
    assert Path('data/text.old/notes.txt').exists() and Path('data/text/meta.json').exists()


@pytest.mark.parametrize('path', ['text/a.txt', 'text.old/a.txt', 'text.old/meta.json',
                                  'text.partial/a.txt'])
def test_what_prepare_has_not_written_stays(place, path):
    """The user's own file or copy, in a folder that prepare would remove."""
    file = Path('data', path)
    file.parent.mkdir(exist_ok=True)
    file.write_text('dear')
    before = files('data')
    assert f'{file.parent} is in the way' in refused(prepare.main, *PREPARE)
    assert files('data') == before


@pytest.mark.parametrize('broken, error', [
    ('data/text', KeyboardInterrupt), ('data/text.partial', KeyboardInterrupt),
    ('data/text.partial', OSError(5, 'Input/output error'))])
def test_a_data_set_replaced_half_way(place, monkeypatch, broken, error):
    """A rename is interrupted or fails: no data is lost, and the same command repairs it."""
    Path('b.txt').write_text(TEXT[::-1])
    before, replace = files('data'), os.replace

    def failing_replace(source, target):
        if source == broken:
            raise error
        replace(source, target)
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', failing_replace)
        with pytest.raises((KeyboardInterrupt, UserError)):
            prepare.main(PREPARE)
    if isinstance(error, OSError):
        assert files('data') == before
    assert 'another text' in refused(prepare.main, 'text', '--train_path=b.txt')
    assert before.items() <= files('data').items()
    prepare.main(PREPARE)
    assert files('data') == before


def test_meta_json_names_no_other_files(place):
    """A file outside the folder is refused, though its checksum is right."""
    Path('data/b.bin').write_bytes(b'b')
    path = Path('data/text/meta.json')
    meta = json.loads(path.read_text())
    meta['sha256']['../b'] = hashlib.sha256(b'b').hexdigest()
    path.write_text(json.dumps(meta))
    assert 'meta.json is damaged' in refused(prepare.main, 'text', '--check')


def test_no_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, 'SHAKESPEARE', 'http://127.0.0.1:9/none.txt')
    message = refused(prepare.main, 'shakespeare_char', f'--data_dir={tmp_path}')
    assert 'refused' in message and '--source=PATH' in message
    assert os.listdir(tmp_path / 'downloads') == []


def test_a_wrong_download_is_refused(tmp_path):
    (tmp_path / 'file').write_text('not Shakespeare')
    url, path = f'file://{tmp_path}/file', str(tmp_path / 'd' / 'copy')
    with pytest.raises(UserError, match='checksum'):
        prepare.download(url, path, prepare.SHAKESPEARE_SHA256)
    assert os.listdir(tmp_path / 'd') == []
    assert prepare.download(url, path) == path


@pytest.mark.parametrize('name, damage, words', [
    ('train.bin', lambda data: data[:-5], 'bytes where meta.json says'),
    ('val.bin', None, 'is missing where'),
    ('val.bin', lambda data: b'', 'val.bin is 0 bytes where'),
    ('train.bin', lambda data: data[:-1] + b'\xff', 'train.bin is damaged: its checksum'),
    ('meta.json', lambda data: b'{"dtype":', 'meta.json is damaged'),
    ('meta.json', lambda data: data.replace(b'"uint8"', b'"uint16"'), 'bytes where meta.json says'),
])
def test_damaged_data_is_refused(place, name, damage, words):
    path = Path('data/text', name)
    data = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(data))
    message = refused(train.main, *RUN)
    assert words in message and 'python prepare.py text --train_path=FILE' in message


@pytest.mark.parametrize('main, argv, words', [
    (train.main, [*RUN, '--data_dir=a.txt'], 'is not prepared'),
    (prepare.main, ['text', '--train_path=a.txt', '--data_dir=a.txt'], 'cannot write'),
    (train.main, ['--dataset=nothing', *TINY],
     'run: python prepare.py text --train_path=FILE --name=nothing'),
    (train.main, [*RUN, '--block_size=4096'], 'fewer than block_size'),
    (train.main, [*RUN, '--vocab_size=3'], 'vocab_size=3 is smaller')])
def test_unprepared_and_short_data(place, main, argv, words):
    assert words in refused(main, *argv)


# -- curves


def test_plot_draws_one_run_or_several(trained, monkeypatch, capsys):
    """Over steps, tokens or hours. Names may be equal, a log unfinished, a run without memory."""
    pytest.importorskip('matplotlib')
    pytest.importorskip('plotext')
    assert plot.main(['out']) == 0 and 'last validation loss' in capsys.readouterr().out
    assert Path('out/loss.png').read_bytes()[:4] == b'\x89PNG'
    run = [*RUN, '--log_interval=1']
    assert train.main([*run, '--out_dir=b/out', '--memory_layers=none']) == 0
    assert train.main([*run, '--out_dir=c/out', '--n_layer=2', '--batch_size=4']) == 0
    curves = {x: plot.read('c/out', x) for x in ('step', 'tokens', 'hours')}
    with open('c/out/log.jsonl', 'a') as f:
        f.write('{"step": 3, "lo')
    assert {x: plot.read('c/out', x) for x in curves} == curves
    assert curves['step']['loss'][0] == [1, 2]
    assert curves['tokens']['loss'][0] == [4 * 16, 2 * 4 * 16]
    first, second = curves['hours']['loss'][0]
    assert 0 < first < second == curves['hours']['val_loss'][0][-1]
    assert run_names(['c/out', './b/out']) == ['c/out', 'b/out']
    assert run_names(['c/out', 'c/x']) == ['out', 'x']
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(plot, 'draw_memory', lambda runs, *_: drawn.append(list(runs)))
        patch.setattr(plot, 'draw_loss', lambda folders, x, _: drawn.append(
            ([(folder, list(runs)) for folder, runs in folders.items()], x)))
        assert plot.main(['b/out', 'c/out/', 'c/out', '--x=hours']) == 0
        assert plot.main(['b/out', 'c/out', '--panels']) == 0
        assert plot.main(['b/out', '--panels']) == 0
    assert drawn[:2] == [([('', ['b/out', 'c/out'])], 'hours'), ['c/out']]
    assert drawn[2] == ([('b', ['out']), ('c', ['out'])], 'step')
    assert drawn[4] == ([('validation', ['out'])], 'step')  # no training losses, and not said so
    assert plot.main(['c/out', 'b/out', 'out', '--panels']) == 0
    os.remove('c/out/loss.png')
    assert plot.main(['b/out', 'c/out', 'out', '--x=tokens']) == 0
    assert {'loss.png', 'memory.png'} <= set(os.listdir('b/out'))
    assert not os.path.exists('c/out/loss.png')


@pytest.mark.parametrize('n', [1, 12])
def test_both_losses_of_a_run_share_a_colour(tmp_path, monkeypatch, n):
    plt = pytest.importorskip('matplotlib.pyplot')
    monkeypatch.setattr(plt, 'close', lambda figure: None)
    losses = [5.5, 2.0, 1.5]
    run = {'loss': ([1.0, 2.0], losses[1:]), 'val_loss': ([0.0, 1.0, 2.0], losses)}
    runs = {f'run {i}': run for i in range(n)}
    plot.draw_loss({'a': runs, 'b': runs}, 'step', str(tmp_path / 'loss.png'))
    panels = [[str(line.get_color()) for line in axes.lines] for axes in plt.gcf().axes]
    colours = panels[0]
    assert panels == [colours, colours]
    assert colours[::2] == colours[1::2] and len(set(colours)) == n
    monkeypatch.undo()
    plt.close('all')


@pytest.mark.parametrize('argv, words', [
    ('', 'out_dir of at least one run'), ('none', 'none/log.jsonl: No such file'),
    ('bad', 'not the log of a run'), ('empty', 'nothing has been logged'),
    ('begun', 'nothing has been logged'), ('old --x=hours', 'give --x=step'),
    ('old --x=time', "x must be one of 'step'")])
def test_plot_refuses(tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    for name, text in (('bad', 'no json'), ('empty', ''), ('begun', '{"step": 0, "tr'),
                       ('old', '{"step": 0, "loss": 5}\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'log.jsonl').write_text(text)
    assert words in refused(plot.main, *argv.split())


# -- checkpoints and samples


def test_sample_streams_and_is_seeded(trained, capsys):
    outs = []
    for seed in (1, 1, 2):
        assert sample.main(['--prompt=def f', '--max_new_tokens=40', f'--seed={seed}',
                            '--num_samples=2']) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]
    assert outs[0].count('def f') >= 2 and len(outs[0]) > 80


def run_script(*argv, text=None):
    """A script of the repository in a process of its own; `text` is its standard input."""
    command = [sys.executable, str(HERE / argv[0]), *argv[1:]]
    return subprocess.run(command, input=text, capture_output=True, text=True)


def test_sample_reads_files_and_stdin(trained, capsys):
    Path('p.txt').write_text('def f3(x)')
    flags = ['--max_new_tokens=5', '--device=cpu']
    outs = [run_script('sample.py', *flags, '--prompt=-', text='def f3(x)').stdout]
    capsys.readouterr()
    for prompt in 'FILE:p.txt', 'def f3(x)':
        assert sample.main([*flags, f'--prompt={prompt}']) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] == outs[2] and outs[0].startswith('def f3(x)')


@pytest.mark.parametrize('flag, words', [
    ('--prompt=', ('the prompt is empty',)),
    ('--prompt=def\u00e9', ("lacks '\u00e9'", 'character 4')),
    ('--prompt=FILE:none', ('none: No such file',)),
    ('--prompt=FILE:', ("'': No such file",)),
    ('--out_dir=none', ('no such checkpoint', '--out_dir=')),
    ('--temperature=-1', ('temperature=-1.0',)), ('--top_p=0', ('top_p=0.0',)),
    ('--repetition_penalty=0', ('repetition_penalty=0.0',)),
    ('--repetition_penalty=-0.5', ('repetition_penalty=-0.5',)),
])
def test_sample_refuses(trained, flag, words):
    message = refused(sample.main, flag)
    assert all(word in message for word in words), message


def test_foreign_and_truncated_checkpoints_are_refused(trained):
    path, resume = Path('out/ckpt.pt'), [*RUN, '--init_from=resume']
    data = path.read_bytes()
    message = refused(train.main, *resume, '--n_embd=32')
    assert 'another architecture' in message and 'n_embd=16 there, 32 asked for' in message
    message = refused(train.main, *resume, '--arch=mal', '--window_len=4')
    for words in "arch='mac' there, 'mal' asked for", 'segment_len=8 there', '4 asked for':
        assert words in message
    content = checkpoint.load(str(path))
    model_config = content['model_config'] | {'n_layer': 2}
    checkpoint.save(str(path), content | {'model_config': model_config})
    assert 'do not fit the configuration' in refused(sample.main)
    torch.save({'weights': torch.zeros(3)}, path)
    assert 'not a checkpoint of this version' in refused(sample.main)
    for truncated in b'', data[:-1]:
        path.write_bytes(truncated)
        assert 'not a readable checkpoint' in refused(sample.main)
        assert 'not a readable checkpoint' in refused(train.main, *resume)
    assert 'no such checkpoint' in refused(train.main, *resume, '--out_dir=new')


@pytest.mark.parametrize('flags, words', [
    ('--init_from=resume --n_head=3', 'n_head=3'), ('--init_from=auto --n_embd=33', 'n_embd=33'),
    ('--init_from=auto --memory_layers=9', 'outside 0 to n_layer-1=0'),
    ('--init_from=', 'stand alone'), ('--init_from=auto:auto', 'as in auto:gpt2'),
    ('--init_from=auto:resume', 'as in auto:gpt2'),
])
def test_where_a_run_cannot_begin(trained, flags, words):
    """One line, and the run that is already in out_dir is not set aside."""
    assert words in refused(train.main, *RUN, *flags.split())
    assert os.path.exists('out/ckpt.pt') and not os.path.exists('out/earlier-1')


def test_eval_only_leaves_the_log(trained, capsys):
    before = Path('out/log.jsonl').read_text()
    assert train.main([*RUN, '--init_from=resume', '--eval_only']) == 0
    assert 'val loss' in capsys.readouterr().out and Path('out/log.jsonl').read_text() == before


def test_resume_refuses_other_data_and_rows(place):
    assert train.main([*RUN, '--carry_state']) == 0
    resume = [*RUN, '--carry_state', '--init_from=resume']
    message = refused(train.main, *resume, '--batch_size=3')
    assert 'batch_size x gradient_accumulation_steps=2 there, 3 asked for' in message
    Path('b.txt').write_text(TEXT[::-1])
    shutil.rmtree('data/text')
    prepare.main(['text', '--train_path=b.txt', '--tokenizer=char'])
    assert 'other data' in refused(train.main, *resume)


# -- examples


@pytest.mark.slow
def test_examples_run_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = run_script('examples/standalone_memory.py').stdout.splitlines()
    recall = {line[:28].strip(): line[28:].split() for line in lines}  # in per cent
    linear, deep = recall['linear'], recall['two layers, 4 x wide']
    assert linear[0] == deep[0] == '100'  # of 16 pairs
    assert int(linear[8]) < 60 < 90 < int(deep[8])  # of 256 pairs
    for arch in 'mac', 'lmm', 'gpt':
        lines = run_script('examples/long_stream.py', arch, '16384').stdout.splitlines()
        assert len(lines) == 4
        assert lines[2].split()[1] == lines[3].split()[1]  # the state does not grow
    assert 'give an architecture' in run_script('examples/long_stream.py', 'rnn').stderr
