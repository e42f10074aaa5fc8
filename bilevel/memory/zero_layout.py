"""Layout of a copy's tensors over the processes of a run, under plain torch and under ZeRO."""

import dataclasses
from typing import Any

import torch

Parameters = list[torch.nn.Parameter]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Layout of the copies on the GPUs. stage: the ZeRO stage; 0 also stands for plain torch."""

    stage: int
    processes: int
    zero: dict[str, Any]  # DeepSpeed's zero_optimization section
    parameter_size: int  # bytes per element
    gradient_size: int
    casts: int = 0  # bf16 at stage 0: weights are fp32, and bf16 casts of so many copies exist at a time
    copies: int = 2  # number of model copies

    def offloaded(self, what: str) -> bool:
        return (self.zero.get(f"offload_{what}") or {}).get("device", "none") != "none"

    def setting(self, name: str, default: float) -> int:
        return int(self.zero.get(f"stage3_{name}", self.zero.get(name, default)))

    def padded(self, group: Parameters) -> int:
        """Elements of a parameter group's flat buffer, padding included, over all processes."""
        if self.stage == 3:  # each parameter is partitioned on its own
            return sum(-(-p.numel() // self.processes) * self.processes for p in group)
        whole = sum(p.numel() for p in group)
        return whole if self.stage == 0 else -(-whole // (2 * self.processes)) * 2 * self.processes

    def partition(self, group: Parameters) -> int:
        """Elements of this buffer that one process updates."""
        return self.padded(group) // (self.processes if self.stage else 1)

    def gradient_elements(self, group: Parameters) -> int:
        """Gradient elements kept until the step, on the process that keeps the most."""
        if self.stage < 2:
            return sum(p.numel() for p in group)
        if self.stage == 3 or self.offloaded("optimizer") or self.gradient_size != self.parameter_size:
            return self.partition(group)
        # Stage 2 keeps the whole gradient of each parameter that reaches into the partition.
        size, held, start = self.partition(group), [0] * self.processes, 0
        for p in group:
            for rank in range(start // size, (start + p.numel() - 1) // size + 1):
                held[rank] += p.numel()
            start += p.numel()
        return max(held)

    def gpu(self, model: torch.nn.Module, groups: list[Parameters]) -> dict[str, float]:
        """Bytes that all copies keep on one GPU between steps, and the peak of their gradients."""
        everything = list(model.parameters())
        active = [p for group in groups for p in group]
        partitions = sum(self.partition(group) for group in groups)
        gradients = sum(self.gradient_elements(group) for group in groups)
        frozen = set(everything) - set(active)
        if self.stage == 3:
            weights = self.partition(everything)
        else:
            weights = sum(p.numel() for p in frozen) + sum(self.padded(group) for group in groups)
        lines = {
            "parameters": 0 if self.offloaded("param") else weights * self.parameter_size,
            "fp32 masters": 4 * partitions if self.stage else 0,
            "Adam moments": 8 * partitions,
            "gradients": gradients * self.gradient_size,
            "communication buckets": self._buckets(sum(p.numel() for p in active)),
        }
        if self.offloaded("optimizer"):
            lines |= dict.fromkeys(("fp32 masters", "Adam moments", "gradients"), 0)
        return {line: self.copies * size for line, size in lines.items()}

    def host(self, model: torch.nn.Module, groups: list[Parameters]) -> dict[str, float]:
        """Bytes that the copies of all processes keep in host memory."""
        partitions = sum(self.partition(group) for group in groups)
        lines = {}
        if self.offloaded("param"):
            lines["offloaded parameters"] = self.partition(list(model.parameters())) * self.parameter_size
        if self.offloaded("optimizer"):
            lines |= {"offloaded masters": 4 * partitions, "offloaded moments": 8 * partitions}
            staged = self.gradient_size if self.stage == 3 else self.parameter_size
            lines["offloaded gradients"] = (4 + staged) * partitions
        return {line: self.copies * self.processes * size for line, size in lines.items()}

    def checkpoint(self, model: torch.nn.Module, groups: list[Parameters]) -> float:
        """Bytes of a checkpoint: all copies, all processes, without residual bits."""
        parameters = list(model.parameters())
        weights = self.processes * self.partition(parameters) if self.stage == 3 else sum(p.numel() for p in parameters)
        partitions = self.processes * sum(self.partition(group) for group in groups)
        return self.copies * (weights * self.parameter_size + (12 if self.stage else 8) * partitions)

    def passing(self, model: torch.nn.Module, groups: list[Parameters]) -> float:
        """Peak bytes of one copy's parameters and gradients that exist only during a pass."""
        everything = [p.numel() for p in model.parameters()]
        active = [p.numel() for group in groups for p in group]
        if (
            self.stage == 0
        ):  # casts of trained weights are kept for a copy's whole step, those of frozen ones for a pass
            cast = 2 * (sum(everything) + (self.casts - 1) * sum(active)) if self.casts else 0
            reduced = min(self.setting("reduce_bucket_size", 5e8), sum(active)) if self.processes > 1 else 0
            return cast + reduced * self.gradient_size
        if self.stage < 3:  # the bucket in which gradients are reduced, or a single larger gradient
            buckets = 2 if self.zero.get("overlap_comm") else 1  # one is filled while the other is reduced
            return max(buckets * self.setting("reduce_bucket_size", 5e8), max(active)) * self.gradient_size
        small = sum(n for n in everything if n <= self.setting("param_persistence_threshold", 1e5))
        reuse, ahead = self.setting("max_reuse_distance", 1e9), self.setting("prefetch_bucket_size", 5e7)
        # Parameters that are needed again soon stay gathered and the next ones are prefetched. Embedding and head
        # overlap, and after a draw of blocks the other copy's embedding stays gathered.
        large = 2 * max(everything) + sorted(everything)[-2]
        gathered = max(reuse // 2 + ahead + large, self.setting("max_live_parameters", 1e9) + max(everything))
        whole = min(sum(everything) - small, gathered) + self.copies * small
        scattered = max(min(self.setting("reduce_bucket_size", 5e8), sum(active)), max(active))
        return (whole + scattered) * self.parameter_size

    def _buckets(self, active: int) -> int:
        """ZeRO-3 keeps one bucket per engine; other stages allocate theirs in each pass."""
        return self.setting("reduce_bucket_size", 5e8) * self.parameter_size if self.stage == 3 else 0
