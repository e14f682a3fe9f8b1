"""
The hardware and the processes of a run: its device, and the processes that torchrun started.

The processes share the rows of the global batch, so a step learns from the same rows whatever the
number of processes.
"""
import itertools
import math
import os
import re
import sys
import traceback
import warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from nanotitans import configurator
from nanotitans.configurator import UserError
from nanotitans.device import pick_device

BYTES_A_PARAMETER = 16  # weight, gradient and AdamW's two moments, in float32


class Process:
    """This process among those that torchrun started. Without torchrun it is rank 0 of 1."""

    def __init__(self, device):
        self.launched = 'WORLD_SIZE' in os.environ
        self.world = int(os.environ.get('WORLD_SIZE', 1))
        self.rank = int(os.environ.get('RANK', 0))
        self.main = self.rank == 0
        self.restarts = int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', 0))
        self.device = torch.device(pick_device(device))
        if self.launched:
            if not {'RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'} <= set(os.environ):
                raise UserError("WORLD_SIZE is set, but not the other variables of torchrun; start "
                                "several processes with torchrun")
            self.take_device()
            backend = 'cpu:gloo,cuda:nccl' if self.device.type == 'cuda' else 'gloo'
            dist.init_process_group(backend, store=self.store(), world_size=self.world,
                                    rank=self.rank)

    def take_device(self):
        """Take this process's GPU. UserError if it has none, or the device cannot be shared."""
        if self.device.type == 'cuda':
            local_rank, gpus = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
            if local_rank >= gpus:
                raise UserError(f"process {local_rank} of this machine has no GPU of its own; give "
                                f"--nproc_per_node={gpus}")
            self.device = torch.device('cuda', local_rank)
            torch.cuda.set_device(self.device)
        elif self.device.type != 'cpu':
            raise UserError(f"device='{self.device.type}' cannot be shared by processes; give "
                            "--device=cpu, or no torchrun")

    def store(self):
        """
        The store where the processes find each other's addresses; None: PyTorch's default. If
        torchrun restarts the processes, the store that it shares with them still has the addresses
        of dead ones (pytorch/pytorch issue 135712), so the keys get the number of the restart as a
        prefix. Only on a single node do all processes agree on that number.
        """
        shared = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'
        if not shared or not self.restarts:
            return None
        if os.environ['GROUP_WORLD_SIZE'] != '1':
            raise UserError("restarts over several nodes need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
                            "in torchrun's environment: export it, or give --max-restarts=0")
        store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), self.world,
                              is_master=False)
        return dist.PrefixStore(f"start_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)

    # -- the global batch

    def share(self, rows, max_rows):
        """
        This process's part of `rows` rows, as slices of at most max_rows rows each. Every process
        gets the same number of slices, since under FSDP all have to take the same steps. If the
        rows cannot be divided evenly, slices differ by a row, and some may be empty.
        """
        if rows < self.world:
            raise UserError(f"{self.world} processes cannot share out {rows} rows, batch_size "
                            "times gradient_accumulation_steps; raise one of them")
        first, last = (rows * r // self.world for r in (self.rank, self.rank + 1))
        n = math.ceil(math.ceil(rows / self.world) / max_rows)
        cuts = [first + (last - first) * i // n for i in range(n + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(cuts)]

    def sum(self, *numbers):
        """The sum of each number over the processes, as a list."""
        if self.world == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, *flags):
        """For each flag, whether it is true in any process. All processes get the same answer."""
        return [n > 0 for n in self.sum(*(int(bool(f)) for f in flags))]

    def on_main(self, act, *args):
        """Call act on rank 0 only. If it raises UserError, every process ends; none waits."""
        problem = None
        if self.main:
            try:
                act(*args)
            except UserError as error:
                problem = error
        if self.any(problem)[0]:
            raise problem or SystemExit(1)  # only rank 0 has the error, and prints it

    def gather(self, value):
        """The values of all processes as a list on rank 0; None on the others."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.main else None
        dist.gather_object(value, values)
        return values

    # -- the model

    def choose_parallel(self, parallel, model):
        """
        -> 'none', 'ddp' or 'fsdp'. 'auto' takes fsdp if weights, gradients and AdamW's moments need
        more than half of a GPU's memory.
        """
        if not self.launched:
            if parallel == 'fsdp':
                raise UserError("parallel='fsdp' needs torchrun: "
                                "torchrun --standalone --nproc_per_node=N train.py ...")
            return 'none'
        if parallel != 'auto':
            return parallel
        if self.device.type != 'cuda':
            return 'ddp'
        size = BYTES_A_PARAMETER * sum(p.numel() for p in model.parameters())
        memory = torch.cuda.get_device_properties(self.device).total_memory
        return 'fsdp' if size > memory / 2 else 'ddp'

    def shard(self, model):
        """
        Shard the parameters over the processes with FSDP2. They become DTensors, and a block's are
        gathered only while it runs. (But each GPU keeps autocast's bfloat16 copies of them for the
        backward, 2 bytes a parameter.)
        """
        # about in-place changes of a view, of which the model has none
        warnings.filterwarnings('ignore', 'FSDP2-wrapped module .* returned a view')
        mesh = init_device_mesh(self.device.type, (self.world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def replicate(self, model, unused):
        """Wrap the model in DDP. unused: whether some parameters get no gradient."""
        return DistributedDataParallel(model, find_unused_parameters=unused)


def run(main):
    """
    configurator.run for a script that torchrun may have started. A process of torchrun ends by
    os._exit: Python's normal exit would destroy the process group while gloo's threads still run.
    That aborts or, if these threads wait for the interpreter, hangs.
    """
    if 'WORLD_SIZE' not in os.environ:
        configurator.run(main)
    status = 1
    try:
        configurator.run(main)
    except SystemExit as end:
        status = end.code or 0  # None, too, is success
    except RuntimeError as error:
        if re.search('gloo|NCCL|Connection (closed|reset)', str(error)):
            script, reason = os.path.basename(sys.argv[0]), str(error).splitlines()[0]
            print(f"{script}: rank {os.environ['RANK']} lost another process: {reason}",
                  file=sys.stderr)
        else:
            traceback.print_exc()
    except Exception:  # a bug of ours: print what Python would print
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def shard_like(like, tensor):
    """Shard a whole tensor as `like` is sharded. Return it as it is if `like` is whole."""
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor


def local_shard(tensor):
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_full(tensor):
    """The whole of a tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
