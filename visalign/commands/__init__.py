"""The work behind each command of ``visalign.cli``; together with ``build`` the only place where leaves meet."""

from __future__ import annotations

import os
import warnings


def quiet_libraries() -> None:
    """Leave the terminal to our own bars and messages; ``visalign --debug`` keeps warnings and logs."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(diffusers|transformers|huggingface_hub)\b.*")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
