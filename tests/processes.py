"""
Training runs in child processes, one or (as torchrun starts them) several, for tests that signal or
kill them. They are forked from a server that has already imported torch, so each starts at once.
"""
import functools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time

import numpy as np
import torch

import train
from nanotitans import parallel

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATHS = [HERE, os.path.join(HERE, 'tests'), os.environ.get('PYTHONPATH', '')]
os.environ['PYTHONPATH'] = os.pathsep.join(PATHS)
server = multiprocessing.get_context('forkserver')
server.set_forkserver_preload(['processes', 'pytest', 'torch._dynamo'])  # optimizers import _dynamo


def hear_signals():
    """In a new process: handle signals that the parent of the tests (such as nohup) had ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def work(config, environment, path):
    """What a process runs: train, with stdout and stderr appended to the file at path."""
    hear_signals()
    os.environ |= environment
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, 'w', closefd=False), os.fdopen(2, 'w', closefd=False)
    torch.set_num_threads(1)
    # traces forward and backward, but does not wait for compiled code
    torch.compile = functools.partial(torch.compile, backend='aot_eager')
    sys.argv = ['train.py']
    parallel.run(lambda _: train.train(config))


def start(config, world=0):
    """-> a list of processes that train: `world` of them, or one without torchrun if world is 0."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    started = []
    for rank in range(max(world, 1)):
        environment = {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(world),
                       'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)} if world else {}
        arguments = (config, environment, config.out_dir + '.txt')
        started.append(server.Process(target=work, args=arguments, daemon=True))
        started[-1].start()
    return started


def finish(started, seconds=600):
    """-> the exit statuses; a process that still runs after this time is killed."""
    deadline = time.monotonic() + seconds
    for process in started:
        process.join(max(deadline - time.monotonic(), 0.1))
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def run(config, world=0):
    """Train to the end. -> the rows of the log."""
    statuses = finish(start(config, world))
    assert set(statuses) == {0}, (statuses, output(config))
    return log(config)


def kill(started):
    for process in started:
        process.kill()
    finish(started)


def output(config):
    """What the processes of a run have printed."""
    with open(config.out_dir + '.txt', encoding='utf-8') as f:
        return f.read()


def log(config, speed=True):
    """-> the rows of the log; speed=False: without what differs from one run to the next."""
    with open(os.path.join(config.out_dir, 'log.jsonl'), encoding='utf-8') as f:
        rows = [json.loads(line) for line in f]
    return [{key: row[key] for key in row if speed or key != 'tokens_per_s'} for row in rows]


def curve(rows):
    """-> (step, key, value) of every loss in a log. No number of processes may change them."""
    return [(row['step'], key, row[key]) for row in rows for key in row if key.endswith('loss')]


def assert_close(curve_a, curve_b, rtol):
    assert [point[:2] for point in curve_a] == [point[:2] for point in curve_b]
    a, b = ([point[2] for point in points] for points in (curve_a, curve_b))
    np.testing.assert_allclose(a, b, rtol=rtol)
