"""Fused operators of sampling and updates: everything between the network's outputs and a loss, in one pass over memory each.

    guided_step           combine outputs, tilt by reward gradients, step, draw noise, round, log-probability
    transition_log_prob   log-probability of a stored step, KL to a reference and to the sampling policy; forward and backward
    paired_error          squared errors of policy and reference on noised samples; forward and backward

Each operator is one formula, ``<op>/reference.py`` in PyTorch, and two backends. ``backend="torch"`` is that formula, differentiated by
autograd. ``backend="cuda"`` is ``<op>/<op>.cu``, compiled for the device present on first use (`compile`) and registered as a
``torch.library`` operator with its analytic backward. ``"auto"`` takes CUDA wherever it is possible and says once in the log what it took
and why (`backend`). The kernels' scalars are read off the reference formula in float64 (`formula`), never written twice.
"""
