"""
Break a random sample of the code, one place at a time, and see whether the tests notice (`make mutants`).

cosmic-ray breaks the files; here are only the sample, a clone of the last commit for each process, so that the checkout is
never touched, and the table. Not mutmut: it skips decorated functions, and all our evaluations and model.stream are decorated.
"""
import argparse
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from cosmic_ray.work_db import use_db

from tests import TESTS

HERE = Path(__file__).resolve().parent
OUT = HERE.parent.parent / 'out' / 'mutants'
CONFIG = str(HERE / 'cosmic-ray.toml')
OUTCOMES = 'killed', 'timed out', 'survived', 'not run'


def outcome(result):
    if result.output == 'timeout':
        return 'timed out'
    return result.test_outcome.value if result.worker_outcome.value == 'normal' else 'not run'


def sample(clone, count, seed):
    """-> `count` of everything that can be broken in one place, or all; the same for the same code and seed."""
    session = OUT / 'all.sqlite'
    subprocess.run(['cosmic-ray', 'init', CONFIG, session], cwd=clone, check=True)
    subprocess.run(['cr-filter-operators', session, CONFIG], cwd=clone, check=True)
    with use_db(session) as db:
        items = sorted(db.pending_work_items, key=lambda item: [(str(m.module_path), m.operator_name, m.occurrence)
                                                                for m in item.mutations])
    return random.Random(seed).sample(items, min(count, len(items))), len(items)


def report(sessions):
    """The table, and what survived, as diffs."""
    counts, survivors = {}, []
    for session in sessions:
        with use_db(session) as db:
            for item, result in db.completed_work_items:
                name = str(item.mutations[0].module_path)
                counts.setdefault(name, Counter())[outcome(result)] += 1
                if outcome(result) == 'survived':
                    survivors.append(result.diff)
    print(f"{'':20}" + ''.join(f'{name:>14}' for name in (*OUTCOMES, 'share killed')))
    for name, found in *sorted(counts.items()), ('all', sum(counts.values(), Counter())):
        killed, tried = found['killed'] + found['timed out'], found.total() - found['not run']
        print(f'{name:20}' + ''.join(f'{found[o]:14}' for o in OUTCOMES) + f'{killed / max(tried, 1):14.0%}')
    (OUT / 'survivors.diff').write_text('\n'.join(sorted(survivors)) + '\n')
    print(f"survivors: {OUT / 'survivors.diff'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in ('sample', 300), ('seed', 1), ('jobs', 2):
        parser.add_argument(f'--{name}', type=int, default=default)
    asked = parser.parse_args()
    os.environ['PATH'] = os.path.dirname(sys.executable) + os.pathsep + os.environ['PATH']
    os.environ['OMP_NUM_THREADS'] = '1'
    shutil.rmtree(OUT, ignore_errors=True)
    clones = [OUT / f'clone-{i}' for i in range(asked.jobs)]
    for clone in clones:
        subprocess.run(['git', 'clone', '-q', HERE.parent.parent, clone], check=True)
    unbroken = [subprocess.Popen([sys.executable, 'tests/mutants/tests.py', *list(TESTS)[i::asked.jobs]], cwd=clone)
                for i, clone in enumerate(clones)]
    ended = [process.wait() for process in unbroken]
    if any(ended):
        sys.exit("the tests fail before anything is broken")
    items, total = sample(clones[0], asked.sample, asked.seed)
    print(f'{len(items)} of {total} mutants', flush=True)
    sessions = [OUT / f'session-{i}.sqlite' for i in range(asked.jobs)]
    for i, session in enumerate(sessions):
        with use_db(session) as db:
            db.add_work_items(items[i::asked.jobs])
    running = [subprocess.Popen(['cosmic-ray', 'exec', CONFIG, session], cwd=clone)
               for session, clone in zip(sessions, clones, strict=True)]
    try:
        ended = [process.wait() for process in running]
    except KeyboardInterrupt:
        ended = [130]
    report(sessions)
    sys.exit(max(map(abs, ended)))


if __name__ == '__main__':
    main()
