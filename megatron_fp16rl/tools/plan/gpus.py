"""GPUs by their data sheets, and how much of their memory a program gets."""

from dataclasses import dataclass, replace

from megatron_fp16rl.recipe import Recipe

GIB = 2**30
# Of each GPU's memory: about 0.5 GiB for the CUDA context and kernels, 1 GiB for NCCL (some 4 MiB a channel
# and peer, in the 5 to 8 groups of a learner), 1.5 GiB lost to fragmentation in the caching allocator.
# Chosen, not measured.
OVERHEAD_GIB = 3.0


@dataclass(frozen=True)
class Gpu:
    """One accelerator and its share of a node. Bandwidths: bytes a second, in one direction."""

    name: str
    memory_gib: float  # usable: the total of torch.cuda.mem_get_info
    flops: float  # dense fp16 or bf16 with fp32 accumulation: both have the same peak
    hbm: float
    link: float  # to GPUs of the same node
    network: float = 50e9  # to other nodes
    per_node: int = 8

    @property
    def memory(self) -> int:
        """Bytes that the learner's tensors may take."""
        return int((self.memory_gib - OVERHEAD_GIB) * GIB)


# Peaks: data sheets of NVIDIA A100, H100 SXM and H200 SXM (989.4), HGX B200 (half of the sparse figure), AMD
# Instinct MI300X. Links: NVLink 3, 4 and 5 have 600, 900 and 1,800 GB/s in both directions together; MI300X
# has 7 Infinity Fabric links of 64 GB/s. Network: one 400 Gb/s NIC (NDR) a GPU; A100: 200 Gb/s (HDR).
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100-80gb", 79.1, 989e12, 3350e9, 450e9),
        Gpu("h200", 139.8, 989e12, 4800e9, 450e9),
        Gpu("b200", 178.4, 2250e12, 7700e9, 900e9),
        Gpu("a100-80gb", 79.1, 312e12, 2039e9, 300e9, 25e9),
        Gpu("mi300x", 191.5, 1307e12, 5300e9, 448e9),
    )
}


def gpu_of(kind: str, recipe: Recipe) -> Gpu:
    """A kind of GPU in nodes of the recipe's slurm.gpus_per_node; 8 where that is not set."""
    slurm = recipe.slurm
    if slurm is None or not slurm.gpus_per_node:
        return GPUS[kind]
    return replace(GPUS[kind], per_node=slurm.gpus_per_node)
