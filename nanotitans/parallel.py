"""
The machine a run is on: its device, its number type, and the processes that torchrun started.

Processes share out the rows of the global batch, so that what a step learns from does not depend on how many there are.
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
    """This process among those torchrun started; without torchrun it is rank 0 of 1."""

    def __init__(self, device):
        self.world, self.rank = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))
        self.launched, self.main = 'WORLD_SIZE' in os.environ, self.rank == 0
        self.restarts = int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', 0))
        self.device = torch.device(pick_device(device))
        if self.launched:
            if not {'RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'} <= set(os.environ):
                raise UserError("WORLD_SIZE is set, but not what else torchrun sets; start several processes with torchrun")
            if self.device.type == 'cuda':
                local, there = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
                if local >= there:
                    raise UserError(f"process {local} of this machine has no GPU of its own; give --nproc_per_node={there}")
                self.device = torch.device('cuda', local)
                torch.cuda.set_device(self.device)
            elif self.device.type != 'cpu':
                raise UserError(f"device='{self.device.type}' cannot be shared by processes; give --device=cpu, or no torchrun")
            dist.init_process_group('cpu:gloo,cuda:nccl' if self.device.type == 'cuda' else 'gloo', store=self.store(),
                                    world_size=self.world, rank=self.rank)

    def store(self):
        """
        Where the processes meet; None: where PyTorch would have them. After a restart the store that torchrun shares with them
        still has the addresses of the dead (pytorch/pytorch issue 135712); on one node all know which restart it is.
        """
        if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True' or not self.restarts:
            return None
        if os.environ['GROUP_WORLD_SIZE'] != '1':
            raise UserError("restarts over several nodes need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment: "
                            "export it, or give --max-restarts=0")
        store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), self.world, is_master=False)
        return dist.PrefixStore(f"start_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)

    # -- the global batch

    def share(self, rows, most):
        """
        The slices of `rows` rows that are this process's, each of at most `most` rows; every process has as many slices, since
        sharded ones must step together, and of a batch that does not go up evenly some may be empty.
        """
        if rows < self.world:
            raise UserError(f"{self.world} processes cannot share out {rows} rows, batch_size times "
                            "gradient_accumulation_steps; raise one of them")
        first, last = (rows * r // self.world for r in (self.rank, self.rank + 1))
        n = math.ceil(math.ceil(rows / self.world) / most)
        cuts = [first + (last - first) * i // n for i in range(n + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(cuts)]

    def sum(self, *numbers):
        """The sum of each number over the processes, a list."""
        if self.world == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, *flags):
        """For each flag whether it is true for any process, so that all do the same at the same step."""
        return [n > 0 for n in self.sum(*(int(bool(f)) for f in flags))]

    def on_main(self, act, *args):
        """Rank 0 acts; a UserError ends all processes, and none waits for it."""
        problem = None
        if self.main:
            try:
                act(*args)
            except UserError as error:
                problem = error
        if self.any(problem)[0]:
            raise problem or SystemExit(1)

    def gather(self, value):
        """What each process has, as a list at rank 0; None elsewhere."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.main else None
        dist.gather_object(value, values)
        return values

    # -- the model

    def choose(self, parallel, model):
        """'none', 'ddp' or 'fsdp': auto shards what would take more than half of a GPU's memory before the first token."""
        if not self.launched:
            if parallel == 'fsdp':
                raise UserError("parallel='fsdp' needs torchrun: torchrun --standalone --nproc_per_node=N train.py ...")
            return 'none'
        if parallel != 'auto':
            return parallel
        if self.device.type != 'cuda':
            return 'ddp'
        takes = BYTES_A_PARAMETER * sum(p.numel() for p in model.parameters())
        return 'fsdp' if takes > torch.cuda.get_device_properties(self.device).total_memory / 2 else 'ddp'

    def shard(self, model):
        """
        FSDP2: a block's parameters, DTensors from here on, are together only while it runs. (Autocast's bfloat16 casts of them
        are kept for the backward on every GPU, 2 bytes a parameter.)
        """
        warnings.filterwarnings('ignore', 'FSDP2-wrapped module .* returned a view')  # nothing here writes in place
        mesh = init_device_mesh(self.device.type, (self.world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def replicate(self, model, unused):
        """DDP; unused: some parameters get no gradient."""
        return DistributedDataParallel(model, find_unused_parameters=unused)


def run(main):
    """
    configurator.run for a script that torchrun may have started. One process of several ends at once: Python would take the
    process group apart under gloo's threads, which aborts or, when they wait for Python themselves, never ends.
    """
    if 'WORLD_SIZE' not in os.environ:
        configurator.run(main)
    status = 1
    try:
        configurator.run(main)
    except SystemExit as end:
        status = end.code
    except RuntimeError as error:
        if not re.search('gloo|NCCL|Connection (closed|reset)', str(error)):
            traceback.print_exc()
        else:
            print(f"{os.path.basename(sys.argv[0])}: rank {os.environ['RANK']} lost another process: "
                  f"{str(error).splitlines()[0]}", file=sys.stderr)
    except Exception:  # a mistake of ours, shown as Python would
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def shard_like(like, tensor):
    """A whole tensor, spread over the processes as `like` is, if it is."""
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor


def local_shard(tensor):
    """The part of a tensor that is here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_full(tensor):
    """A tensor that may be spread over the processes, put together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
