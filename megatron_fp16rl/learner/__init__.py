"""The learner: Megatron-core with FP16 parameters, fp32 main parameters and one loss scaler.

Nothing is imported here: launchers and the command line read `checkpoint_files` without Megatron, which
must not be imported before platform.prepare_learner().
"""
