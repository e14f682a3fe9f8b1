"""
Peak memory: of a GPU, of this process, or of a new process for one function.
"""
import concurrent.futures
import contextlib
import ctypes
import gc
import multiprocessing
import sys

import torch


def reset_peak(device):
    """Free unused memory, and where the system can do it, let peak_bytes start again."""
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # give free memory back to the system
        with open('/proc/self/clear_refs', 'w', encoding='ascii') as f:
            f.write('5')  # resets VmHWM


def peak_bytes(device):
    """The most memory in use since reset_peak or the start: of a GPU, or else of this process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        with open('/proc/self/status', encoding='ascii') as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith('VmHWM'))
    except (OSError, StopIteration):
        import resource  # not on Windows
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == 'darwin' else 1024 * peak


def in_new_process(function, *args):
    """function(*args), called in a new process. None if that ran out of memory."""
    spawn = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        try:
            return pool.submit(function, *args).result()
        except (concurrent.futures.process.BrokenProcessPool, torch.OutOfMemoryError):
            return None
