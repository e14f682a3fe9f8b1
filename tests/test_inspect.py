"""recorder.py against the recurrence by hand; inspect_memory.py: the page's numbers and text, what it refuses; in a browser."""
import dataclasses
import html
import json
import math
import os
import re
import shutil

import pytest
import torch
from reference import mlp, recurrence

import inspect_memory
from model import TitansConfig, TitansGPT
from nanotitans import checkpoint
from nanotitans.configurator import UserError
from nanotitans.recorder import TOKEN, record

SEGMENT, LENGTHS = 8, (5, 1, 10, 5)  # calls that end inside a segment, and with one
HOSTILE = ('def f(x):\r\n\treturn "é€😀"\n</script><script>window.hacked = 1; alert(1)</script>\n<img src=x onerror="hacked=1">'
           ' &amp; &#65; @@NAME@@ </div>\x1b[0m\rend\n\n')


def small(arch='mac', vocab_size=256, **options):
    torch.manual_seed(0)
    config = TitansConfig(arch=arch, block_size=16, vocab_size=vocab_size, n_layer=3, n_head=2, n_embd=16, memory_heads=2,
                          segment_len=SEGMENT, window_len=6, **{'memory_layers': '0,2', **options})
    model = TitansGPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def read(model, idx, lengths, **options):
    state, out = None, []
    with torch.no_grad():
        for piece in idx.split(lengths, dim=1):
            logits, _, state = model(piece, piece, state, **options)
            out.append(logits)
    return torch.cat(out, dim=1), state


def rms(x):
    return x.square().mean((2, 3)).sqrt()  # (B, T)


@pytest.mark.parametrize('arch, depth', [('mac', 1), ('mac', 2), ('mag', 3), ('mal', 2), ('lmm', 1)])
def test_the_recorder_saw_the_recurrence(arch, depth):
    model = small(arch, memory_depth=depth).double()
    idx = torch.randint(256, (2, sum(LENGTHS)))
    memories, came = [b.memory for b in model.blocks if b.memory is not None], {}
    handles = [m.register_forward_pre_hook(lambda m, args: came.setdefault(m, []).append(args[0])) for m in memories]
    with record(model) as seen:
        _, state = read(model, idx, LENGTHS)
    for handle in handles:
        handle.remove()
    assert seen.blocks == [0, 2] and len(seen.ends) == seen.norm_M.size(-1)
    assert seen.ends == ([5, 6, 8, 16, 21] if arch == 'mac' else [5, 6, 16, 21])  # where segments end, and calls
    for i, memory in enumerate(memories):
        x = torch.cat(came[memory], dim=1)
        tail = memory.init_state(2).tail
        q, k, v = memory.mix(memory.shift(memory.c_qkv(x), tail)[0], tail, 4).chunk(3, dim=2)
        gates, M = memory.gate(x), [memory.init_state(2).weights] if depth == 1 else memory.layers(memory.init_state(2).weights)
        S, surprise, norms, y = [torch.zeros_like(w) for w in M], [], [], []
        for at in range(idx.size(1)):
            surprise.append(rms((mlp(M, k[:, at])[0] - v[:, at])[:, None]))
            read_, M, S = recurrence(M, S, *(p[:, at:at + 1] for p in (q, k, v, gates)))
            y.append(rms(read_))
            if at + 1 in seen.ends:
                norms.append(torch.stack([sum(w.square().sum((1, 2, 3)) for w in part).sqrt() for part in (M, S)]))
        want = {**{name: g.mean(2) for name, g in zip(TOKEN, gates.unbind(2), strict=False)},
                'surprise': torch.cat(surprise, dim=1), 'value': rms(v), 'read': torch.cat(y, dim=1),
                'norm_M': torch.stack(norms, -1)[0], 'norm_S': torch.stack(norms, -1)[1]}
        for name, value in want.items():
            torch.testing.assert_close(getattr(seen, name)[i].double(), value, rtol=1e-5, atol=1e-6, msg=f"{name} of layer {i}")
    last = torch.stack((seen.norm_M[..., -1], seen.norm_S[..., -1]), -1).mean(1)
    torch.testing.assert_close(last, model.norms(state), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('update_memory', [True, False])
@pytest.mark.parametrize('arch', ['mac', 'lmm'])
def test_recording_changes_nothing_and_pieces_are_the_whole(arch, update_memory):
    model = small(arch)
    idx = torch.randint(256, (2, sum(LENGTHS)))
    plain, _ = read(model, idx, LENGTHS, update_memory=update_memory)
    with record(model) as seen:
        recorded, _ = read(model, idx, LENGTHS, update_memory=update_memory)
        pieces = {name: getattr(seen, name) for name in TOKEN}
        seen.clear()
        assert not seen.ends and not seen.surprise.numel()
        read(model, idx, idx.size(1), update_memory=update_memory)
    assert torch.equal(plain, recorded) and bool(seen.ends) is update_memory
    for name, value in pieces.items():
        assert value.shape == (2, 2, idx.size(1))
        torch.testing.assert_close(getattr(seen, name), value, rtol=1e-4, atol=1e-5, msg=name)
    if not update_memory and arch == 'lmm':  # the first block has the same input: only M stands still
        with record(model) as on:
            read(model, idx, LENGTHS)
        assert torch.equal(on.theta[0], pieces['theta'][0]) and torch.equal(on.surprise[0, :, :1], pieces['surprise'][0, :, :1])
        assert (on.surprise[0, :, 2:] != pieces['surprise'][0, :, 2:]).all()


def test_the_methods_come_back_and_a_broken_call_does_not_count():
    model = small('mag')
    first, last = model.blocks[0].memory, model.blocks[2].memory
    kept = last.forward = last.forward  # as compile_step puts it there
    idx = torch.randint(256, (1, 6))
    with pytest.raises(RuntimeError, match='broken off'), record(model) as seen:
        read(model, idx, 6)
        handle = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError('broken off')))
        try:
            read(model, idx, 6)
        finally:
            handle.remove()
            assert seen.surprise.shape == (2, 1, 6)
            read(model, idx, 6)
            assert seen.surprise.shape == (2, 1, 12)
    put = {'recurrence', 'in_one_call', 'forward'}
    assert not put & set(vars(first)) and put & set(vars(last)) == {'forward'} and vars(last)['forward'] is kept
    assert not model._forward_hooks and not model._forward_pre_hooks
    with pytest.raises(ValueError, match='without memory'), record(small('gpt')):
        pass


# -- the page


def save(model, tokenizer, folder='out'):
    os.makedirs(folder, exist_ok=True)
    checkpoint.save(os.path.join(folder, 'ckpt.pt'), {
        'step': 1, 'best_val_loss': 1.0, 'model_config': dataclasses.asdict(model.config), 'train_config': {}, 'provenance': {},
        'tokenizer': tokenizer, 'model': model.state_dict(), 'optimizer': {}})


@pytest.fixture()
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(small(), {'kind': 'byte'})
    return tmp_path


def inspect(*argv):
    return inspect_memory.main(['--out_dir=out', '--device=cpu', '--png=False', *argv])


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


@pytest.mark.parametrize('arch', ['mac', 'lmm'])
def test_the_page_has_the_recorders_numbers_and_the_text(place, arch):
    save(small(arch), {'kind': 'byte'})
    (place / 'a<b>&.txt').write_bytes(HOSTILE.encode())
    assert inspect('--text=a<b>&.txt') == 0
    with open('out/memory.html', encoding='utf-8', newline='') as f:
        page = f.read()
    shown, raw = data_of(page), json.loads((place / 'out/memory_tokens.json').read_text())
    model, idx = small(arch), torch.tensor([list(HOSTILE.encode())])
    with torch.no_grad(), record(model) as seen:
        _, loss, _ = model(idx[:, :-1], idx[:, 1:])
        _, off, _ = model(idx[:, :-1], idx[:, 1:], update_memory=False)
    T = idx.size(1) - 1
    for name in TOKEN:
        want = getattr(seen, name)[:, 0, :T]
        torch.testing.assert_close(torch.tensor(raw[name])[:, :T], want, rtol=1e-4, atol=1e-6, msg=name)
        torch.testing.assert_close(torch.tensor(shown[name], dtype=want.dtype)[:, :T], want, rtol=6e-3, atol=1e-6, msg=name)
    torch.testing.assert_close(torch.tensor(shown['loss_off'][1:]), torch.tensor(raw['loss_off'][1:]), rtol=0, atol=1e-4)
    assert raw['loss'][0] is raw['loss_off'][0] is shown['loss'][0] is None and raw['tokens'] == idx[0].tolist()
    for name, want in ('loss', loss), ('loss_off', off):
        assert math.isclose(sum(raw[name][1:]) / T, want.item(), rel_tol=1e-5)
        assert f'<dd>{want.item():.3f}<' in page
    text = re.search(r'<div id="text"[^>]*>(.*?)</div>', page, re.DOTALL)[1]
    assert len(re.findall('<b data-n=', text)) == (math.ceil((T + 1) / SEGMENT) if arch == 'mac' else 0)
    assert html.unescape(re.sub(r'<[^>]*>', '', text)) == HOSTILE and '<title>a&lt;b&gt;&amp;.txt' in page
    sizes = [int(n or 1) for n in re.findall(r'<i(?: class=\w)?(?: data-n=(\d))?>', text)]
    assert sum(sizes) == T + 1 and set(sizes) == {1, 2, 3, 4}  # letters of up to four bytes, each shown once


def test_curves_by_windows():
    content = {'tokens': [0] * 10, 'ends': [3, 4, 8, 10], 'norm_M': [[1, 2, 3, 4]], 'norm_S': [[0, 0, 0, 5]],
               'read': [list(range(10))], 'surprise': [[1] * 10], 'loss': [None] + [1] * 9, 'loss_off': [None] + [2] * 9}
    ends, curves = inspect_memory.windows(content, 4)
    assert ends.tolist() == [4, 8, 10] and curves['|M|'].tolist() == [[2, 3, 4]] and curves['|S|'].tolist() == [[0, 0, 5]]
    assert curves['read'].tolist() == [[1.5, 5.5, 8.5]] and curves['nats won'].tolist() == [[1, 1, 1]]


def test_a_name_that_is_no_text_is_shown(place):
    (place / os.fsdecode(b'a\xff.txt')).write_text('some text')
    assert inspect('--text=' + os.fsdecode(b'a\xff.txt')) == 0
    assert '<title>a\ufffd.txt' in (place / 'out' / 'memory.html').read_text(encoding='utf-8')


def test_a_long_text_is_cut_and_pictures_are_drawn(place, capsys):
    pytest.importorskip('matplotlib')
    (place / 'a.txt').write_text('ab' * 40 + 'é')
    assert inspect('--text=a.txt', '--max_tokens=20', '--png', '--html=page.html') == 0
    said = capsys.readouterr()
    assert 'a.txt: the first 20 tokens' in said.err and len(data_of((place / 'page.html').read_text())['loss']) == 20
    for name in 'memory_text.png', 'memory_norms.png':
        assert (place / 'out' / name).read_bytes()[:4] == b'\x89PNG'
    assert inspect('--text=a.txt', '--max_tokens=82') == 0 and 'the first' not in capsys.readouterr().err
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
def test_what_is_refused(place, argv, words):
    for name, content in ('empty', b''), ('binary', b'ab\0c'), ('latin', b'caf\xe9 au lait'), ('good', 'abé'.encode()):
        (place / name).write_bytes(content)
    save(small(vocab_size=3), {'kind': 'char', 'chars': 'abc'}, 'chars')
    save(small('gpt'), {'kind': 'byte'}, 'gpt')
    with pytest.raises(UserError) as error:
        inspect(*argv.split())
    assert all(word in str(error.value) for word in words) and '\n' not in str(error.value), error.value
    assert {name for folder in ('out', 'chars', 'gpt') for name in os.listdir(folder)} == {'ckpt.pt'}


def test_in_a_browser(place):
    pytest.importorskip('selenium')
    from selenium.webdriver import ActionChains, Chrome, ChromeOptions, ChromeService
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select
    browser = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not browser or not shutil.which('chromedriver'):
        pytest.skip('no chromium or no chromedriver')
    (place / 'a.txt').write_bytes(HOSTILE.encode())
    assert inspect('--text=a.txt') == 0
    raw = json.loads((place / 'out/memory_tokens.json').read_text())
    options = ChromeOptions()
    options.binary_location = browser
    for flag in '--headless=new', '--no-sandbox', '--disable-gpu', '--window-size=1400,1000':
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    driver = Chrome(options=options, service=ChromeService(shutil.which('chromedriver')))
    try:
        driver.get(f'file://{place}/out/memory.html')
        text, panel = (driver.find_element(By.ID, name) for name in ('text', 'panel'))
        assert text.get_property('textContent') == HOSTILE and driver.execute_script('return window.hacked') is None
        cells = text.find_elements(By.TAG_NAME, 'i')

        def colours():
            return driver.execute_script("return cells.map(x => getComputedStyle(x).background)")

        ActionChains(driver).move_to_element(cells[5]).perform()
        row = panel.find_elements(By.TAG_NAME, 'tr')[2].text.split()  # of block 2
        loss, off, won = (float(x.text) for x in panel.find_elements(By.TAG_NAME, 'dd'))
        assert abs(loss - raw['loss'][5]) < 6e-4 and abs(off - raw['loss_off'][5]) < 6e-4 and row[0] == '2'
        assert abs(won - (raw['loss_off'][5] - raw['loss'][5])) < 7e-4
        for got, name in zip((*row[1:5], row[6]), ('theta', 'eta', 'alpha', 'surprise', 'read'), strict=True):
            assert math.isclose(float(got), raw[name][1][5], rel_tol=0.06), name
        assert 'token 6 of' in panel.text and 'segment 1' in panel.text
        text.send_keys(Keys.ARROW_RIGHT)
        assert 'token 7 of' in panel.text
        seen = [colours()]
        for name in 'alpha', 'won', 'surprise':
            Select(driver.find_element(By.ID, 'by')).select_by_value(name)
            seen.append(colours())
        Select(driver.find_element(By.ID, 'layer')).select_by_value('1')
        seen.append(colours())
        assert seen[0] == seen[3] and seen[0] != seen[1] != seen[2] != seen[0] != seen[4]

        def paper():
            return driver.execute_script('return getComputedStyle(document.body).backgroundColor')
        before = paper()
        driver.find_element(By.ID, 'theme').click()
        assert paper() != before
        assert driver.get_log('browser') == []
    finally:
        driver.quit()
