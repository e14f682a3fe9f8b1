"""
The machine of a benchmark: its name, the time that functions take on it, its highest speed.
"""
import platform
import statistics
import time

import torch


def machine_name(device):
    """The name of the GPU, or else of the CPU."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            return next(line.split(':')[1].strip() for line in f if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def timed(device, function, *args):
    """Seconds until function(*args) has returned and a GPU has finished its work."""
    start = time.perf_counter()
    function(*args)
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def spread(seconds):
    """Median and quartiles of repeated times; of fewer than three, the lowest and the highest."""
    seconds = sorted(seconds)
    low, median, high = seconds[0], statistics.median(seconds), seconds[-1]
    if len(seconds) >= 3:
        low, median, high = statistics.quantiles(seconds, n=4, method='inclusive')
    return {'median': median, 'low': low, 'high': high, 'n': len(seconds)}


def machine_limits(device, dtype):
    """FLOPs a second of a large matrix product, bytes a second of a large copy."""
    n = 8192 if device.type == 'cuda' else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(64 * 2 ** 20, device=device)
    target = torch.empty_like(source)
    product_seconds = min(timed(device, torch.matmul, a, b) for _ in range(5))
    copy_seconds = min(timed(device, target.copy_, source) for _ in range(5))
    return {'flops': 2 * n ** 3 / product_seconds, 'bytes': 2 * source.numel() * 4 / copy_seconds}
