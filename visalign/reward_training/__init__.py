"""Training a reward from preferences: from judgements to a folder that the reward ``trained`` reads.

``config`` is the schema, ``examples`` turn judgements into tensors split by prompt, ``features`` keep the encoder's embeddings,
``objectives`` say what is learnt, ``treatments`` what is done about wrong labels, ``fit`` is the loop, ``evaluation`` the held-out
numbers, ``train`` puts them together.
"""
