"""What README.md, docs/ and the scripts' own descriptions tell a reader to type is there, is accepted, and runs."""
import ast
import dataclasses
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import typing
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_cli import TEXT, TINY

import model
import prepare
import train
from nanotitans import configurator, option_table

HERE = Path(__file__).resolve().parent.parent
README = HERE / 'README.md'
PAGES = [README, HERE / 'CONTRIBUTING.md', HERE / 'CHANGELOG.md', *sorted(HERE.glob('docs/**/*.md'))]
MODULES = sorted(path for folder in ('.', 'nanotitans', 'examples') for path in HERE.glob(f'{folder}/*.py'))
SCRIPTS = [p for p in MODULES if ast.get_docstring(ast.parse(p.read_text()))]
ADD = {'train.py': TINY, 'eval_context.py': ['--length=1024'], 'sample.py': ['--max_new_tokens=5']}  # what makes them quick


def name(path):
    return str(path.relative_to(HERE))


def blocks(path, language):
    return re.findall(rf'^```{language}\n(.*?)^```', path.read_text(), re.M | re.S)


def outside(path):
    """A page without its blocks."""
    return re.sub(r'^```.*?^```', '', path.read_text(), flags=re.M | re.S)


def commands(text):
    """The words of each command of a shell text, without comments, redirections and what is set in front."""
    for line in text.replace('\\\n', ' ').splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars='|;&<>')
        lexer.whitespace_split = True
        command = []
        for word in [*lexer, ';']:
            if set(word) - set('|;&<>'):
                command.append(word)
                continue
            while command and re.match(r'\w+=|srun$', command[0]):
                command.pop(0)
            if command:
                yield command
            command = []


def shown(path):
    """The commands that a page shows, in blocks and in its lines, or a script in its description."""
    if path.suffix == '.py':
        lines = [line.strip() for line in ast.get_docstring(ast.parse(path.read_text())).replace('\\\n', ' ').splitlines()]
    else:
        yield from (command for block in blocks(path, 'sh') for command in commands(block))
        lines = [' '.join(span.split()) for span in re.findall(r'`([^`]+)`', outside(path))]
    for line in lines:
        if re.match(r'(\w+=\S+ )*(python|torchrun|make|pip) ', line):
            yield from commands(line)


def accept(script, args):
    """As the script would, up to where it begins to work."""
    assert (HERE / script).is_file(), "no such script"
    files, flags = ([a for a in args if a.startswith('-') == dashed and a != '...'] for dashed in (False, True))
    module = None if '/' in script else importlib.import_module(script.removesuffix('.py'))
    classes = [c for c in vars(module).values() if isinstance(c, type) and dataclasses.is_dataclass(c)
               and c.__module__ == module.__name__ and c.__name__.endswith('Config')] if module else []
    asked = [flag for flag in flags if flag not in ('--help', '--print_config')]
    if not classes:
        assert not asked, "takes no options"
        return
    for flag in list(asked):
        option, _, value = flag.lstrip('-').partition('=')
        if re.fullmatch('[A-Z]+', value):  # for the reader to fill in
            configurator.known(option, {f.name for f in dataclasses.fields(classes[0])}, flag)
            asked.remove(flag)
    configurator.load(classes[0], asked + [f for f in files if f.endswith('.py')])
    assert module is not prepare or '--help' in flags or files[0] in prepare.CORPORA, "no such corpus"


def check(path):
    """AssertionError, naming the command, for the first that would be refused."""
    makefile = (HERE / 'Makefile').read_text()
    targets = re.findall(r'^([\w-]+):', makefile, re.M) + re.search(r'^EXPERIMENTS = (.*)', makefile, re.M)[1].split()
    extras = tomllib.loads((HERE / 'pyproject.toml').read_text())['project']['optional-dependencies']
    for program, *args in shown(path):
        script = next((i for i, word in enumerate(args) if word.endswith('.py')), None)
        try:
            if program == 'python' and args[0] == '-m' and args[1].startswith('nanotitans'):
                assert (HERE / (args[1].replace('.', '/') + '.py')).is_file(), "no such module"
            elif program in ('python', 'torchrun') and script is not None:
                accept(args[script], args[script + 1:])
            elif program == 'make':
                assert {a for a in args if '=' not in a} <= set(targets), "no such target"
            elif program == 'pip':
                asked = {e for a in args for e in re.findall(r'(?:^\.|nanotitans)\[(.*)\]', a) for e in e.split(',')}
                assert asked <= set(extras), "no such extra"
        except (AssertionError, configurator.UserError) as error:
            raise AssertionError(f"{path.name}: {shlex.join((program, *args))}: {error}") from None


def test_every_command_would_be_accepted(monkeypatch):
    monkeypatch.chdir(HERE)
    for path in *PAGES, *SCRIPTS:
        check(path)


@pytest.mark.parametrize('line, words', [
    ('python train.py config/none.py', 'no such config file'), ('OMP_NUM_THREADS=1 torchrun --x=1 train.py --zzz=1', 'zzz'),
    ('make demo && python sample.py --top_k=many  # why not', 'top_k must be a value of type int'),
    ('python none.py', 'no such script'), ('python plot.py --x=miles out/a | head', 'x must be one of'),
    ('python prepare.py nothing --check', 'no such corpus'), ('make all', 'no such target'),
    ("pip install -e '.[plots,all]'", 'no such extra'), ('python examples/long_stream.py --fast', 'takes no options'),
    ('python train.py config/stdlib_cpu.py \\\n  --n_layers=N', "unknown option 'n_layers'")])
def test_a_wrong_command_is_found(tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(HERE)
    page = tmp_path / 'page.md'
    for text in f'```sh\nmake demo\n{line}\n```\n', f'Type\n`{line}`.\n'.replace('\\\n', '\n'):
        page.write_text(text)
        with pytest.raises(AssertionError, match=words):
            check(page)


def anchors(path):
    heads = re.findall(r'^#+ (.*)$', outside(path), re.M)
    return {re.sub(r'[^\w\- ]', '', head.lower()).replace(' ', '-') for head in heads}


def test_every_link_leads_somewhere():
    for path in PAGES:
        text = path.read_text()
        for target in re.findall(r'\]\((?!https?:)([^)\s]+)\)', text):
            file, _, anchor = target.partition('#')
            there = path.parent / file if file else path
            assert there.exists(), f"{name(path)}: {target}"
            assert not anchor or anchor in anchors(there), f"{name(path)}: {target}"
        for file in re.findall(r'`((?:\w+/)*\w+\.py)`', text):
            folders = HERE, HERE / 'tests', HERE / 'examples', HERE / 'nanotitans'
            assert any((folder / file).exists() for folder in folders), f"{name(path)}: {file}"


NAMESPACES = {name: importlib.import_module(module) for name, module in (
    *((m, m) for m in ('model', 'memory', 'gpt2', 'train')), ('kernels', 'nanotitans.kernels'), ('deep', 'nanotitans.deep'))}


def resolves(name):
    """Whether a dotted name is one of the code's, from one of its modules or a class in one of them."""
    first, *rest = name.split('.')
    starts = [getattr(m, first) for m in NAMESPACES.values() if hasattr(m, first)]
    for start in [NAMESPACES[first]] if first in NAMESPACES else starts:
        for part in rest:
            start = getattr(start, part, None) or getattr(start, '__annotations__', {}).get(part)
        if start is not None:
            return True
    return False


@pytest.mark.parametrize('page', ['equations', 'memory-rules', 'how-memory-works'])
def test_every_name_is_in_the_code(page):
    text = outside(HERE / 'docs' / f'{page}.md')
    options = {name for c in (train.TrainConfig, model.TitansConfig) for name in typing.get_type_hints(c)}
    choices = {choice for hint in typing.get_type_hints(train.TrainConfig).values() for choice in typing.get_args(hint)}
    methods = {name for m in NAMESPACES.values() for c in vars(m).values() if isinstance(c, type) for name in vars(c)}
    names = set(re.findall(r'`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\(.*?\)|=\w+)?`', text)) - options - choices - methods
    assert not [name for name in sorted(names) if not name.endswith(('.py', '.c', '.md', '.pt')) and not resolves(name)]
    assert not resolves('NeuralMemory.chunk') and not resolves('kernels.fold')


def test_the_table_of_options_is_that_of_the_code():
    assert (HERE / 'docs' / 'options.md').read_text() == option_table.page(), "run python -m nanotitans.option_table"


def test_every_option_says_what_it_is():
    for script in SCRIPTS:
        if script.parent == HERE:
            for c in vars(importlib.import_module(script.stem)).values():
                if isinstance(c, type) and dataclasses.is_dataclass(c) and c.__name__.endswith('Config'):
                    assert set(configurator.comments(c)) >= {f.name for f in dataclasses.fields(c)}, c


def test_every_file_is_in_the_readme():
    named = set(re.findall(r'`(\w+\.py)`', README.read_text()))
    assert {path.name for path in HERE.glob('*.py')} <= named


@pytest.fixture()
def place(tmp_path, monkeypatch):
    """A folder that has all of the project but what it was used for, and book.txt."""
    for path in HERE.iterdir():
        if path.name not in ('out', 'data') and not path.name.startswith('.'):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / 'book.txt').write_text(TEXT * 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['train.py'])
    return tmp_path


@pytest.mark.parametrize('path', [path for path in PAGES if blocks(path, 'python')], ids=name)
def test_every_python_example_runs(path, place, monkeypatch):
    """One after the other, as a reader would, but one layer deep; the reader's own tensors and trained models are made up."""
    build = model.TitansGPT.__init__
    monkeypatch.setattr(model.TitansGPT, '__init__', lambda self, config: build(
        self, dataclasses.replace(config, n_layer=1)))
    space = {'__name__': name(path), 'idx': torch.randint(256, (2, 8)), 'targets': torch.randint(256, (2, 8)),
             **{own: torch.randn(2, 8, 64) for own in ('x', 'more', 'questions')}}
    examples = blocks(path, 'python')
    for out_dir in sorted(set(re.findall(r'\bout/[\w-]+', ''.join(examples)))):
        if not os.path.exists('trained'):
            prepare.main(['text', '--train_path=book.txt', '--tokenizer=byte'])
            train.main(['--dataset=text', *TINY, '--out_dir=trained'])
        shutil.copytree('trained', out_dir)
    with mock.patch.dict(model.BLOCKS), torch.random.fork_rng():
        for text in examples:
            if path == README and 'import ' not in text:
                try:
                    ast.parse(text)
                except SyntaxError:  # what a model has written
                    continue
            exec(compile(text, name(path), 'exec'), space)


def test_the_ten_lines_run(place, capsys):
    """From a text to a sample, in seconds: with small models and few steps, by options added to each line."""
    pytest.importorskip('matplotlib')
    pytest.importorskip('plotext')
    text = blocks(HERE / 'docs' / 'train-your-own.md', 'sh')[0]
    assert len(text.splitlines()) == 10
    for program, *args in commands(text):
        if program != 'python':
            continue
        script, *args = args
        steps = [f'--max_iters={int(a[12:]) // 300}' for a in args if a.startswith('--max_iters=')]
        assert not importlib.import_module(script[:-3]).main([*args, *ADD.get(script, []), *steps])
    said = capsys.readouterr().out
    assert 'step     4/4' in said and 'Once' in said
    assert {'ckpt.pt', 'best.pt', 'log.jsonl', 'loss.png', 'context.json'} <= set(os.listdir('out/book'))


@pytest.mark.parametrize('script, absent', [
    ('plot', 'torch'), ('eval_recall', 'nanotitans.parallel'), ('eval_recall', 'nanotitans.conversation'),
    ('sample', 'nanotitans.parallel')])
def test_a_script_loads_only_what_it_needs(script, absent):
    command = f"import sys, {script}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, '-c', command], cwd=HERE).returncode == 0
