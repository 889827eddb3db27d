"""Accelerations equal their definitions, on ragged rows, shuffled pages and a poisoned pool."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax.kernels import portable, reference

K, G, H, PAGE = 2, 3, 8, 4


def make_case(lengths: list[int], news: list[int], padding: int, seed: int = 0) -> dict[str, Any]:
    """Make rows of `lengths` positions, the last `news` of them this step's; nan elsewhere.

    The arrays are numpy's.
    """
    rng = np.random.default_rng(seed)
    width = 1 + max(-(-length // PAGE) for length in lengths)
    pages = len(lengths) * width + 3
    table_RB = rng.permutation(pages)[: len(lengths) * width].reshape(len(lengths), width)
    k_PKZH, v_PKZH = (np.full((pages, K, PAGE, H), np.nan, np.float32) for _ in "kv")
    for row, length in enumerate(lengths):
        for at in range(length):
            page, slot = table_RB[row, at // PAGE], at % PAGE
            k_PKZH[page, :, slot], v_PKZH[page, :, slot] = rng.standard_normal((2, K, H))
    runs = [np.arange(length - new, length) for length, new in zip(lengths, news, strict=True)]
    row_T = np.concatenate([np.full(new, row) for row, new in enumerate(news)])
    position_T = np.concatenate(runs)
    return {
        "q_TKGH": rng.standard_normal((len(row_T) + padding, K, G, H)).astype(np.float32),
        "k_PKZH": k_PKZH,
        "v_PKZH": v_PKZH,
        "table_RB": table_RB.astype(np.int32),
        "row_T": np.pad(row_T, (0, padding)).astype(np.int32),
        "position_T": np.pad(position_T, (0, padding), constant_values=-1).astype(np.int32),
    }


CASES = {
    "one token": ([1], [1], 0),
    "decode": ([5, 1, 33, 8], [1, 1, 1, 1], 0),
    "decode with unused rows": ([5, 1, 33, 8], [1, 1, 0, 0], 2),
    "prefill": ([70], [70], 10),
    "prefill after a prefix": ([600], [130], 0),
    "mixed": ([300, 9, 70, 4], [1, 9, 66, 1], 7),
    "many short rows": ([3] * 20, [3] * 20, 4),
}


@pytest.mark.parametrize("name", CASES)
def test_portable_attention_equals_its_definition(name):
    case = make_case(*CASES[name])
    wanted = np.asarray(reference.attend_pages(**case)[0])
    found = np.asarray(jax.jit(portable.attend_pages)(**case)[0])
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    assert (found[case["position_T"] < 0] == 0).all()


def test_attention_equals_a_softmax_written_out():
    case = make_case([9, 6], [9, 2], 0)
    found = np.asarray(reference.attend_pages(**case)[0])
    k, v = (
        case[name][case["table_RB"]].swapaxes(1, 2).reshape(2, K, -1, H)
        for name in ("k_PKZH", "v_PKZH")
    )
    for token, (row, at) in enumerate(zip(case["row_T"], case["position_T"], strict=True)):
        for head in range(K):
            score = case["q_TKGH"][token, head] @ k[row, head, : at + 1].T / np.sqrt(H)
            weight = np.exp(score - score.max(-1, keepdims=True))
            wanted = weight / weight.sum(-1, keepdims=True) @ v[row, head, : at + 1]
            np.testing.assert_allclose(found[token, head], wanted, atol=1e-6)


def test_store_writes_each_tokens_slot_and_no_other():
    case = make_case([6, 3], [2, 1], 2)
    rng = np.random.default_rng(1)
    k_TKH, v_TKH = rng.standard_normal((2, 5, K, H)).astype(np.float32)
    before = jnp.zeros(case["k_PKZH"].shape)
    where = [case[name] for name in ("table_RB", "row_T", "position_T")]
    k_PKZH, v_PKZH = map(np.asarray, reference.store(before, before, k_TKH, v_TKH, *where))
    wanted_k, wanted_v = np.array(before), np.array(before)
    for token in range(3):
        page = case["table_RB"][case["row_T"][token], case["position_T"][token] // PAGE]
        slot = case["position_T"][token] % PAGE
        wanted_k[page, :, slot], wanted_v[page, :, slot] = k_TKH[token], v_TKH[token]
    np.testing.assert_array_equal(k_PKZH, wanted_k)
    np.testing.assert_array_equal(v_PKZH, wanted_v)


@pytest.mark.parametrize("experts", ["spread", "all on one"])
def test_experts_equal_a_loop_over_tokens(experts):
    rng = np.random.default_rng(0)
    T, D, F, E = 7, 6, 5, 4
    x_TD = rng.standard_normal((T, D)).astype(np.float32)
    gate_up = rng.standard_normal((E, 2, F, D)).astype(np.float32)
    down = rng.standard_normal((E, D, F)).astype(np.float32)
    expert_T = rng.integers(0, E, T) if experts == "spread" else np.full(T, 2)
    x, expert, *matrices = map(jnp.asarray, (x_TD, expert_T, gate_up, down))
    found = np.asarray(reference.run_experts(x, None, expert, *matrices))
    for x_D, e, y_D in zip(x_TD, expert_T, found, strict=True):
        gate_F, up_F = gate_up[e] @ x_D
        np.testing.assert_allclose(
            y_D, down[e] @ (gate_F / (1 + np.exp(-gate_F)) * up_F), rtol=2e-5, atol=2e-5
        )
