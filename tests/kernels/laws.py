"""Laws of every kernel bundle, on random inputs; the tests call them for the bundles that run."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l4jax.kernels import formats, reference
from l4jax.kernels.hopper import slot_assignment

# Largest error relative to the norm of the definition's float32 result. fp8 rounds activations to
# three bits: a value between two e4m3 values may round the other way.
BOUND = {"bfloat16": 0.01, "fp8": 0.06, "int4": 0.01}
FORMATS = tuple(BOUND)

PAGES = {"bfloat16": jnp.bfloat16, "fp8": formats.FP8}

# Expert of each token, among four.
CHOICES = {
    "one token": [2],
    "all experts": [3, 0, 1, 2, 0],
    "all on one": [1] * 20,
    "two experts empty": [0, 3, 3, 0, 3, 3, 3, 0, 3, 3, 3],
}
# In fp8 so few tokens are resident in the first matmul.
RESIDENT = {
    "one token": [2],
    "five tokens": [3, 0, 1, 2, 0],
    "the most": [1, 1, 1, 3, 0, 3, 1, 1],
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a layer."""

    width: int
    hidden: int
    vocab: int = 2112
    kv_heads: int = 2
    queries: int = 5
    head_dim: int = 128
    page: int = 64


def make_weight(rng: np.random.Generator, form: str, *shape: int, inner: int = 1) -> Any:
    """Make a random weight in a format; the last `inner` axes are contracted."""
    # Draw on the device: the head has a billion weights, which numpy would draw on the host.
    key = jax.random.key(rng.integers(2**31), impl="rbg")
    wide = jax.random.normal(key, shape) * np.prod(shape[-inner:]) ** -0.5
    if form == "fp8":
        return formats.quantize_fp8(wide, inner)
    return formats.quantize_int4(wide, 128) if form == "int4" else wide.astype(jnp.bfloat16)


def make_tokens(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32)).astype(jnp.bfloat16)


def upcast(tree: Any) -> Any:
    """Cast bfloat16 arrays and e4m3 pages to float32, for definitions; keep quantized weights."""

    def upcast_leaf(x: Any) -> Any:
        if isinstance(x, formats.Quantized):
            return x
        is_16_or_8_bit = x.dtype in (jnp.bfloat16, formats.FP8)
        return x.astype(jnp.float32) if is_16_or_8_bit else x

    return jax.tree.map(upcast_leaf, tree, is_leaf=lambda x: isinstance(x, formats.Quantized))


def define(definition: Any, *arguments: Any) -> Any:
    """Compute a definition in float32, compiled as a whole: op by op compiles longer."""
    return jax.jit(definition)(*upcast(arguments))


def assert_close(found: Any, wanted: Any, bound: float) -> None:
    found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert error < bound, f"relative error {error:.4f}"


def make_norm(rng: np.random.Generator, width: int) -> reference.Norm:
    return reference.Norm(make_tokens(rng, width), 1e-5)


def make_unlike(rng: np.random.Generator, tokens: int, width: int) -> jax.Array:
    """Make large and small rows; after the first row, the last one is zero."""
    x_TD = make_tokens(rng, tokens, width)
    x_TD *= jnp.asarray(10.0 ** rng.integers(-3, 3, (tokens, 1)), x_TD.dtype)
    return x_TD.at[-1].set(0) if tokens > 1 else x_TD


def check_norm(kernels: Any, tokens: int, sizes: Sizes) -> None:
    """Norms of large, small and zero rows equal their definition, and are deterministic."""
    rng = np.random.default_rng(3)
    case = make_unlike(rng, tokens, sizes.width), make_norm(rng, sizes.width)
    run = jax.jit(kernels.normalize)
    first, second = (np.asarray(run(*case), np.float32) for _ in range(2))
    assert_close(first, define(reference.normalize, *case), BOUND["bfloat16"])
    np.testing.assert_array_equal(first, second)


def check_route(kernels: Any, tokens: int, sizes: Sizes) -> None:
    """Scores, the first of the best experts and its sigmoid equal their definition, and are
    deterministic."""
    rng = np.random.default_rng(tokens)
    x_TD, norm = make_unlike(rng, tokens, sizes.width), make_norm(rng, sizes.width)
    router_ED = make_tokens(rng, 16, sizes.width) * sizes.width**-0.5
    case = x_TD, norm, router_ED.at[11].set(router_ED[3]).at[7].multiply(2)
    run = jax.jit(kernels.route)
    first, second = (jax.tree.map(np.asarray, run(*case)) for _ in range(2))
    wanted = define(reference.route, *case)
    assert jax.tree.structure(first) == jax.tree.structure(wanted)
    score_TE, expert_T, gate_T = first
    assert_close(score_TE, wanted[0], BOUND["bfloat16"])
    np.testing.assert_array_equal(expert_T, score_TE.argmax(axis=1))
    highest_T = score_TE.astype(np.float32).max(axis=1)
    # XLA may compute the sigmoid before it rounds the score.
    np.testing.assert_allclose(gate_T, 1 / (1 + np.exp(-highest_T)), atol=0.23 * 2**-8)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def check_slots(
    assign: Any, tokens: int, *, experts: int, shared_blocks: int, interpret: Any = None
) -> None:
    """One launch assigns the slots of the definition."""
    expert_T = np.random.default_rng(tokens).integers(0, min(experts, 1 + tokens), tokens)
    case: Any = {"experts": experts, "slots": 8, "shared_blocks": shared_blocks}
    expert_T = jnp.asarray(expert_T, jnp.int32)
    found = assign(expert_T, **case, interpret=interpret)
    wanted = jax.jit(functools.partial(slot_assignment.assign_slots, **case))(expert_T)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)


def check_order(
    assign: Any, tokens: int, *, experts: int, shared_blocks: int, interpret: Any = None
) -> None:
    """One launch assigns the slots of `keep_token_order`."""
    expert_T = jnp.asarray(np.random.default_rng(tokens).integers(0, experts, tokens), jnp.int32)
    case: Any = {"experts": experts, "slots": 8, "shared_blocks": shared_blocks}
    found = assign(expert_T, **case, keeps_order=True, interpret=interpret)
    wanted = slot_assignment.keep_token_order(slot_assignment.assign_slots(expert_T, **case), 8)
    for name in ("slot_T", "expert_I", "count"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


def check_experts(kernels: Any, form: str, choice: list[int], sizes: Sizes) -> None:
    """Experts, routed and mixed with the shared one, equal their definitions, deterministically."""
    rng = np.random.default_rng(0)
    width, hidden = sizes.width, sizes.hidden
    x_TD, norm = make_unlike(rng, len(choice), width), make_norm(rng, width)
    expert_T = jnp.asarray(choice, jnp.int32)
    gate_T = jnp.asarray(rng.random(len(choice), np.float32))
    routed = (
        make_weight(rng, form, 4, 2, hidden, width),
        make_weight(rng, form, 4, width, hidden),
    )
    shared = make_weight(rng, form, 2, hidden, width), make_weight(rng, form, width, hidden)
    run = jax.jit(kernels.run_experts)
    single = (x_TD, norm, expert_T, *routed)
    assert_close(run(*single), define(reference.run_experts, *single), BOUND[form])
    mixed = (x_TD, norm, expert_T, gate_T, *routed, *shared)
    mix = jax.jit(kernels.mix_experts)  # once: each access makes another bound method
    first, second = (np.asarray(mix(*mixed)) for _ in range(2))
    assert_close(first, define(reference.mix_experts, *mixed), BOUND[form])
    np.testing.assert_array_equal(first, second)


def check_products(kernels: Any, form: str, tokens: int, sizes: Sizes) -> None:
    """Projections of attention equal their definitions."""
    s, rng = sizes, np.random.default_rng(1)
    x_TD = make_tokens(rng, tokens, s.width)
    qkv = make_weight(rng, form, s.kv_heads, s.queries + 2, s.head_dim, s.width)
    y_TKGH = make_tokens(rng, tokens, s.kv_heads, s.queries, s.head_dim)
    out = make_weight(rng, form, s.width, s.kv_heads, s.queries, s.head_dim, inner=3)
    for subscripts, x, weight in (
        ("TD,KJHD->TKJH", x_TD, qkv),
        ("TKGH,DKGH->TD", y_TKGH, out),
    ):
        found = jax.jit(kernels.multiply, static_argnums=0)(subscripts, x, weight)
        wanted = define(functools.partial(formats.multiply, subscripts), x, weight)
        assert_close(found, wanted, BOUND[form])


def check_head(kernels: Any, tokens: int, sizes: Sizes) -> None:
    """Logits of the whole vocabulary equal their definition, and are deterministic."""
    rng = np.random.default_rng(4)
    x_RD = make_tokens(rng, tokens, sizes.width)
    head_VD = make_weight(rng, "bfloat16", sizes.vocab, sizes.width)
    run = jax.jit(kernels.multiply, static_argnums=0)
    first, second = (np.asarray(run("RD,VD->RV", x_RD, head_VD), np.float32) for _ in range(2))
    wanted = define(functools.partial(formats.multiply, "RD,VD->RV"), x_RD, head_VD)
    assert_close(first, wanted, BOUND["bfloat16"])
    np.testing.assert_array_equal(first, second)


def make_pages(
    rng: np.random.Generator,
    lengths: list[int],
    news: list[int],
    padding: int,
    sizes: Sizes,
    dtype: Any,
) -> dict[str, Any]:
    """Make rows of `lengths` positions on shuffled pages, nan where no row has written.

    The last `news` positions of a row belong to this step and are not yet stored. Some of their
    keys and values are beyond the range of e4m3.
    """
    s, rows = sizes, len(lengths)
    width = 1 + max(-(-length // s.page) for length in lengths)
    table_RB = rng.permutation(rows * width + 3)[: rows * width].reshape(rows, width)
    shape = (rows * width + 3, s.kv_heads, s.page, s.head_dim)
    k_PKZH, v_PKZH = (np.full(shape, np.nan, np.float32) for _ in "kv")
    for row, (length, new) in enumerate(zip(lengths, news, strict=True)):
        for pages in (k_PKZH, v_PKZH):
            for block, page in enumerate(table_RB[row]):
                live = max(0, min(s.page, length - new - block * s.page))
                size = (s.kv_heads, live, s.head_dim)
                pages[page, :, :live] = rng.standard_normal(size, np.float32)
    runs = [np.arange(length - new, length) for length, new in zip(lengths, news, strict=True)]
    row_T = np.concatenate([np.full(new, row) for row, new in enumerate(news)])
    position_T = np.concatenate(runs)
    tokens = len(row_T) + padding
    k_TKH, v_TKH = (make_tokens(rng, tokens, s.kv_heads, s.head_dim) for _ in "kv")
    return {
        "q_TKGH": make_tokens(rng, tokens, s.kv_heads, s.queries, s.head_dim),
        "k_TKH": k_TKH.at[0, :, 0].set(1000),
        "v_TKH": v_TKH.at[0, :, 1].set(-1000),
        "k_PKZH": jnp.asarray(k_PKZH, dtype),
        "v_PKZH": jnp.asarray(v_PKZH, dtype),
        "table_RB": jnp.asarray(table_RB, jnp.int32),
        "row_T": jnp.asarray(np.pad(row_T, (0, padding)), jnp.int32),
        "position_T": jnp.asarray(np.pad(position_T, (0, padding), constant_values=-1), jnp.int32),
    }


def make_contexts(page: int) -> dict[str, tuple[list[int], list[int], int]]:
    """Return row lengths, new tokens of each row, and padding, around borders of pages."""
    return {
        "one token": ([1], [1], 0),
        "decode": ([5, 1, page, page + 1, 2 * page - 1], [1] * 5, 0),
        "decode with unused rows": ([5, 1, 33, 8], [1, 1, 0, 0], 2),
        "a single long row": ([9 * page + 3], [1], 0),
        "prompt": ([page + 6], [page + 6], 10),
        "prompt after a prefix": ([3 * page + 1], [30], 0),
        "mixed": ([150, 9, page + 1, 4], [1, 9, page, 1], 7),
    }


def check_attention(
    kernels: Any, form: str, rows: tuple[list[int], list[int], int], sizes: Sizes
) -> None:
    """Keys and values are stored as by definition, in a poisoned pool that changes nowhere else.

    Attention equals its definition, and padding gets zeros.
    """
    case = make_pages(np.random.default_rng(2), *rows, sizes, PAGES[form])
    # A projection adds zeros, and -0 + 0 is 0.
    q_TKGH, *kv = (case.pop(name) + 0 for name in ("q_TKGH", "k_TKH", "v_TKH"))
    before, where = (
        [case[name] for name in names.split()]
        for names in ("k_PKZH v_PKZH", "table_RB row_T position_T")
    )
    # An identity projection returns these heads.
    x_TKJH = jnp.concatenate([q_TKGH, *(x_TKH[:, :, None] for x_TKH in kv)], axis=2)
    (tokens, *shape), width = x_TKJH.shape, x_TKJH[0].size
    one_KJHD = jnp.eye(width, dtype=x_TKJH.dtype).reshape(*shape, width)
    run = jax.jit(kernels.attend)
    projected = x_TKJH.reshape(tokens, width), None, one_KJHD, reference.HeadTransform()
    (first, *pool), (second, *_) = (run(*projected, **case) for _ in range(2))
    stored = reference.store(*before, *kv, *where)
    for pages, wanted in zip(pool, stored, strict=True):
        assert pages.dtype == wanted.dtype
        one, other = (np.asarray(x).view(np.uint8) for x in (pages, wanted))
        np.testing.assert_array_equal(one, other)
    first, second = (np.asarray(y, np.float32) for y in (first, second))
    is_real_T = np.asarray(case["position_T"]) >= 0
    assert (first[~is_real_T] == 0).all()
    wanted = np.asarray(define(reference.attend_pages, q_TKGH, *stored, *where)[0])
    assert_close(first[is_real_T], wanted[is_real_T], BOUND["bfloat16"])
    np.testing.assert_array_equal(first, second)


def make_head_transforms(
    rng: np.random.Generator, tokens: int, head_dim: int
) -> dict[str, reference.HeadTransform]:
    """Make head transforms by name."""
    angle_TH = jnp.asarray(rng.uniform(0, 8192, (tokens, head_dim // 2)), jnp.float32)
    factor_T = jnp.linspace(0.5, 2.0, tokens)
    return {
        "rope": reference.HeadTransform(angle_TH),
        "rope and norm": reference.HeadTransform(angle_TH, eps=1e-5),
        "temperature": reference.HeadTransform(factor_T=factor_T),
        "all": reference.HeadTransform(
            angle_TH, 1e-5, factor_T, (jnp.float32(0.25), jnp.float32(1.5))
        ),
    }


TRANSFORMS = ("rope", "rope and norm", "temperature", "all")
TRANSFORM_CASES = [*(("fp8", name) for name in TRANSFORMS), ("bfloat16", "all"), ("int4", "all")]


def check_head_transform(
    kernels: Any, form: str, transform: str, tokens: int, sizes: Sizes, *, is_prompt: bool
) -> None:
    """Heads are projected, transformed and stored as by definition, deterministically."""
    s, rng = sizes, np.random.default_rng(5)
    x_TD, norm = make_unlike(rng, tokens, s.width), make_norm(rng, s.width)
    qkv = make_weight(rng, form, s.kv_heads, s.queries + 2, s.head_dim, s.width)
    # A prompt, or rows that each have one earlier token.
    rows, at_T = 1 if is_prompt else tokens, jnp.arange(tokens, dtype=jnp.int32)
    row_T, position_T = (0 * at_T, at_T) if is_prompt else (at_T, 0 * at_T + 1)
    table_RB = jnp.arange(rows * -(-tokens // s.page), dtype=jnp.int32).reshape(rows, -1)
    shape = (table_RB.size, s.kv_heads, s.page, s.head_dim)
    k_PKZH, v_PKZH = (make_tokens(rng, *shape).at[:, :, 1:].set(jnp.nan) for _ in "kv")
    pool = k_PKZH, v_PKZH
    transforms = make_head_transforms(rng, tokens, s.head_dim)
    case = (x_TD, norm, qkv, transforms[transform], *pool, table_RB, row_T, position_T)
    run = jax.jit(kernels.attend)
    first, second = (jax.tree.map(np.asarray, run(*case)) for _ in range(2))
    y_TKGH, *pages = define(reference.attend, *case)
    assert_close(first[0], y_TKGH, BOUND[form])
    for found, wanted in zip(first[1:], pages, strict=True):
        stored = np.isfinite(wanted)
        np.testing.assert_array_equal(np.isfinite(found.astype(np.float32)), stored)
        assert_close(found[stored], wanted[stored], BOUND[form])
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))
