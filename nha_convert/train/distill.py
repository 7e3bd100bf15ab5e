"""Stage `distill`: adapters on the projections, and the gates, learn the teacher's distribution and the text.

B batch, T time, N = B * T rows, V vocabulary.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from ..modeling.attention_nha import nha_layers, teacher_mode
from .job import StageJob
from .trainer import NHATrainer

IGNORE = -100
CHUNK = 1 << 27
"""Logits that are alive at once; where B * T * V is larger, the head is recomputed in the backward pass."""


def token_losses(
    head: nn.Module, student: torch.Tensor, teacher: torch.Tensor | None, labels: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL to the teacher and cross entropy to the text, from hidden states.

    Args:
        head: language-model head, hidden -> V.
        student, teacher: [B, T, hidden] final hidden states; without a teacher KL is 0.
        labels: [B, T] token ids of the text itself (not shifted), -100 where there is none.
        temperature: divides both sides' logits in KL, which is multiplied by its square.
    Returns:
        KL(teacher || student), mean over the B * T tokens, and cross entropy, mean over the predicted ones; fp32.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()  # [N]

    def chunk(student: torch.Tensor, teacher: torch.Tensor | None, targets: torch.Tensor) -> tuple[Any, Any]:
        logits = head(student).float()  # [n,V]
        found = F.log_softmax(logits, -1)
        entropy = F.nll_loss(found, targets, ignore_index=IGNORE, reduction="sum")
        if teacher is None:
            return torch.zeros_like(entropy), entropy
        with torch.no_grad():
            wanted = F.log_softmax(head(teacher).float() / temperature, -1)  # [n,V]
        if temperature != 1:
            found = F.log_softmax(logits / temperature, -1)
        return F.kl_div(found, wanted, log_target=True, reduction="sum") * temperature**2, entropy

    rows = student.flatten(0, 1)  # [N,hidden]
    teacher_rows = None if teacher is None else teacher.flatten(0, 1)  # [N,hidden]
    size = max(1, CHUNK // getattr(head, "out_features", CHUNK))
    sums = torch.zeros(2, device=rows.device)
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        given = (rows[part], None if teacher_rows is None else teacher_rows[part], targets[part])
        whole = len(rows) <= size
        sums = sums + torch.stack(chunk(*given) if whole else checkpoint(chunk, *given, use_reentrant=False))
    return sums[0] / len(rows), sums[1] / (targets != IGNORE).sum()


class DistillTrainer(NHATrainer):
    """Trains LoRA adapters and gates of the student against the same module in teacher mode.

    `merge` ends it: the adapters go into the weights and the plain model is left.
    """

    def __init__(self, model: Any, job: StageJob, dataset: Dataset, accumulation: int = 1) -> None:
        settings = job.settings
        targets = settings.lora.targets
        self.merged_names = [
            f"{name}.weight" for name, _ in model.named_modules() if name.rpartition(".")[2] in targets
        ]
        model.requires_grad_(False)
        torch.manual_seed(job.seed)  # of the adapters' first weights
        adapters_of = LoraConfig(
            r=settings.lora.rank,
            lora_alpha=settings.lora.alpha,
            lora_dropout=settings.lora.dropout,
            target_modules=list(targets),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that is going
            self.adapted = get_peft_model(model, adapters_of)
        gates: list[nn.Parameter] = []
        for _, layer in nha_layers(model):
            gates += list(layer.nha.requires_grad_(True).parameters())
        own = {id(gate) for gate in gates}
        adapters = [tensor for tensor in model.parameters() if tensor.requires_grad and id(tensor) not in own]
        groups = [
            {"name": "lr", "params": adapters, "lr": settings.learning_rate},
            {"name": "gate_lr", "params": gates, "lr": settings.gate_learning_rate},
        ]
        super().__init__(model, job, dataset, groups, accumulation)

    def losses(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """kl_weight * KL + ce_weight * cross entropy, and both."""
        settings = self.job.settings
        teacher = None
        if settings.kl_weight:
            self.model.eval()
            with torch.no_grad(), teacher_mode(self.model), self.adapted.disable_adapter():
                teacher = self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state  # [B,T,hidden]
        self.model.train()
        student = self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state  # [B,T,hidden]
        head = self.model.get_output_embeddings()
        divergence, entropy = token_losses(head, student, teacher, labels, settings.temperature)
        loss = settings.kl_weight * divergence + settings.ce_weight * entropy
        return loss, {"kl": divergence.detach(), "ce": entropy.detach()}

    def merge(self) -> dict[str, torch.Tensor]:
        """Adds the adapters to the weights; returns all that this stage changed, under the plain model's names."""
        self.model.eval()
        plain = self.adapted.merge_and_unload()
        parameters = dict(plain.named_parameters())
        gates = [name for name in parameters if ".nha." in name]
        return {name: parameters[name].detach() for name in [*self.merged_names, *gates]}
