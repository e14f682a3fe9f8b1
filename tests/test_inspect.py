"""The recorder equals the recurrence by hand; inspect_memory.py's page shows its numbers."""
import dataclasses
import html
import json
import math
import os
import re
import shutil

import pytest
import torch
from helpers import in_pieces, refusal, shaken
from reference import mlp, recurrence
from torch.testing import assert_close

import inspect_memory
from model import TitansConfig, TitansGPT
from nanotitans import checkpoint
from nanotitans.recorder import TOKEN, record

SEGMENT, LENGTHS = 8, (5, 1, 10, 5)  # some calls end inside a segment
HOSTILE = ('def f(x):\r\n\treturn "é€😀"\n</script><script>window.hacked = 1; alert(1)</script>\n'
           '<img src=x onerror="hacked=1"> &amp; &#65; @@NAME@@ </div>\x1b[0m\rend\n\n')


def small(arch='mac', vocab_size=256, **options):
    torch.manual_seed(0)
    config = TitansConfig(arch=arch, block_size=16, vocab_size=vocab_size, n_layer=3, n_head=2,
                          n_embd=16, memory_heads=2, segment_len=SEGMENT, window_len=6,
                          memory_layers='0,2', **options)
    return shaken(TitansGPT(config).eval(), 0.2)


def random_tokens(rows=2, length=21):
    return torch.randint(256, (rows, length))


def rms(x):
    return x.square().mean((2, 3)).sqrt()  # (B, T)


def by_hand(memory, x, ends):
    """What the recorder should see of a memory that reads x (B, T, C). -> {name: tensor}"""
    tail, M = memory.init_state(2).tail, memory.init_state(2).weights
    M = [M] if M.dim() == 4 else memory.layers(M)
    q, k, v = memory.mix(memory.shift(memory.c_qkv(x), tail)[0], tail, 4).chunk(3, dim=2)
    gates = memory.gate(x)
    S, surprise, norms, read = [torch.zeros_like(w) for w in M], [], [], []
    for t in range(x.size(1)):
        surprise.append(rms((mlp(M, k[:, t])[0] - v[:, t])[:, None]))
        y, M, S = recurrence(M, S, *(part[:, t:t + 1] for part in (q, k, v, gates)))
        read.append(rms(y))
        if t + 1 in ends:
            norms.append([sum(w.square().sum((1, 2, 3)) for w in part).sqrt() for part in (M, S)])
    norm_M, norm_S = (torch.stack(norm, -1) for norm in zip(*norms, strict=True))
    return {**{name: g.mean(2) for name, g in zip(TOKEN, gates.unbind(2), strict=False)},
            'surprise': torch.cat(surprise, dim=1), 'value': rms(v), 'norm_M': norm_M,
            'norm_S': norm_S, 'read': torch.cat(read, dim=1)}


@pytest.mark.parametrize('arch, depth', [
    ('mac', 1), ('mac', 2), ('mag', 3), ('mal', 2), ('lmm', 1)])
@torch.no_grad()
def test_the_recorder_sees_the_recurrence(arch, depth):
    model = small(arch, memory_depth=depth).double()
    memories = [b.memory for b in model.blocks if b.memory is not None]
    inputs = {memory: [] for memory in memories}
    handles = [m.register_forward_pre_hook(lambda m, args: inputs[m].append(args[0]))
               for m in memories]
    with record(model) as seen:
        _, state = in_pieces(model, random_tokens(), LENGTHS)
    for handle in handles:
        handle.remove()
    assert seen.blocks == [0, 2] and len(seen.ends) == seen.norm_M.size(-1)
    ends_of_segments = [8] if arch == 'mac' else []
    assert seen.ends == sorted([5, 6, 16, 21, *ends_of_segments])
    for i, memory in enumerate(memories):
        with torch.enable_grad():
            want = by_hand(memory, torch.cat(inputs[memory], dim=1), seen.ends)
        for name, value in want.items():
            assert_close(getattr(seen, name)[i].double(), value, rtol=1e-5, atol=1e-6,
                         msg=f"{name} of memory {i}")
    last = torch.stack((seen.norm_M[..., -1], seen.norm_S[..., -1]), -1).mean(1)
    assert_close(last, model.norms(state), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('update_memory', [True, False])
@pytest.mark.parametrize('arch', ['mac', 'lmm'])
@torch.no_grad()
def test_recording_changes_nothing_and_is_the_same_in_pieces(arch, update_memory):
    model, idx = small(arch), random_tokens()
    plain, _ = in_pieces(model, idx, LENGTHS, update_memory=update_memory)
    with record(model) as seen:
        recorded, _ = in_pieces(model, idx, LENGTHS, update_memory=update_memory)
        pieces = {name: getattr(seen, name) for name in TOKEN}
        seen.clear()
        assert not seen.ends and not seen.surprise.numel()
        model(idx, update_memory=update_memory)
    assert torch.equal(plain, recorded) and bool(seen.ends) is update_memory
    for name, value in pieces.items():
        assert value.shape == (2, 2, idx.size(1))
        assert_close(getattr(seen, name), value, rtol=1e-4, atol=1e-5, msg=name)
    if not update_memory and arch == 'lmm':  # block 0 has the same input and another M
        with record(model) as written:
            in_pieces(model, idx, LENGTHS)
        assert torch.equal(written.theta[0], pieces['theta'][0])
        on, off = written.surprise[0], pieces['surprise'][0]
        assert torch.equal(on[:, :1], off[:, :1]) and (on[:, 2:] != off[:, 2:]).all()


@torch.no_grad()
def test_methods_are_restored_and_a_failed_call_is_not_recorded():
    model, idx = small('mag'), random_tokens(1, 6)
    first, last = model.blocks[0].memory, model.blocks[2].memory
    forward = last.forward = last.forward  # on the instance, as compile_step does

    def fail(*_):
        raise RuntimeError('broken off')
    with pytest.raises(RuntimeError, match='broken off'), record(model) as seen:
        model(idx)
        handle = last.register_forward_pre_hook(fail)
        try:
            model(idx)
        finally:
            handle.remove()
            assert seen.surprise.shape == (2, 1, 6)
            model(idx)
            assert seen.surprise.shape == (2, 1, 12)
    replaced = {'recurrence', 'in_one_call', 'forward'}
    assert not replaced & set(vars(first)) and replaced & set(vars(last)) == {'forward'}
    assert vars(last)['forward'] is forward
    assert not model._forward_hooks and not model._forward_pre_hooks
    with pytest.raises(ValueError, match='without memory'), record(small('gpt')):
        pass


# -- the page


def save(model, tokenizer, folder='out'):
    os.makedirs(folder, exist_ok=True)
    checkpoint.save(os.path.join(folder, 'ckpt.pt'), {
        'step': 1, 'best_val_loss': 1.0, 'model_config': dataclasses.asdict(model.config),
        'train_config': {}, 'provenance': {}, 'tokenizer': tokenizer, 'model': model.state_dict(),
        'optimizer': {}})


@pytest.fixture()
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(small(), {'kind': 'byte'})
    return tmp_path


def inspect(*argv):
    return inspect_memory.main(['--out_dir=out', '--device=cpu', '--png=False', *argv])


def page_data(page):
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(data[1])


@pytest.mark.parametrize('arch', ['mac', 'lmm'])
def test_the_page_has_the_recorders_numbers_and_the_text(workspace, arch):
    save(small(arch), {'kind': 'byte'})
    (workspace / 'a<b>&.txt').write_bytes(HOSTILE.encode())
    assert inspect('--text=a<b>&.txt') == 0
    page = (workspace / 'out/memory.html').read_bytes().decode()
    shown, raw = page_data(page), json.loads((workspace / 'out/memory_tokens.json').read_text())
    model, idx = small(arch), torch.tensor([list(HOSTILE.encode())])
    T = idx.size(1) - 1
    with torch.no_grad(), record(model) as seen:
        _, loss, _ = model(idx[:, :-1], idx[:, 1:])
        _, loss_off, _ = model(idx[:, :-1], idx[:, 1:], update_memory=False)
    for name in TOKEN:
        want = getattr(seen, name)[:, 0, :T]
        for numbers, rtol in (raw, 1e-4), (shown, 6e-3):
            got = torch.tensor(numbers[name], dtype=want.dtype)[:, :T]
            assert_close(got, want, rtol=rtol, atol=1e-6, msg=name)
    assert shown['loss_off'][1:] == pytest.approx(raw['loss_off'][1:], rel=0, abs=1e-4)
    assert raw['loss'][0] is raw['loss_off'][0] is shown['loss'][0] is None
    assert raw['tokens'] == idx[0].tolist()
    for name, want in ('loss', loss), ('loss_off', loss_off):
        assert math.isclose(sum(raw[name][1:]) / T, want.item(), rel_tol=1e-5)
        assert f'<dd>{want.item():.3f}<' in page
    text = re.search(r'<div id="text"[^>]*>(.*?)</div>', page, re.DOTALL)[1]
    segments = math.ceil((T + 1) / SEGMENT) if arch == 'mac' else 0
    assert len(re.findall('<b data-n=', text)) == segments
    assert html.unescape(re.sub(r'<[^>]*>', '', text)) == HOSTILE
    assert '<title>a&lt;b&gt;&amp;.txt' in page
    sizes = [int(n or 1) for n in re.findall(r'<i(?: class=\w)?(?: data-n=(\d))?>', text)]
    assert sum(sizes) == T + 1 and set(sizes) == {1, 2, 3, 4}  # bytes of the characters


def test_curves_by_windows():
    content = {'tokens': [0] * 10, 'ends': [3, 4, 8, 10], 'norm_M': [[1, 2, 3, 4]],
               'norm_S': [[0, 0, 0, 5]], 'read': [list(range(10))], 'surprise': [[1] * 10],
               'loss': [None] + [1] * 9, 'loss_off': [None] + [2] * 9}
    ends, curves = inspect_memory.windows(content, 4)
    assert ends.tolist() == [4, 8, 10]
    for name, want in (('|M|', [2, 3, 4]), ('|S|', [0, 0, 5]), ('read', [1.5, 5.5, 8.5]),
                       ('nats gained', [1, 1, 1])):
        assert curves[name].tolist() == [want]


def test_a_file_name_that_is_not_utf8_is_shown(workspace):
    name = os.fsdecode(b'a\xff.txt')
    (workspace / name).write_text('some text')
    assert inspect(f'--text={name}') == 0
    page = (workspace / 'out' / 'memory.html').read_text(encoding='utf-8')
    assert '<title>a\ufffd.txt' in page


def test_a_long_text_is_cut_and_figures_are_drawn(workspace, capsys):
    pytest.importorskip('matplotlib')
    (workspace / 'a.txt').write_text('ab' * 40 + 'é')
    assert inspect('--text=a.txt', '--max_tokens=20', '--png', '--html=page.html') == 0
    assert 'a.txt: the first 20 tokens' in capsys.readouterr().err
    assert len(page_data((workspace / 'page.html').read_text())['loss']) == 20
    for name in 'memory_text.png', 'memory_norms.png':
        assert (workspace / 'out' / name).read_bytes()[:4] == b'\x89PNG'
    assert inspect('--text=a.txt', '--max_tokens=82') == 0
    assert 'the first' not in capsys.readouterr().err
    assert not [name for name in os.listdir('out') if name.endswith('.partial')]


@pytest.mark.parametrize('argv, words', [
    ('', ('text is missing', '--text=FILE')),
    ('--text=none.txt', ('none.txt: No such file',)),
    ('--text=out', ('out: Is a directory',)),
    ('--text=empty', ('empty: the text is empty',)),
    ('--text=binary', ('binary: the text is binary', 'zero byte at 2')),
    ('--text=latin', ('latin: the text is not UTF-8 text (byte 3)',)),
    ('--text=latin --out_dir=chars', ('latin: the text is not UTF-8 text (byte 3)',)),
    ('--text=good --out_dir=chars', ("good: the tokenizer lacks 'é'", 'character 3')),
    ('--text=good --out_dir=gpt', ('ckpt.pt: a model without memory', "arch='gpt'")),
    ('--text=good --out_dir=none', ('no such checkpoint',)),
    ('--text=good --max_tokens=1', ('max_tokens=1', 'at least 2')),
    ('--text=good --html=none/page.html', ('cannot write none/page.html',)),
    ('--text=good --html=out/ckpt.pt', ('ends in .html',)),
])
def test_wrong_input_is_refused(workspace, argv, words):
    for name, content in (('empty', b''), ('binary', b'ab\0c'), ('latin', b'caf\xe9 au lait'),
                          ('good', 'abé'.encode())):
        (workspace / name).write_bytes(content)
    save(small(vocab_size=3), {'kind': 'char', 'chars': 'abc'}, 'chars')
    save(small('gpt'), {'kind': 'byte'}, 'gpt')
    with refusal(*words):
        inspect(*argv.split())
    for folder in 'out', 'chars', 'gpt':
        assert os.listdir(folder) == ['ckpt.pt']


@pytest.fixture()
def browser():
    pytest.importorskip('selenium')
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService
    paths = map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))
    path = next(filter(None, paths), None)
    if not path or not shutil.which('chromedriver'):
        pytest.skip('no chromium or no chromedriver')
    options = ChromeOptions()
    options.binary_location = path
    for flag in '--headless=new', '--no-sandbox', '--disable-gpu', '--window-size=1400,1000':
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    driver = Chrome(options=options, service=ChromeService(shutil.which('chromedriver')))
    yield driver
    driver.quit()


def test_in_a_browser(workspace, browser):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select
    (workspace / 'a.txt').write_bytes(HOSTILE.encode())
    assert inspect('--text=a.txt') == 0
    raw = json.loads((workspace / 'out/memory_tokens.json').read_text())

    def element(name):
        return browser.find_element(By.ID, name)

    def colours():
        return browser.execute_script("return cells.map(x => getComputedStyle(x).background)")

    def background():
        return browser.execute_script('return getComputedStyle(document.body).backgroundColor')
    browser.get(f'file://{workspace}/out/memory.html')
    text, panel = element('text'), element('panel')
    assert text.get_property('textContent') == HOSTILE
    assert browser.execute_script('return window.hacked') is None
    ActionChains(browser).move_to_element(text.find_elements(By.TAG_NAME, 'i')[5]).perform()
    loss, off, won = (float(x.text) for x in panel.find_elements(By.TAG_NAME, 'dd'))
    assert abs(loss - raw['loss'][5]) < 6e-4 and abs(off - raw['loss_off'][5]) < 6e-4
    assert abs(won - (raw['loss_off'][5] - raw['loss'][5])) < 7e-4
    row = panel.find_elements(By.TAG_NAME, 'tr')[2].text.split()  # of block 2
    assert row[0] == '2'
    names = 'theta', 'eta', 'alpha', 'surprise', 'read'
    for number, name in zip((*row[1:5], row[6]), names, strict=True):
        assert math.isclose(float(number), raw[name][1][5], rel_tol=0.06), name
    assert 'token 6 of' in panel.text and 'segment 1' in panel.text
    text.send_keys(Keys.ARROW_RIGHT)
    assert 'token 7 of' in panel.text
    seen = [colours()]
    for select, value in ('by', 'alpha'), ('by', 'won'), ('by', 'surprise'), ('layer', '1'):
        Select(element(select)).select_by_value(value)
        seen.append(colours())
    assert seen[0] == seen[3] and seen[0] != seen[1] != seen[2] != seen[0] != seen[4]
    before = background()
    element('theme').click()
    assert background() != before
    assert browser.get_log('browser') == []
