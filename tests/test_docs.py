"""The commands, names, links and examples in README.md, docs/ and docstrings of scripts work."""
import ast
import dataclasses
import importlib
import inspect
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
PAGES = sorted([*HERE.glob('*.md'), *HERE.glob('docs/**/*.md')])
MODULES = sorted(path for folder in ('.', 'nanotitans', 'examples')
                 for path in HERE.glob(f'{folder}/*.py'))
SCRIPTS = [path for path in MODULES if ast.get_docstring(ast.parse(path.read_text()))]
QUICK = {'train.py': TINY, 'eval_context.py': ['--length=1024'],
         'sample.py': ['--max_new_tokens=5']}


def name(path):
    return str(path.relative_to(HERE))


def blocks(path, language):
    return re.findall(rf'^```{language}\n(.*?)^```', path.read_text(), re.M | re.S)


def without_blocks(path):
    return re.sub(r'^```.*?^```', '', path.read_text(), flags=re.M | re.S)


def commands(text):
    """The words of each shell command, without comments, redirections, variables and srun."""
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


def commands_of(path):
    """The commands in the blocks and backticks of a page, or in the docstring of a script."""
    if path.suffix == '.py':
        text = ast.get_docstring(ast.parse(path.read_text())).replace('\\\n', ' ')
        lines = [line.strip() for line in text.splitlines()]
    else:
        for block in blocks(path, 'sh'):
            yield from commands(block)
        lines = [' '.join(code.split()) for code in re.findall(r'`([^`]+)`', without_blocks(path))]
    for line in lines:
        if re.match(r'(\w+=\S+ )*(python|torchrun|make|pip) ', line):
            yield from commands(line)


def configs(module):
    """The config classes that a script defines."""
    return [c for c in vars(module).values() if isinstance(c, type) and dataclasses.is_dataclass(c)
            and c.__module__ == module.__name__ and c.__name__.endswith('Config')]


def check_script(script, args):
    """Parse the arguments as the script does."""
    assert (HERE / script).is_file(), "no such script"
    files = [a for a in args if not a.startswith('-') and a != '...']
    flags = [a for a in args if a.startswith('-')]
    module = None if '/' in script else importlib.import_module(script.removesuffix('.py'))
    classes = configs(module) if module else []
    options = [flag for flag in flags if flag not in ('--help', '--print_config')]
    if not classes:
        assert not options, "takes no options"
        return
    for flag in list(options):
        option, _, value = flag.lstrip('-').partition('=')
        if re.fullmatch('[A-Z]+', value):  # a placeholder that the reader replaces
            names = {f.name for f in dataclasses.fields(classes[0])}
            configurator.check_option_name(option, names, flag)
            options.remove(flag)
    configurator.load(classes[0], options + [f for f in files if f.endswith('.py')])
    if module is prepare:
        assert '--help' in flags or files[0] in prepare.CORPORA, "no such corpus"


def check(path):
    """Raise AssertionError, naming the command, for the first that would be refused."""
    makefile = (HERE / 'Makefile').read_text()
    experiments = re.search(r'^EXPERIMENTS = (.*)', makefile, re.M)[1].split()
    targets = {*re.findall(r'^([\w-]+):', makefile, re.M), *experiments}
    project = tomllib.loads((HERE / 'pyproject.toml').read_text())['project']
    for program, *args in commands_of(path):
        script = next((i for i, word in enumerate(args) if word.endswith('.py')), None)
        try:
            if program == 'python' and args[0] == '-m' and args[1].startswith('nanotitans'):
                assert (HERE / (args[1].replace('.', '/') + '.py')).is_file(), "no such module"
            elif program in ('python', 'torchrun') and script is not None:
                check_script(args[script], args[script + 1:])
            elif program == 'make':
                assert {a for a in args if '=' not in a} <= targets, "no such target"
            elif program == 'pip':
                matches = [re.search(r'(?:^\.|nanotitans)\[(.*)\]', arg) for arg in args]
                extras = {extra for match in matches if match for extra in match[1].split(',')}
                assert extras <= set(project['optional-dependencies']), "no such extra"
        except (AssertionError, configurator.UserError) as error:
            command = shlex.join((program, *args))
            raise AssertionError(f"{path.name}: {command}: {error}") from None


def test_every_command_would_be_accepted(monkeypatch):
    monkeypatch.chdir(HERE)
    for path in *PAGES, *SCRIPTS:
        check(path)


@pytest.mark.parametrize('line, words', [
    ('python train.py config/none.py', 'no such config file'),
    ('OMP_NUM_THREADS=1 torchrun --x=1 train.py --zzz=1', 'zzz'),
    ('make demo && python sample.py --top_k=many  # why not', 'top_k must be a value of type int'),
    ('python none.py', 'no such script'),
    ('python plot.py --x=miles out/a | head', 'x must be one of'),
    ('python prepare.py nothing --check', 'no such corpus'), ('make all', 'no such target'),
    ("pip install -e '.[plots,all]'", 'no such extra'),
    ('python examples/long_stream.py --fast', 'takes no options'),
    ('python train.py config/stdlib_cpu.py \\\n  --n_layers=N', "unknown option 'n_layers'")])
def test_a_wrong_command_is_found(tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(HERE)
    page = tmp_path / 'page.md'
    for text in f'```sh\nmake demo\n{line}\n```\n', f'Type\n`{line}`.\n'.replace('\\\n', '\n'):
        page.write_text(text)
        with pytest.raises(AssertionError, match=words):
            check(page)


def anchors(path):
    heads = re.findall(r'^#+ (.*)$', without_blocks(path), re.M)
    return {re.sub(r'[^\w\- ]', '', head.lower()).replace(' ', '-') for head in heads}


def test_every_link_leads_somewhere():
    folders = HERE, HERE / 'tests', HERE / 'examples', HERE / 'nanotitans'
    for path in PAGES:
        text = path.read_text()
        for link in re.findall(r'\]\((?!https?:)([^)\s]+)\)', text):
            file, _, anchor = link.partition('#')
            target = path.parent / file if file else path
            assert target.exists(), f"{name(path)}: {link}"
            assert not anchor or anchor in anchors(target), f"{name(path)}: {link}"
        for file in re.findall(r'`((?:\w+/)*\w+\.py)`', text):
            assert any((folder / file).exists() for folder in folders), f"{name(path)}: {file}"


NAMESPACES = {name: importlib.import_module(module) for name, module in (
    ('model', 'model'), ('memory', 'memory'), ('gpt2', 'gpt2'), ('train', 'train'),
    ('kernels', 'nanotitans.kernels'), ('deep', 'nanotitans.deep'))}


def resolves(name):
    """Whether a dotted name is in one of the modules, or begins with one."""
    first, *rest = name.split('.')
    starts = [getattr(m, first) for m in NAMESPACES.values() if hasattr(m, first)]
    for value in [NAMESPACES[first]] if first in NAMESPACES else starts:
        for part in rest:
            value = getattr(value, part, None) or getattr(value, '__annotations__', {}).get(part)
        if value is not None:
            return True
    return False


@pytest.mark.parametrize('page', ['equations', 'memory-rules', 'how-memory-works'])
def test_every_name_is_in_the_code(page):
    text = without_blocks(HERE / 'docs' / f'{page}.md')
    options = typing.get_type_hints(train.TrainConfig) | typing.get_type_hints(model.TitansConfig)
    choices = {choice for hint in options.values() for choice in typing.get_args(hint)}
    classes = [c for m in NAMESPACES.values() for c in vars(m).values() if isinstance(c, type)]
    members = {name for c in classes for name in vars(c)}
    members |= set(inspect.signature(model.TitansGPT.forward).parameters)
    names = set(re.findall(r'`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\(.*?\)|=\w+)?`', text))
    assert not [name for name in sorted(names - set(options) - choices - members)
                if not name.endswith(('.py', '.c', '.md', '.pt')) and not resolves(name)]
    assert not resolves('NeuralMemory.chunk') and not resolves('kernels.fold')


def test_the_table_of_options_is_up_to_date():
    table = (HERE / 'docs' / 'options.md').read_text()
    assert table == option_table.page(), "run python -m nanotitans.option_table"


def test_every_option_has_a_comment():
    for script in SCRIPTS:
        if script.parent == HERE:
            for c in configs(importlib.import_module(script.stem)):
                assert set(configurator.comments(c)) >= {f.name for f in dataclasses.fields(c)}, c


def test_every_script_is_in_the_readme():
    named = set(re.findall(r'`(\w+\.py)`', README.read_text()))
    assert {path.name for path in HERE.glob('*.py')} <= named


@pytest.fixture()
def project(tmp_path, monkeypatch):
    """A folder with the project's files, without its data and results, and book.txt."""
    for path in HERE.iterdir():
        if path.name not in ('out', 'data') and not path.name.startswith('.'):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / 'book.txt').write_text(TEXT * 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['train.py'])
    return tmp_path


@pytest.mark.parametrize('path', [path for path in PAGES if blocks(path, 'python')], ids=name)
def test_every_python_example_runs(path, project, monkeypatch):
    """The examples of a page share a namespace. Models have one layer, inputs are random."""
    init = model.TitansGPT.__init__
    monkeypatch.setattr(model.TitansGPT, '__init__', lambda self, config: init(
        self, dataclasses.replace(config, n_layer=1)))
    namespace = {'__name__': name(path),
                 **{variable: torch.randint(256, (2, 8)) for variable in ('idx', 'targets')},
                 **{variable: torch.randn(2, 8, 64) for variable in ('x', 'more', 'questions')}}
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
                except SyntaxError:  # a sample from a model
                    continue
            exec(compile(text, name(path), 'exec'), namespace)


def test_the_ten_lines_of_train_your_own_run(project, capsys):
    """They lead from a text to a sample. Added options keep each run short."""
    pytest.importorskip('matplotlib')
    pytest.importorskip('plotext')
    text = blocks(HERE / 'docs' / 'train-your-own.md', 'sh')[0]
    assert len(text.splitlines()) == 10
    for program, *args in commands(text):
        if program != 'python':
            continue
        script, *args = args
        steps = [f'--max_iters={int(a[12:]) // 300}' for a in args if a.startswith('--max_iters=')]
        main = importlib.import_module(script[:-3]).main
        assert not main([*args, *QUICK.get(script, []), *steps])
    out = capsys.readouterr().out
    assert 'step     4/4' in out and 'Once' in out
    files = {'ckpt.pt', 'best.pt', 'log.jsonl', 'loss.png', 'context.json'}
    assert files <= set(os.listdir('out/book'))


@pytest.mark.parametrize('script, absent', [
    ('plot', 'torch'), ('eval_rows', 'nanotitans.parallel'),
    ('eval_rows', 'nanotitans.conversation'), ('sample', 'nanotitans.parallel')])
def test_a_script_loads_only_what_it_needs(script, absent):
    command = f"import sys, {script}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, '-c', command], cwd=HERE).returncode == 0
