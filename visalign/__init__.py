"""visalign: align any diffusion or rectified-flow generator with any preference signal."""

__version__ = "0.1.0.dev0"
