"""More than one process: torchrun --nproc-per-node=2 train_ppo.py

In: the same command, started once for each GPU (or, to try it, CPU). Out: what one process would
have learnt from the same global batches, sooner. Every process draws the same batches and random
numbers from the same seed, and computes its own rows. The loop weighs a part by its share of the
global batch, so gradients and metrics need only be summed. In a single process every function here
returns what it was given, bit for bit.

Not DistributedDataParallel: the stages call trunk and head apart, which its hook on `forward` never
sees, and it takes the mean of gradients where rows of unequal length need the sum.

Left out on purpose: sharded weights (each process holds whole models and optimizers), sending while
the backward pass still runs, and going on without a process that died (--resume does that).
"""
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

from nanorlhf.support import UserError


def launched():
    """Did torchrun start this process, together with others?"""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if world_size() > 1 else 0


def start(device):
    """Meet the other processes that torchrun has started, if it has. Only the first one prints.
    Raises UserError where there is no such device for each of them."""
    if not launched() or world_size() > 1:
        return
    if device.type == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise UserError(f"--nproc-per-node: expected at most {there}, a GPU for each process")
        torch.cuda.set_device(local)
    elif device.type != "cpu":
        raise UserError(f"several processes need --device cuda or cpu, came {device.type}")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


def finish():
    """Training is over: the first process continues alone, and the others end here."""
    if world_size() > 1:
        here = rank()
        all_gather(None)            # nobody leaves while another still trains
        dist.destroy_process_group()
        if here > 0:
            sys.exit()


def local_rows(batch):
    """The rows of a global batch that this process computes: none, where there are too few."""
    begin, end = (len(batch) * r // world_size() for r in (rank(), rank() + 1))
    return batch if world_size() == 1 else batch[begin:end]


def micro_batches(batch, size):
    """This process's rows of a global batch, `size` at a time (0: all), with dropout of its own.

    Afterwards all processes draw the same random numbers again, and those that one process would:
    that is why one process draws the seed as well, although it has no use for it.
    """
    rows, seed = local_rows(batch), torch.randint(2**62, ()).item() + rank()
    size = size or max(1, len(rows))
    parts = (rows[begin:begin + size] for begin in range(0, len(rows), size))
    if world_size() == 1:
        yield from parts
        return
    gpu = [torch.cuda.current_device()] if dist.get_backend() == "nccl" else []
    with torch.random.fork_rng(gpu):
        torch.manual_seed(seed)
        yield from parts


def all_gather(x):
    """A small object of each process -> the list of them, in every process."""
    objects = [x] * world_size()
    if world_size() > 1:
        with connection():
            dist.all_gather_object(objects, x)
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
        gradients = [p.grad for p in params]
        flat = parameters_to_vector(gradients)
        with connection():
            dist.all_reduce(flat)
        vector_to_parameters(flat, gradients)
    return clip_grad_norm_(params, limit)


def first_alone(function, *args):
    """The first process calls it while the others wait. Its UserError ends them all."""
    mistake = None
    if rank() == 0:
        try:
            function(*args)
        except UserError as error:
            mistake = error
    if mistake := all_gather(mistake)[0]:
        raise mistake


@contextmanager
def connection():
    try:
        yield
    except RuntimeError as error:   # gloo notices that another is gone; with NCCL, torchrun does
        raise UserError(f"lost the other processes: {str(error).splitlines()[0]}") from None


def may_speak():
    """Is this the process to say why the run ends? The first that asks; one alone always is."""
    if world_size() == 1:           # of several, all make the same mistake, or the others have left
        return not launched() or os.environ["RANK"] == "0"
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                              timeout=timedelta(seconds=2), wait_for_workers=False)
        return store.add("nanorlhf has spoken", 1) == 1
    except RuntimeError:            # the first process kept it and is gone, and not in silence
        return False
