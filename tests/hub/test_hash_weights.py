"""Weight files of HashAttention: safe, in every documented form, and checked."""

import pickle

import pytest
import torch

from sparse_attention_hub.sparse_attention.utils.hashattention_utils import (
    convert_usa_weights_to_hash_attention,
    create_hat_weights_file_from_usa,
    load_hat_weights,
    save_hat_weights,
)
from tests.hub.top_k_maskers import hash_weights


def assert_equal(first, second) -> None:
    assert first.keys() == second.keys()
    for layer, parts in first.items():
        for part, values in parts.items():
            for one, other in zip(values, second[layer][part], strict=True):
                assert torch.equal(one, other)


def test_safetensors_and_torch_files(tmp_path) -> None:
    weights = hash_weights(3)
    save_hat_weights(weights, tmp_path / "weights.safetensors")
    torch.save(weights, tmp_path / "weights.pt")
    for name in ("weights.safetensors", "weights.pt"):
        assert_equal(load_hat_weights(tmp_path / name), weights)


@pytest.mark.parametrize("name", ["w.pkl", "w.pt", "w", "w.safetensors", "w.safetensors.bak"])
def test_a_converted_checkpoint_is_read_back_whatever_its_name(name, tmp_path) -> None:
    weight = {
        f"0.learning_to_hash_transformation_{side}.0.0.weight": torch.randn(4, 8) for side in "qk"
    }
    torch.save(weight, tmp_path / "usa.pt")
    create_hat_weights_file_from_usa(tmp_path / "usa.pt", tmp_path / name, 1, 1, 1)
    found = load_hat_weights(tmp_path / name)
    for side, short in (("query", "q"), ("key", "k")):
        expected = weight[f"0.learning_to_hash_transformation_{short}.0.0.weight"].T
        assert torch.equal(found[0][f"{side}_matrix"][0][0], expected)


@pytest.mark.parametrize("name", ["w.pt", "w.pkl", "w.safetensors"])
def test_damaged_files(name, tmp_path) -> None:
    """Also cut off in the middle; never with torch's advice to run what is in them."""
    whole = tmp_path / f"whole-{name}"
    save = save_hat_weights if name.endswith("safetensors") else torch.save
    save(hash_weights(2), whole)
    plain = pickle.dumps(hash_weights(2))
    beginnings = (b"", b"{", b"\x80\x04", b"PK\x03\x04", b"not weights", b"\x05" + bytes(7) + b"{")
    for content in (*beginnings, whole.read_bytes()[:200], plain, plain[:50]):
        (tmp_path / name).write_bytes(content)
        for read in (load_hat_weights, convert_usa_weights_to_hash_attention):
            with pytest.raises(ValueError, match="cannot read weights from .*w[.]") as error:
                read(tmp_path / name)
            assert "weights_only" not in str(error.value)
            assert error.value.__suppress_context__ or "weights_only" not in str(
                error.value.__cause__
            )


class RunsCode:
    def __reduce__(self):
        return (open, ("should-not-exist", "w"))


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch) -> None:
    """The field's API reads such files with pickle."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pkl"
    for write in (
        lambda: path.write_bytes(pickle.dumps({0: RunsCode()})),
        lambda: torch.save({0: RunsCode()}, path),
    ):
        write()
        with pytest.raises(ValueError, match=r"safely .*converted.*save_hat_weights") as error:
            load_hat_weights(path)
        assert "weights_only" not in str(error.value)
        assert not (tmp_path / "should-not-exist").exists()


def test_published_checkpoints(tmp_path) -> None:
    """A network per layer and head; every second index is an activation; a bias may be missing."""
    layers, heads, size = 2, 3, [(8, 5), (5, 4)]
    state = {}
    for layer in range(layers):
        for head in range(heads):
            for side in "qk":
                for step, (width, out) in enumerate(size):
                    stem = f"{layer}.learning_to_hash_transformation_{side}.{head}.{2 * step}"
                    state[f"{stem}.weight"] = torch.randn(out, width)
                    if step == 0:
                        state[f"{stem}.bias"] = torch.randn(out)
    path, target = tmp_path / "usa.pt", tmp_path / "hat.safetensors"
    torch.save(state, path)
    weights = convert_usa_weights_to_hash_attention(path, layers, heads, 2)
    x = torch.randn(8)
    for layer in range(layers):
        for head in range(heads):
            stem = f"{layer}.learning_to_hash_transformation_k.{head}"
            hidden = state[f"{stem}.0.weight"] @ x + state[f"{stem}.0.bias"]
            parts = weights[layer]
            torch.testing.assert_close(
                x @ parts["key_matrix"][0][head] + parts["key_bias"][0][head], hidden
            )
            torch.testing.assert_close(
                hidden @ parts["key_matrix"][1][head] + parts["key_bias"][1][head],
                state[f"{stem}.2.weight"] @ hidden,
            )
    create_hat_weights_file_from_usa(path, target, layers, heads, 2)
    assert_equal(load_hat_weights(target), weights)
    with pytest.raises(ValueError, match="has no 2.learning_to_hash_transformation_q.0.0.weight"):
        convert_usa_weights_to_hash_attention(path, 3, heads, 2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: {}, "map layers"),
        (lambda w: {"0": w[0]}, "'0'"),
        (lambda w: {0: {**w[0], "key_bias": w[0]["key_bias"][0]}}, "must be lists"),
        (lambda w: {0: {**w[0], "extra": []}}, "layer 0"),
        (lambda w: {0: {**w[0], "key_bias": w[0]["key_bias"][:1]}}, "as many key matrices"),
        (lambda w: {0: {**w[0], "query_matrix": w[0]["query_matrix"][::-1]}}, "query weights"),
    ],
)
def test_other_forms_are_refused(change, says, tmp_path) -> None:
    torch.save(change(hash_weights(2)), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=says):
        load_hat_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["no-such-file.pt", "no-such-file.safetensors", "."])
def test_missing_file(name: str) -> None:
    with pytest.raises(ValueError, match="cannot read weights"):
        load_hat_weights(name)


def test_checkpoints_of_other_forms(tmp_path) -> None:
    name = "0.learning_to_hash_transformation_q.{}.0.weight"
    uneven = {name.format(0): torch.zeros(4, 8), name.format(1): torch.zeros(4, 7)}
    for state, says in (([1], "state dict, got a list"), (uneven, "differ in shape")):
        torch.save(state, tmp_path / "usa.pt")
        with pytest.raises(ValueError, match=says):
            convert_usa_weights_to_hash_attention(tmp_path / "usa.pt", 1, 2, 1)
