"""Reward adapters: media in, Scores out. One file per adapter, imported when it is used."""

if __name__ != "visalign.rewards":
    raise ImportError("import visalign.rewards, not rewards: the second name would load every module twice")
