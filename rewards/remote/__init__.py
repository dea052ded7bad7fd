"""Rewards that live elsewhere, behind ``visalign serve-reward``: ``client`` (one reward of one or several equal servers), ``keys`` (what
makes two questions the same) and ``rewards`` (the adapters ``remote`` and ``remote_judge``).
"""
