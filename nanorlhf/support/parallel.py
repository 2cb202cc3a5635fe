"""More than one process: torchrun --nproc-per-node=2 train_ppo.py

All draw the same batches and random numbers, each computes its own rows, and gradients and metrics
are summed (DistributedDataParallel takes means, and does not see a trunk that is called apart from
its head). So they learn what one process would; one alone gets back what it gave, bit for bit.
"""
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_

from nanorlhf.support import UserError


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if world_size() > 1 else 0


def start(device):
    """Meet the other processes of torchrun, if any. Raises UserError where one has no GPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or world_size() > 1:
        return
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device.type != "cpu" and local >= gpus:
        raise UserError(f"--nproc-per-node: expected at most {gpus} (CUDA GPUs), or --device cpu")
    if device.type == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank() > 0:                  # only the first one prints
        sys.stdout = open(os.devnull, "w")


def finish():
    """Training is over: the first process continues alone, and the others end here."""
    if world_size() > 1:
        all_gather(None)            # nobody leaves while another still trains
        dist.destroy_process_group()
        if int(os.environ["RANK"]) > 0:
            sys.exit()


def local_rows(batch):
    """The rows of a global batch that this process computes: none, where there are too few."""
    begin, end = (len(batch) * r // world_size() for r in (rank(), rank() + 1))
    return batch[begin:end]


def micro_batches(batch, size):
    """This process's rows of a global batch, `size` at a time (0: all), with dropout of its own."""
    # One process alone draws the seed as well, or it would go on with other random numbers.
    rows, seed, several = local_rows(batch), torch.randint(2**62, ()).item(), world_size() > 1
    gpu = [torch.cuda.current_device()] if several and dist.get_backend() == "nccl" else []
    with torch.random.fork_rng(gpu, enabled=several):
        if several:
            torch.manual_seed(seed + rank())
        size = size or max(1, len(rows))
        for begin in range(0, len(rows), size):
            yield rows[begin:begin + size]


def all_gather(x):
    """A small object of each process -> the list of them, in every process."""
    objects = [x] * world_size()
    if world_size() > 1:
        exchange(dist.all_gather_object, objects, x)
    return objects


def gather_rows(rows):
    """The list of each process, of its local rows -> all of them, in the order of the batch."""
    return [row for local in all_gather(rows) for row in local]


def concatenate(parts, device):
    """[{name: (b, ...)}, ...] of each process's rows -> {name: (B, ...)} of all rows, in order"""
    if world_size() > 1:
        parts = gather_rows([{name: x.cpu() for name, x in part.items()} for part in parts])
    return {name: torch.cat([part[name] for part in parts]).to(device) for name in parts[0]}


def sum_metrics(metrics):
    """{name: this process's summand} -> {name: sum}. Who computed no rows may lack a name."""
    if world_size() == 1:
        return metrics
    summands = all_gather({name: torch.as_tensor(x).cpu() for name, x in metrics.items()})
    names = dict.fromkeys(name for one in summands for name in one)
    return {name: sum(one[name] for one in summands if name in one) for name in names}


def clip_gradients(params, limit):
    """Add up the gradients of all processes, then clip their norm. -> what it was before"""
    params = [p for p in params if p.requires_grad]
    if world_size() > 1:
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad      # it computed no rows
            exchange(dist.all_reduce, p.grad)
    return clip_grad_norm_(params, limit)


def exchange(collective, *args):
    """Call what many processes call at once. Raises UserError where another process is gone."""
    try:
        collective(*args)
    except RuntimeError as error:   # gloo notices that another is gone; with NCCL, torchrun does
        raise UserError(f"lost the other processes: {str(error).splitlines()[0]}") from None


def may_speak():
    """Is this the process to say why the run ends? The first that asks; one alone always is."""
    if world_size() == 1:           # of several, all make the same mistake, or the others have left
        return os.environ.get("RANK", "0") == "0"
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                              timeout=timedelta(seconds=2), wait_for_workers=False)
        return store.add("nanorlhf has spoken", 1) == 1
    except RuntimeError:            # the first process kept it and is gone, and not in silence
        return False
