"""Made-up results of all stages."""

from typing import Any

from benchmarks.gpu.cells import EVERY, LONG, LONGEST, SHORT
from benchmarks.gpu.sparse_configs import QUEST_5, QUEST_10, TOKENS_10


def timing(microseconds: float) -> dict[str, Any]:
    quartiles = {"low": 0.9 * microseconds, "high": 1.1 * microseconds}
    return {"microseconds": microseconds, **quartiles, "runs": 50, "method": "a clock"}


def result(**values: Any) -> dict[str, Any]:
    return {"gpu": "Some GPU", "measured": "2026-01-02T03:04:05", "commit": "0123456789", **values}


def bandwidth() -> dict[str, Any]:
    records: list[dict[str, Any]] = [
        {"kernel": kernel, "bytes": 1e9, "bandwidth": 4e12 * share, "share_of_copy": share, **more}
        | timing(25)
        for kernel, share, more in (
            ("page gather", 0.9, {"density": 0.1}),
            ("page gather", 0.2, {"density": 0.05}),
            ("token gather", 0.6, {"density": 0.1}),
            ("index scan", 0.8, {"bits": 4}),
            ("index scan", 0.95, {"bits": 16}),
        )
    ]
    for bits in (4, 16):
        records.append({"kernel": "write", "bits": bits, **timing(2)})
        records.append({"kernel": "write and update", "bits": bits, **timing(2.5)})
        records.append({"kernel": "write and update, pages end", "bits": bits, **timing(4)})
    for density in (0.05, 0.1):
        of = {"per": "KV head", "density": density, "bits": 4}
        records.append({"kernel": "start flags", **of, **timing(2)})
        records.append({"kernel": "start, score and select", **of, **timing(12)})
    return result(copy_bytes_per_second=4e12, records=records)


def attention() -> dict[str, Any]:
    contexts = []
    for keys, speed_ups in ((32768, (4.5, 2.9, 2.5)), (LONGEST, (9.0, 6.0, 4.4))):
        sparse = [
            {
                "name": name,
                **timing(50),
                "attend_microseconds": 50.0,
                "plan_microseconds": 30.0,
                "apart_microseconds": 53.0,
                "error": None,
                "density": 0.05,
                "loaded": 0.05,
                "index_share": 0.0176,
                "speed_up": speed_up,
                "ceiling": 14.8,
                "kernels": {"_attend_kernel": 31.25, "_join_kernel": 4.0},
            }
            for name, speed_up in zip((QUEST_5, QUEST_10, TOKENS_10), speed_ups, strict=True)
        ]
        sparse.append({"name": "one that fails", "error": "ValueError: no"})
        contexts.append(
            {
                "keys": keys,
                "batch": 8,
                "layers": 4,
                "dense": {"FLASH_ATTN": timing(225), "TRITON_ATTN": timing(300)},
                "left_out": {"FLASHINFER": "not installed"},
                "fastest_dense": "FLASH_ATTN",
                "sparse": sparse,
            }
        )
    grid = [
        {
            "keys": cell.keys,
            "requests": cell.requests,
            "left_out": {},
            **timing(0.001 * cell.keys * cell.requests),
            "sparse_microseconds": 20.0,
        }
        for cell in EVERY
    ]
    return result(contexts=contexts, dense_grid=grid, failures=[])


def engine(name: str, speed_up: float = 1.0) -> dict[str, Any]:
    """Dense steps take 5 ms and the attention of `attention`."""
    is_sparse = name.startswith("sparse")
    records: list[dict[str, Any]] = []
    for cell in {"dense": EVERY, "sparse-long": LONG, "sparse": SHORT}[name]:
        step = 5 + 32e-6 * cell.keys * cell.requests
        gain = speed_up if cell.keys >= 32768 else 0.99 if is_sparse else 1.0
        record: dict[str, Any] = {
            "keys": cell.keys,
            "requests": cell.requests,
            "tokens_per_second": gain * 1e3 * cell.requests / step,
            "step_milliseconds": step / gain,
        }
        if is_sparse:
            is_used = cell.keys >= 32768
            record["counts"] = {
                "sparse_queries": 64 * is_used,
                "density": 0.1 if is_used else 1.0,
                "read_bytes": 12 * is_used,
                "visible_bytes": 100 * is_used,
            }
        records.append(record)
    return result(
        engine=name,
        records=records,
        failures=[],
        cudagraph_mode="FULL_DECODE_ONLY",
        startup_seconds=40.0,
        capacity_tokens=900_000,
    )


def all_results() -> dict[str, dict[str, Any]]:
    machine = {
        "packages": {"torch": "2.11"},
        "processor": "Some processor",
        "cuda": "13.0",
        "driver": {"name": "Some GPU", "driver_version": "1"},
    }
    return {
        "environment": result(**machine),
        "kernels": result(summary="900 passed", failures=[]),
        "tokens": result(records=[], failures=[]),
        "bandwidth": bandwidth(),
        "attention": attention(),
        "engine_dense": engine("dense"),
        "engine_sparse-long": engine("sparse-long", 3.0),
        "engine_sparse": engine("sparse", 2.6),
    }
