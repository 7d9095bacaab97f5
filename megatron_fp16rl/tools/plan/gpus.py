"""What a GPU can do, as its maker says, and how much of its memory a program gets."""

from dataclasses import dataclass, replace

from megatron_fp16rl.recipe import Recipe

# Of each GPU's memory: about 0.5 GiB CUDA context and kernels, 1 GiB NCCL (a buffer of some 4 MiB per
# channel and peer, in the 5 to 8 groups of a learner), 1.5 GiB that the caching allocator cannot use
# because it lies in pieces. A round number that was chosen, not measured: there was no GPU to measure on.
OVERHEAD_GIB = 3.0


@dataclass(frozen=True)
class Gpu:
    """One accelerator and its share of a node.

    memory_gib      usable, as the driver shows it (torch.cuda.mem_get_info's total)
    total_mib       as nvidia-smi shows it, from which SGLang chooses its defaults
    tflops          dense fp16 or bf16 with fp32 accumulation: both have the same peak
    hbm_gbps        memory bandwidth, 1e9 bytes a second
    link_gbps       to GPUs of the same node, one direction
    network_gbps    to other nodes, one direction
    overhead_gib    that is not for the tensors of a learner
    per_node        GPUs of a usual node
    """

    name: str
    memory_gib: float
    total_mib: int
    tflops: float
    hbm_gbps: float
    link_gbps: float
    network_gbps: float = 50.0
    overhead_gib: float = OVERHEAD_GIB
    per_node: int = 8

    @property
    def flops(self) -> float:
        return self.tflops * 1e12

    @property
    def memory(self) -> int:
        """Bytes that tensors may take."""
        return int((self.memory_gib - self.overhead_gib) * 2**30)


# Peaks: data sheets of NVIDIA A100, H100 SXM and H200 SXM (989.4), HGX B200 (half of the
# sparse figure), AMD Instinct MI300X. Links: NVLink 3, 4 and 5 have 600, 900 and 1,800 GB/s in both
# directions together; MI300X has 7 Infinity Fabric links of 64 GB/s. Network: one 400 Gb/s NIC (NDR)
# for each GPU; of an A100, one 200 Gb/s (HDR).
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100-80gb", 79.1, 81559, 989, 3350, 450),
        Gpu("h200", 139.8, 143771, 989, 4800, 450),
        Gpu("b200", 178.4, 183359, 2250, 7700, 900),
        Gpu("a100-80gb", 79.1, 81920, 312, 2039, 300, 25.0),
        Gpu("mi300x", 191.5, 196592, 1307, 5300, 448),
    )
}


def of(kind: str, recipe: Recipe) -> Gpu:
    """A kind of GPU in the nodes that a recipe says; eight to a node where it says nothing."""
    slurm = recipe.slurm
    if slurm is None or not slurm.gpus_per_node:
        return GPUS[kind]
    return replace(GPUS[kind], per_node=slurm.gpus_per_node)
