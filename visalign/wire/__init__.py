"""What a remote reward and its server say to each other, version 1.

    GET  /v1/health              alive, and which version; no token
    GET  /v1/spec                which rewards there are, what they need, how much one request may hold
    POST /v1/check/REWARD        whether prompts have what the reward reads, before anything is generated
    POST /v1/score/REWARD        samples, their prompts and groups -> scores
    POST /v1/compare/REWARD      pairs and their prompts -> probabilities that the first is better

Every body is one safetensors file (``body``): a small JSON head and named arrays. One parser, which checks names, types, shapes and sizes
before anything is read, serves text, pictures, sound, meshes and latents; nothing in it can run, nothing is blown up by base64, and
numbers arrive with all their bits: NaN and infinity are array elements, never JSON. ``schema`` is the head, ``media`` the encodings,
``rows`` requests and ``answers`` answers. Errors are JSON, ``{"error": {"message": ...}}``.
"""
