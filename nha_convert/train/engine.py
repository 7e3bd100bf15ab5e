"""The processes that train one model together: who they are, what they agree on, how the model is spread over them.

One process, DDP (each holds the whole model) or FSDP2 (each holds a share of every layer). A rank is one process.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..devices import world_of
from ..errors import InputError, WorkError
from ..modeling.attention_nha import nha_layers
from ..settings import RuntimeSettings

ROLL_CALL = 5.0
"""Seconds that a rank has to answer once another was found silent."""
_started: dict[str, Any] = {}


class RankLostError(WorkError):
    """Another process of this run is gone or does not answer; every rank that is left says so."""


@dataclass(frozen=True)
class Engine:
    """This process among those that train together.

    Attributes:
        rank, world: this process's number and how many there are.
        kind: `single`, `ddp` or `fsdp2`.
        offload: FSDP2 keeps weights, gradients and optimizer state in host memory between uses.
        timeout: seconds after which a silent rank counts as lost.
        store: where ranks leave each other notes; None for one process alone.
    """

    rank: int = 0
    world: int = 1
    kind: str = "single"
    offload: bool = False
    timeout: float = 600.0
    store: Any = None

    @property
    def main(self) -> bool:
        """Whether this process writes, prints and evaluates."""
        return self.rank == 0

    # ---- what ranks tell each other ------------------------------------------------------------
    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks, on each of them."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def highest(self, value: torch.Tensor) -> torch.Tensor:
        """The elementwise maximum of a tensor over all ranks, on each of them."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def _reduced(self, value: torch.Tensor, how: Any) -> torch.Tensor:
        if self.world == 1:
            return value
        value = value.clone()
        dist.all_reduce(value, how)
        return value

    def gather(self, value: Any) -> list[Any]:
        """Every rank's object, in the order of ranks, on each of them."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def from_main(self, value: Any) -> Any:
        """Rank 0's object, on every rank."""
        if self.world == 1:
            return value
        carried = [value]
        dist.broadcast_object_list(carried, src=0)
        return carried[0]

    @contextmanager
    def main_first(self, name: str) -> Iterator[None]:
        """Rank 0 passes the block alone, however long it takes; then the others do, one beside the other.

        Args:
            name: of what rank 0 does, different for every block of a run.
        Raises:
            RankLostError: rank 0 is gone.
            WorkError: rank 0 has failed; it says why.
        """
        if self.store is None:
            yield
            return
        if not self.main:
            self._wait_for_main(f"done/{name}")
        try:
            yield
        except BaseException:
            if self.main:
                self.store.set(f"done/{name}", "failed")
            raise
        if self.main:
            self.store.set(f"done/{name}", "whole")

    def _wait_for_main(self, note: str) -> None:
        try:
            while not self.store.check([note]):
                time.sleep(0.1)
            said = self.store.get(note)
        except RuntimeError as error:  # the notes are gone with their host
            raise RankLostError(f"rank 0 of {self.world} is gone, so rank {self.rank} stops too") from error
        if said != b"whole":
            raise WorkError(f"rank 0 has stopped, so rank {self.rank} stops too")

    def lost_ranks(self) -> list[int]:
        """Which ranks do not answer a roll call; asked once, after a message has failed."""
        try:
            self.store.set(f"here/{self.rank}", "1")
            end = time.monotonic() + ROLL_CALL
            while True:
                lost = [rank for rank in range(self.world) if not self.store.check([f"here/{rank}"])]
                if not lost or time.monotonic() > end:
                    return lost
                time.sleep(0.1)
        except RuntimeError:  # rank 0 hosts the notes where no launcher does
            return [0]

    # ---- the model over the ranks --------------------------------------------------------------
    def sharded(self, objective: Any, device: torch.device) -> Any:
        """A copy of an objective whose weights are spread over the ranks; the original stays whole.

        Decoder layers are one group each, the rest is another. Parameters under `nha` (few, fp32) are kept whole on
        every rank, so that no group mixes dtypes; `sum_whole_gradients` adds their gradients up.

        Args:
            objective: on the CPU, the same on all ranks.
            device: where this rank computes.
        Returns:
            An objective with the same interface; parameters are DTensors but for the gates.
        """
        mesh = init_device_mesh(device.type, (self.world,))
        spread = copy.deepcopy(objective)
        models = [model for model in (spread.model, getattr(spread, "teacher", None)) if model is not None]
        whole = {
            parameter for model in models for _, layer in nha_layers(model) for parameter in layer.nha.parameters()
        }
        names = {id(parameter): name for name, parameter in spread.named_parameters()}
        groups = [[names[id(parameter)] for parameter in group["params"]] for group in spread.groups()]
        policy = CPUOffloadPolicy() if self.offload else OffloadPolicy()
        for parameter in whole:
            parameter.data = parameter.data.to(device)
        for model in models:
            for layer in getattr(model, model.base_model_prefix).layers:
                fully_shard(layer, mesh=mesh, ignored_params=whole, offload_policy=policy)
        fully_shard(spread, mesh=mesh, ignored_params=whole, offload_policy=policy)
        register_fsdp_forward_method(spread, "worst_layer")
        found = dict(spread.named_parameters())
        for group, wanted in zip(spread.groups(), groups):
            group["params"][:] = [found[name] for name in wanted]
        return spread

    def sum_whole_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Under FSDP2: the mean over ranks of the gradients of parameters that are not sharded, in place."""
        if self.kind != "fsdp2" or self.world == 1:
            return
        for parameter in parameters:
            if isinstance(parameter, DTensor) or not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.world


def start_engine(runtime: RuntimeSettings, device: torch.device) -> Engine:
    """Joins the processes that `torchrun` or `accelerate launch` started; one process alone needs none.

    Args:
        runtime: `engine`, `cpu_offload`, `rank_timeout`.
        device: where this rank computes.
    Raises:
        InputError: an engine that cannot be had with this many processes or on this device.
    """
    rank, world, _ = world_of(os.environ)
    kind: str = runtime.engine if runtime.engine != "auto" else "ddp"
    if kind == "ddp" and world == 1:
        kind = "single"
    if runtime.cpu_offload and (kind != "fsdp2" or device.type != "cuda"):
        raise InputError(
            f"runtime.cpu_offload: needs runtime.engine fsdp2 on a GPU, found {kind} on {device.type}; "
            "set runtime.engine=fsdp2 or runtime.cpu_offload=false"
        )
    if device.type == "mps" and kind != "single":
        raise InputError(f"runtime.engine: {kind} runs on cuda or cpu, found mps; use auto and one process")
    if kind == "single":
        return Engine()
    if not dist.is_initialized():
        limit = timedelta(seconds=runtime.rank_timeout)
        if world == 1:
            _started["store"] = HashStore()
        else:
            _started["store"], rank, world = next(rendezvous("env://", timeout=limit))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(backend, store=_started["store"], rank=rank, world_size=world, timeout=limit)
    return Engine(rank, world, kind, runtime.cpu_offload, runtime.rank_timeout, _started.get("store"))


def stop_engine() -> None:
    """Leaves the group of processes, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
    _started.clear()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor put together from its shards; every rank has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_whole(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies a whole tensor into one that may be sharded, in place."""
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> torch.Tensor:
    """Scales gradients, sharded and whole ones together, to a norm of at most `limit`.

    Returns:
        0-dim norm before that, the same on every rank.
    """
    learning = [parameter for parameter in parameters if parameter.grad is not None]
    kinds = [[p for p in learning if isinstance(p, DTensor) is sharded] for sharded in (False, True)]
    kinds = [some for some in kinds if some]
    if not kinds:
        return torch.zeros(())
    norms = [whole(get_total_norm([p.grad for p in some if p.grad is not None])) for some in kinds]
    norm = norms[0]
    if len(norms) == 2:
        norm = torch.linalg.vector_norm(torch.stack([norms[0], norms[1].to(norms[0].device)]))
    for some in kinds:
        clip_grads_with_norm_(some, limit, norm)
    return norm


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors on the CPU; every rank has to ask."""
    state = optimizer.state_dict()

    def plain(value: Any) -> Any:
        return whole(value).cpu() if isinstance(value, torch.Tensor) else value

    entries = {index: {key: plain(value) for key, value in entry.items()} for index, entry in state["state"].items()}
    return {**state, "state": entries}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Takes what `optimizer_state` gave, under any engine and number of ranks."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        parameter = parameters[int(index)]
        entries[index] = dict(entry)
        if isinstance(parameter, DTensor):
            for key, value in entry.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    at = value.to(parameter.device)
                    entries[index][key] = distribute_tensor(at, parameter.device_mesh, parameter.placements)
    optimizer.load_state_dict({**state, "state": entries})
