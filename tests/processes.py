"""
Training runs in processes of their own, several of them as torchrun would start them, to be killed at will. They are forked
from a server that has imported torch, so that one starts in a moment.
"""
import functools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time

import torch

import train
from nanotitans import parallel

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.environ['PYTHONPATH'] = os.pathsep.join([HERE, os.path.join(HERE, 'tests'), os.environ.get('PYTHONPATH', '')])
server = multiprocessing.get_context('forkserver')
server.set_forkserver_preload(['processes', 'pytest', 'torch._dynamo'])  # what an optimizer imports, too


def hear_signals():
    """In a process that has just started: what runs the tests, such as nohup, may have had signals ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def work(config, environment, path):
    hear_signals()
    os.environ |= environment
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, 'w', closefd=False), os.fdopen(2, 'w', closefd=False)
    torch.set_num_threads(1)
    torch.compile = functools.partial(torch.compile, backend='aot_eager')  # the tracing and its backward, without the wait
    sys.argv = ['train.py']
    parallel.run(lambda _: train.train(config))


def start(config, world=0):
    """Processes that train; world 0: one without torchrun. What they print is in config.out_dir + '.txt'."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    started = []
    for rank in range(max(world, 1)):
        environment = {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(world), 'MASTER_ADDR': '127.0.0.1',
                       'MASTER_PORT': str(port)} if world else {}
        started.append(server.Process(target=work, args=(config, environment, config.out_dir + '.txt'), daemon=True))
        started[-1].start()
    return started


def finish(started, seconds=600):
    """-> their exit statuses; whatever still runs by then is killed."""
    end = time.monotonic() + seconds
    for process in started:
        process.join(max(end - time.monotonic(), 0.1))
        if process.exitcode is None:
            process.kill()
            process.join()
    return [p.exitcode for p in started]


def run(config, world=0):
    """Train to the end. -> the rows of the log."""
    statuses = finish(start(config, world))
    assert set(statuses) == {0}, (statuses, said(config))
    return log(config)


def kill(started):
    for process in started:
        os.kill(process.pid, signal.SIGKILL) if process.is_alive() else None
    finish(started)


def said(config):
    with open(config.out_dir + '.txt', encoding='utf-8') as f:
        return f.read()


def log(config):
    with open(os.path.join(config.out_dir, 'log.jsonl'), encoding='utf-8') as f:
        return [json.loads(line) for line in f]


def curve(rows):
    """Everything of a log that must not depend on how the run came about."""
    return [(row['step'], key, value) for row in rows for key, value in row.items() if key.endswith('loss')]
