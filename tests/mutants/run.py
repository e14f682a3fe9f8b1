"""
Break the code in random places, one at a time, and see if the tests notice (`make mutants`).

cosmic-ray breaks the code. This script draws the sample, gives each process a clone of the last
commit to work in, and prints the table. mutmut cannot be used: it skips decorated functions, and
model.stream and all evaluations are decorated.
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
    """-> at most `count` mutants, the same for the same code and seed; how many there are in all"""
    session = OUT / 'all.sqlite'
    subprocess.run(['cosmic-ray', 'init', CONFIG, session], cwd=clone, check=True)
    subprocess.run(['cr-filter-operators', session, CONFIG], cwd=clone, check=True)
    with use_db(session) as db:
        items = sorted(db.pending_work_items, key=lambda item: [
            (str(m.module_path), m.operator_name, m.occurrence) for m in item.mutations])
    return random.Random(seed).sample(items, min(count, len(items))), len(items)


def report(sessions):
    """Print the table, and save the mutants that no test noticed as diffs."""
    counts, survivors = {}, []
    for session in sessions:
        with use_db(session) as db:
            for item, result in db.completed_work_items:
                name = str(item.mutations[0].module_path)
                counts.setdefault(name, Counter())[outcome(result)] += 1
                if outcome(result) == 'survived':
                    survivors.append(result.diff)
    print(f"{'':20}" + ''.join(f'{name:>14}' for name in (*OUTCOMES, 'share killed')))
    for name, count in *sorted(counts.items()), ('all', sum(counts.values(), Counter())):
        killed = count['killed'] + count['timed out']
        share = killed / max(count.total() - count['not run'], 1)
        print(f'{name:20}' + ''.join(f'{count[o]:14}' for o in OUTCOMES) + f'{share:14.0%}')
    (OUT / 'survivors.diff').write_text('\n'.join(sorted(survivors)) + '\n')
    print(f"survivors: {OUT / 'survivors.diff'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in ('sample', 300), ('seed', 1), ('jobs', 2):
        parser.add_argument(f'--{name}', type=int, default=default)
    options = parser.parse_args()
    os.environ['PATH'] = os.path.dirname(sys.executable) + os.pathsep + os.environ['PATH']
    os.environ['OMP_NUM_THREADS'] = '1'
    shutil.rmtree(OUT, ignore_errors=True)
    clones = [OUT / f'clone-{i}' for i in range(options.jobs)]
    for clone in clones:
        subprocess.run(['git', 'clone', '-q', HERE.parent.parent, clone], check=True)
    command = [sys.executable, 'tests/mutants/tests.py']
    unbroken = [subprocess.Popen([*command, *list(TESTS)[i::options.jobs]], cwd=clone)
                for i, clone in enumerate(clones)]
    statuses = [process.wait() for process in unbroken]
    if any(statuses):
        sys.exit("the tests fail before anything is broken")
    items, total = sample(clones[0], options.sample, options.seed)
    print(f'{len(items)} of {total} mutants', flush=True)
    sessions = [OUT / f'session-{i}.sqlite' for i in range(options.jobs)]
    for i, session in enumerate(sessions):
        with use_db(session) as db:
            db.add_work_items(items[i::options.jobs])
    running = [subprocess.Popen(['cosmic-ray', 'exec', CONFIG, session], cwd=clone)
               for session, clone in zip(sessions, clones, strict=True)]
    try:
        statuses = [process.wait() for process in running]
    except KeyboardInterrupt:
        statuses = [130]
    report(sessions)
    sys.exit(max(map(abs, statuses)))


if __name__ == '__main__':
    main()
