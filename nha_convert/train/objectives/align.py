"""Stage `align`: every NHA layer learns its teacher's attention output, from the teacher's own hidden states.

B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from nha_kernels.rotary import rotate
from torch import nn
from torch.distributed.tensor import DTensor

from ...errors import InputError
from ...far_attention import far_share, own_windows
from ...modeling.attention_nha import nha_layers
from ..losses import Batch, row_errors
from ..objective import Objective

SHARED = ("q_proj", "k_proj", "v_proj")


class AlignObjective(Objective):
    """Mean over rows and NHA layers of ||student - teacher||^2 / ||teacher||^2 of attention outputs.

    One pass of the teacher feeds all layers. Each layer's error is differentiated while it is computed, so the graph
    of one layer at a time is alive, and the backbone has none. With `memory_weight` a second term is the same error of
    the layer with its slots alone; with `far_weight` tokens count by how much their teacher attends beyond the window.
    No layer's training depends on another's: gradients are clipped layer by layer.
    """

    settings: Any
    stops_early = True
    """Whether a pass of the teacher ends at the last layer that is compared."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.teacher is not None and not nha_layers(self.teacher):
            raise ValueError("alignment needs its teacher as an NHA model, which tells packed documents to its layers")

    @property
    def layers(self) -> list[tuple[int, Any]]:
        """Index and attention of the layers that run NHA in this stage."""
        return [(index, layer) for index, layer in nha_layers(self.model) if layer.nha_window is not None]

    def count(self, batch: Batch) -> torch.Tensor:
        """Rows."""
        return torch.tensor(len(batch["input_ids"]), device=batch["input_ids"].device)

    @property
    def layer_count(self) -> int:
        """Layers of the whole model that run NHA in this stage."""
        return len(self.layers)

    def clipped_apart(self) -> list[list[nn.Parameter]]:
        """What learns, layer by layer."""
        return [[tensor for tensor in layer.parameters() if tensor.requires_grad] for _, layer in self.layers]

    def sums(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sum over rows of the mean over layers, and each layer's sum over rows."""
        errors: dict[str, torch.Tensor] = {}
        shares: list[torch.Tensor] = []
        gradients: dict[int, torch.Tensor] = {}
        with self.teaching() as teacher, self._measuring(teacher, errors, shares, gradients), suppress(_Seen):
            self.seen(self.run(teacher, batch))
        learned = [tensor for group in self.groups() for tensor in group["params"]]
        if any(isinstance(tensor, DTensor) for tensor in learned):  # whose gradients only FSDP2's own backward gathers
            raise InputError(
                f"{self.settings.label}: train is {self.settings.train}; with "
                "runtime.engine fsdp2 alignment trains gates alone; set train: gates, or runtime.engine: ddp"
            )
        given = [gradients.get(id(tensor)) for tensor in learned]
        return _Given.apply(torch.stack(shares).sum(), given, *learned), errors

    def seen(self, states: torch.Tensor) -> None:
        """Told the teacher's final hidden states [B, T, hidden], where its pass came to the end."""

    @contextmanager
    def _measuring(
        self,
        teacher: Any,
        errors: dict[str, torch.Tensor],
        shares: list[torch.Tensor],
        gradients: dict[int, torch.Tensor],
    ) -> Iterator[None]:
        """Inside, a forward pass of the teacher fills in each layer's errors and its share of loss and gradients."""
        students = self.layers
        teachers = dict(students) if teacher is self.model else _attentions(teacher)
        same = teacher is self.model and self.selection.adapted is None  # both project alike
        sharded = any(isinstance(tensor, DTensor) for tensor in teacher.parameters())  # FSDP2 counts whole passes
        handles = []
        for index, student in students:
            kept: dict[str, torch.Tensor] = {}
            if same:
                handles += [_keep(getattr(student, name), name, kept) for name in SHARED]

            def hook(
                module: Any,
                args: Any,
                kwargs: Any,
                output: Any,
                index: int = index,
                own: Any = student,
                kept: dict[str, torch.Tensor] = kept,
            ) -> None:
                with self._as_student(own), _using(own, kept):
                    share = self._share(index, own, args, kwargs, output[0], errors) / self.layer_count
                    shares.append(share.detach())
                    if share.requires_grad:  # not where nothing has left the window
                        learned = [tensor for tensor in own.parameters() if tensor.requires_grad]
                        found = torch.autograd.grad(share, learned, allow_unused=True)
                        gradients.update((id(t), g) for t, g in zip(learned, found) if g is not None)
                if index == students[-1][0] and self.stops_early and not sharded:
                    raise _Seen  # what comes after the last layer that is compared is not needed

            handles.append(teachers[index].register_forward_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _as_student(self, layer: Any) -> Iterator[None]:
        """Inside a pass of the teacher, one layer computes with a graph as the student does, adapters included."""
        mode, branch = layer.nha_mode, layer.nha_branch
        layer.nha_mode = "student"
        try:
            with torch.enable_grad(), self.selection.with_adapters(layer):
                yield
        finally:
            layer.nha_mode, layer.nha_branch = mode, branch

    def _share(
        self, index: int, student: Any, args: Any, kwargs: Any, wanted: torch.Tensor, errors: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """One layer's loss, summed over rows; fills in its errors."""
        output = student.forward(*args, **kwargs)[0]
        error = row_errors(output, wanted).sum()
        errors[error_name(self.number(index))] = error.detach()
        weights = self._weights(student, args, kwargs) if self.settings.far_weight else None
        share = error if weights is None else row_errors(output, wanted, weights).sum()
        memory_weight = self.settings.memory_weight
        if not memory_weight:
            return share
        student.nha_branch = "slots"
        memory = student.forward(*args, **kwargs)[0]
        errors[memory_name(self.number(index))] = row_errors(memory.detach(), wanted).sum()
        return share + memory_weight * row_errors(memory, wanted, weights).sum()

    @torch.no_grad()
    def _weights(self, student: Any, args: Any, kwargs: Any) -> torch.Tensor:
        """[B, T] weight of each token, mean 1 over a row: `far_weight` of it by the teacher's far attention."""
        hidden = args[0] if args else kwargs["hidden_states"]
        query, key, _ = student._nha_projections(hidden)
        turn = [values[:, :, None] for values in kwargs["position_embeddings"]]  # [B or 1,T,1,D]
        own = own_windows(student.config)[student.layer_idx]
        far = far_share(
            rotate(query, *turn),
            rotate(key, *turn),
            student.scaling,
            student.nha_window,
            student.config.nha_sinks,
            own=own,
            documents=_documents(kwargs.get("nha_cu_seqlens"), hidden),
        )
        mean = far.mean(1, keepdim=True)
        relative = torch.where(mean > 0, far / mean.clamp_min(torch.finfo(far.dtype).tiny), 1.0)
        share = self.settings.far_weight
        return 1 - share + share * relative

    def worst_layer(self, batch: Batch) -> int:
        """The layer with the largest error, the first that is not a number before all."""
        layers = [index for index, _ in self.layers]
        with self._precision(batch["input_ids"].device):
            _, errors = self.sums(batch)
        found = [errors[error_name(index)].item() for index in layers]
        sizes = [error if error == error else float("inf") for error in found]
        return layers[sizes.index(max(sizes))]


def error_name(index: int) -> str:
    """The name of a layer's alignment error in metrics.jsonl."""
    return f"align/layer_{index:02d}"


def memory_name(index: int) -> str:
    """The name of a layer's error with its slots alone."""
    return f"memory/layer_{index:02d}"


def _attentions(model: Any) -> dict[int, nn.Module]:
    """Attention by layer."""
    decoder = getattr(model, model.base_model_prefix)
    return {index: layer.self_attn for index, layer in enumerate(decoder.layers)}


def _keep(projection: nn.Module, name: str, kept: dict[str, torch.Tensor]) -> Any:
    """Keeps what a projection gives next in `kept`; the hook's handle."""
    return projection.register_forward_hook(lambda module, args, output: kept.__setitem__(name, output))


@contextmanager
def _using(layer: Any, kept: dict[str, torch.Tensor]) -> Iterator[None]:
    """Inside, a layer's projections give what is kept instead of computing it once more; then it is let go."""
    given = {name: getattr(layer, name) for name in kept}
    try:
        for name, projection in given.items():
            projection.forward = lambda hidden, name=name: kept[name]
        yield
    finally:
        for projection in given.values():
            del projection.forward
        kept.clear()


def _documents(cu_seqlens: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor | None:
    """[B, T] number of each token's document, from the documents' ends with all rows end to end."""
    if cu_seqlens is None:
        return None
    rows, length = hidden.shape[:2]
    places = torch.arange(rows * length, device=hidden.device)
    return torch.searchsorted(cu_seqlens.to(places), places, right=True).view(rows, length)


class _Seen(Exception):
    """Ends the teacher's pass early."""


class _Given(torch.autograd.Function):
    """A value whose gradients with regard to the parameters are known already."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, gradients: list[torch.Tensor | None], *parameters: Any) -> torch.Tensor:
        ctx.gradients, ctx.parameters = gradients, parameters
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        pairs = zip(ctx.gradients, ctx.parameters)
        # zeros, not nothing, so that DDP sees a gradient of every parameter
        return None, None, *(torch.zeros_like(p) if g is None else (g * outer[0]).to(p.dtype) for g, p in pairs)
