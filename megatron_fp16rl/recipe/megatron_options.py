"""Which options of Megatron-core 0.19.2's data parallelism and optimizer a recipe may set, and why not others.

Those that may are proved equal on gloo (tests/ranks/test_ddp.py): they change when and how numbers are
communicated, or a group of parameters' settings. A unit test holds the tables against Megatron's classes.
"""

import difflib
from typing import Any

_FSDP = "Megatron-FSDP keeps parameters in another form, which export and checkpoints cannot read"
_FP8 = "parameters are fp16, bf16 or fp32 (precision.dtype)"
_NCCL = "buffers of NCCL have no counterpart on gloo, so it was never compared"
_STATES = (
    "Adam's states would be Transformer Engine's own, or on the host: checkpoints do not find them there, and it "
    "was never compared, as neither runs on CPUs"
)
_ADAM = "the optimizer is AdamW"
_SCALER = "one loss scaler serves all optimizers; set precision.loss_scale"
_LOGGING = "it is about Megatron's own logs"

# The type of an option that is passed on, or why it is refused.
Table = dict[str, type | str]

DDP: Table = {
    "overlap_grad_reduce": bool,
    "overlap_param_gather": bool,
    "align_param_gather": bool,
    "bucket_size": int,
    "num_buckets": "set bucket_size",
    "pad_buckets_for_high_nccl_busbw": bool,
    "average_in_collective": "it divides after the sum, which rounds otherwise unless ranks are a power of two",
    "use_distributed_optimizer": "set learner.distributed_optimizer",
    "grad_reduce_in_fp32": "gradients are always summed in fp32",
    "reduce_scatter_with_fp32_accumulation": "gradients are always summed in fp32",
    "param_name_patterns_for_fp32_local_accumulation": "gradients are always summed in fp32",
    "check_for_nan_in_grad": "an overflow is no error: the loss scaler skips that update",
    "check_for_large_grads": "an overflow is no error: the loss scaler skips that update",
    "num_distributed_optimizer_instances": "ranks are grouped by the layout of learner",
    "delay_wgrad_compute": "nothing would compute the delayed gradients: no schedule with it is run",
    "nccl_ub": _NCCL,
    "disable_symmetric_registration": _NCCL,
    **dict.fromkeys(("fp8_param_gather", "fp4_param_gather", "keep_fp8_transpose_cache"), _FP8),
    "reuse_grad_buf_for_mxfp8_param_ag": _FP8,
    **dict.fromkeys(
        (
            "use_megatron_fsdp",
            "use_custom_fsdp",
            "data_parallel_sharding_strategy",
            "outer_dp_sharding_strategy",
            "gradient_reduce_div_fusion",
            "suggested_communication_unit_size",
            "fsdp_double_buffer",
            "fsdp_manual_registration",
            "fsdp_db_use_persist_buf_on_alloc_fail",
            "fsdp_all_gather_in_start_param_sync",
            "megatron_fsdp_main_params_dtype",
            "megatron_fsdp_main_grads_dtype",
            "megatron_fsdp_grad_comm_dtype",
            "megatron_fsdp_use_decoupled_grad",
            "megatron_fsdp_cuda_graph_mode",
            "megatron_fsdp_enable_fine_grained_param_gather",
            "megatron_fsdp_max_pool_double_buffer",
        ),
        _FSDP,
    ),
}

OPTIMIZER: Table = {
    "decoupled_lr": float,
    "decoupled_min_lr": float,
    "apply_wd_to_qk_layernorm": bool,
    **{
        name: f"set learner.optimizer.{key}"
        for name, key in (
            ("lr", "lr"),
            ("min_lr", "min_lr"),
            ("weight_decay", "weight_decay"),
            ("adam_beta1", "beta1"),
            ("adam_beta2", "beta2"),
            ("adam_eps", "eps"),
            ("clip_grad", "clip_grad"),
        )
    },
    **dict.fromkeys(("fp16", "bf16", "params_dtype"), "set precision.dtype"),
    **dict.fromkeys(
        ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
        _SCALER,
    ),
    "use_distributed_optimizer": "set learner.distributed_optimizer",
    "overlap_param_gather": "set it in learner.ddp",
    "grad_norm_skip_threshold": "an update is skipped where it overflows only; set learner.optimizer.clip_grad",
    "optimizer_cuda_graph": "the loss scaler asks for the overflow before it steps",
    "overlap_param_gather_with_optimizer_step": "Megatron's own step gathers then, which knows several scalers",
    **dict.fromkeys(("fp8_recipe", "reuse_grad_buf_for_mxfp8_param_ag"), _FP8),
    **dict.fromkeys(
        (
            "use_precision_aware_optimizer",
            "store_param_remainders",
            "main_grads_dtype",
            "main_params_dtype",
            "exp_avg_dtype",
            "exp_avg_sq_dtype",
            "optimizer_cpu_offload",
            "optimizer_offload_fraction",
            "use_torch_optimizer_for_cpu_offload",
            "overlap_cpu_optimizer_d2h_h2d",
            "pin_cpu_grads",
            "pin_cpu_params",
        ),
        _STATES,
    ),
    **dict.fromkeys(
        (
            "optimizer",
            "decoupled_weight_decay",
            "sgd_momentum",
            "muon_momentum",
            "muon_split_qkv",
            "muon_nesterov",
            "muon_coefficient_type",
            "muon_scalar_optimizer",
            "muon_scale_mode",
            "muon_fp32_matmul_prec",
            "muon_num_ns_steps",
            "muon_tp_mode",
            "muon_extra_scale_factor",
            "lion_beta1",
            "lion_beta2",
            "soap_shampoo_beta",
            "soap_precondition_frequency",
            "soap_use_kl_shampoo",
            "adaptive_muon_moment2_method",
            "adaptive_muon_beta2",
            "adaptive_muon_eps",
            "use_layer_wise_distributed_optimizer",
        ),
        _ADAM,
    ),
    **dict.fromkeys(
        ("log_num_zeros_in_grad", "barrier_with_L1_time", "timers", "config_logger_dir"), _LOGGING
    ),
}


# Of TransformerConfig what other keys say: all else may be set. Given twice, checkpoints, groups of ranks or servers
# would be of another model than the learner.
SAID_ELSEWHERE = {
    **{
        name: f"set learner.{key}"
        for name, key in (
            ("tensor_model_parallel_size", "tensor_parallel"),
            ("sequence_parallel", "sequence_parallel"),
            ("context_parallel_size", "context_parallel"),
            ("pipeline_model_parallel_size", "pipeline_parallel"),
            ("virtual_pipeline_model_parallel_size", "model_chunks"),
            ("num_layers_in_first_pipeline_stage", "first_stage_layers"),
            ("num_layers_in_last_pipeline_stage", "last_stage_layers"),
            ("expert_model_parallel_size", "expert_parallel"),
            ("expert_tensor_parallel_size", "expert_tensor_parallel"),
        )
    },
    **dict.fromkeys(("fp16", "bf16", "params_dtype", "pipeline_dtype"), "set precision.dtype"),
    **dict.fromkeys(
        (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "num_moe_experts",
            "moe_ffn_hidden_size",
            "moe_router_topk",
            "layernorm_epsilon",
        ),
        "config.json of the model says it",
    ),
}

NEEDS = {
    "bucket_size": "overlap_grad_reduce",
    "overlap_param_gather": "overlap_grad_reduce",
    "align_param_gather": "overlap_param_gather",
    "decoupled_min_lr": "decoupled_lr",
}


def check(options: dict[str, Any], table: Table, key: str) -> None:
    """Raises ValueError for an option that is unknown, refused, of another type, or without effect.

    key: of `options`, for the message.
    """
    passed = [name for name, type_ in table.items() if isinstance(type_, type)]
    for name, value in options.items():
        allowed = table.get(name)
        if allowed is None:
            near = difflib.get_close_matches(name, passed, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else f"options: {', '.join(passed)}"
            raise ValueError(f"{key}.{name}={value!r} is no option of Megatron-core's; {remedy}")
        if isinstance(allowed, str):
            raise ValueError(f"{key}.{name}={value!r} is not supported: {allowed}; remove it")
        wanted = {bool: "true or false", int: "an integer above 0", float: "a number, 0 or more"}
        is_number = type(value) is int or (allowed is float and type(value) is float)
        if not (
            type(value) is bool if allowed is bool else is_number and value >= (allowed is int)
        ):
            raise ValueError(f"{key}.{name}={value!r}: write {wanted[allowed]}")
        needed = NEEDS.get(name)
        if needed and value is not False and options.get(needed, False) is False:
            raise ValueError(f"{key}.{name}={value!r} needs {needed}; set it, or remove {name}")
