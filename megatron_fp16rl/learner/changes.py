"""How much of the weights an update changes, as servers hold them: what a sync of changes alone would send."""

import torch
import torch.distributed as dist

from megatron_fp16rl.learner.export import Export


class Changes:
    """Compares exported weights with those of the last call; keeps a copy in host memory."""

    def __init__(self, export: Export) -> None:
        self.export = export
        self._last: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def count(self) -> float | None:
        """Share of the exported numbers that differ from the last call's; None at the first.

        Collective over the world. After `Export.check`, which forgets older weights.
        """
        sums = torch.zeros(2, dtype=torch.float64)
        current: dict[str, torch.Tensor] = {}
        for key in dict.fromkeys(part.key for part in self.export.parts):
            tensor = self.export.tensor(key)
            if tensor.dtype is self.export.model.dtype:  # buffers stay fp32
                tensor = tensor.to(self.export.served)
            tensor = tensor.to("cpu", copy=True)
            current[key] = tensor
            if self._last:
                different = (tensor != self._last[key]).sum()
                sums += torch.stack(
                    [different.double(), torch.tensor(float(tensor.numel())).double()]
                )
        self._last = current
        sums = sums.to(self.export.model.world.device)
        dist.all_reduce(sums)
        changed, total = sums.tolist()
        return changed / total if total else None
