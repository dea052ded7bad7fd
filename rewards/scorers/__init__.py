"""Scorers whose packages do not live beside today's torch and transformers: each in an environment of its own, behind a server.

    python -m venv hpsv3 && source hpsv3/bin/activate
    pip install -r rewards/scorers/environments/hpsv3.txt && pip install --no-deps visalign
    visalign serve-reward -r visalign.rewards.scorers.hpsv3:HPSv3

``docs/scorers.md`` has the table. A module here imports its upstream when its class is made; ``upstream`` and ``pictures`` are shared.
"""
