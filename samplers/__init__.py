"""Samplers: pipelines become policies, policies become grouped trajectories."""

if __name__ != "visalign.samplers":
    raise ImportError("import visalign.samplers, not samplers: the second name would load every module twice")
