"""The sampling maskers, one file each."""

from .random_sampling import RandomSamplingMasker, RandomSamplingMaskerConfig

__all__ = ["RandomSamplingMasker", "RandomSamplingMaskerConfig"]
