"""Vision-language models as judges, behind any OpenAI-compatible server or in this process.

``server`` (calls through ``visalign.rewards.servers``) and ``local`` (a transformers model in this process); ``question`` (what is asked
and answered), ``images`` and ``captions`` (how samples and prompts get into a question); ``tokens`` and ``parsers`` (an answer to a
verdict), ``templates``; ``inquiry`` (ask, repair, account); the rewards ``pairwise``, ``pointwise``, ``rubric``, ``testpoints`` and
``consistency``, and ``reward_token``, which reads a head instead of words.
"""
