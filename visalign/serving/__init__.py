"""Rewards behind HTTP: ``settings`` (what a server's YAML says), ``batching`` (a queue and a thread per reward) and ``app`` (HTTP)."""
