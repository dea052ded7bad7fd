"""Reward models: a head on the embeddings of a media and text encoder, how it is stored and what an encoder has to offer.

``encoder`` is what training and scoring ask of an encoder, ``blocks`` what a head sees of its embeddings, ``heads`` the networks,
``adapter`` LoRA on the encoder, ``stored`` the file. Trained by ``visalign.reward_training``, used by the reward ``trained``.
"""
