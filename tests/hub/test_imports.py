"""Who imports whom: arrows go one way, and imports are cheap."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import sparse_attention_hub

HUB = Path(sparse_attention_hub.__file__).parent
MASKERS = "sparse_attention_hub.sparse_attention.research_attention.maskers"


def modules_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(' '.join(sys.modules))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(output.stdout.split())


def test_the_package_alone_loads_nothing_heavy() -> None:
    loaded = modules_after("import sparse_attention_hub")
    assert not loaded & {"torch", "transformers", "openai", "vllm"}


@pytest.mark.parametrize(
    "statement",
    ["import sparse_attention_hub.sparse_attention", "import sparse_attention_hub.adapters"],
)
def test_maskers_and_interfaces_need_torch_only(statement: str) -> None:
    assert not modules_after(statement) & {"transformers", "openai", "vllm"}


def imported_by(source: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return names


def test_arrows_go_one_way() -> None:
    sources = list(HUB.rglob("*.py"))
    assert len(sources) > 30
    for source in sources:
        packages = {name.split(".")[0] for name in imported_by(source)}
        assert not packages & {"vllm", "vllm_sparse_plugin"}, source
        if "sparse_attention" in source.relative_to(HUB).parts:
            assert not packages & {"transformers", "openai"}, source
            assert not any(
                name.startswith("sparse_attention_hub.adapters") for name in imported_by(source)
            ), source


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (
            "sparse_attention_hub",
            "ResearchAttention SparseAttention Request RequestResponse ModelAdapter ModelAdapterHF "
            "ModelHubAdapterInterface SparseAttentionAdapterInterface __version__ __author__",
        ),
        (
            "sparse_attention_hub.adapters",
            "ModelAdapterHF ModelAdapterVLLM ModelServer ModelServerHF ModelEntry TokenizerEntry "
            "ModelServerConfig ModelServerError ModelCreationError TokenizerCreationError "
            "ReferenceCountError ResourceCleanupError cleanup_gpu_memory",
        ),
        ("sparse_attention_hub.adapters.huggingface", "ModelAdapterHF INT_MAX"),
        ("sparse_attention_hub.adapters.model_servers", "ModelServerHF ModelServerVLLM"),
        (MASKERS, "ResearchMasker MaskerConfig"),
        (
            f"{MASKERS}.base",
            "ResearchMasker MaskerConfig MaskerRegistry AttentionTensorDimensions",
        ),
        (
            f"{MASKERS}.fixed",
            "FixedMasker FixedMaskerConfig TopKMasker TopKMaskerConfig LocalMasker "
            "LocalMaskerConfig CausalMasker SinkMasker SinkMaskerConfig OracleTopK "
            "OracleTopKConfig OracleTopKMasker",
        ),
        (
            f"{MASKERS}.fixed.implementations.basic_fixed",
            "LocalMasker LocalMaskerConfig CausalMasker SinkMasker SinkMaskerConfig",
        ),
        (f"{MASKERS}.fixed.implementations.oracle_top_k", "OracleTopKMasker OracleTopKConfig"),
        ("sparse_attention_hub.sparse_attention.utils", "Mask"),
        ("sparse_attention_hub.sparse_attention.utils.kv_utils", "repeat_kv"),
    ],
)
def test_public_paths(module: str, names: str) -> None:
    loaded = importlib.import_module(module)
    for name in names.split():
        assert getattr(loaded, name) is not None


def test_unknown_names_are_attribute_errors() -> None:
    for module in ("sparse_attention_hub", "sparse_attention_hub.adapters"):
        with pytest.raises(AttributeError, match="Nonsense"):
            _ = importlib.import_module(module).Nonsense
