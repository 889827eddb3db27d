"""The letters of array names, and the logical names of axes that sharding strategies place.

Letters are the same in suffixes and einsums (`q_TKGH` has tokens, kv heads, query heads per kv head
and head dim):

    T tokens of this step      D width                   V vocabulary
    R rows of this step        K kv heads                E experts
    S positions in the cache   G query heads per kv      F feed-forward
    P pages                    J those + key and value   H head dim
    Z slots of a page          B pages in a row's table  L a short list
    I image tiles              N patches, vision heads   M image features
    C channels, Y X pixels     W vision width            A adapter width
    U columns of a matrix: a patch's pixels, a block's channels
    Q rank of an adapter

A row is consecutive tokens of one request inside one attention chunk: see `l4jax.cache`.

The model names axes, as in `("kv_heads", "width")`; `l4jax.strategies` places them on mesh axes. A
name without a rule is an error, so a misspelt axis cannot be replicated silently.
"""

# Weights of the text model.
VOCAB = "vocab"
WIDTH = "width"
KV_HEADS = "kv_heads"
QUERIES = "queries"  # query heads of one kv head
QUERIES_KV = "queries_kv"  # query heads, key and value of one kv head: the fused projection
HEAD_DIM = "head_dim"
EXPERTS = "experts"
SCORES = "scores"  # experts, as rows of the router
HIDDEN = "hidden"  # inside a dense feed-forward block, or the shared expert
EXPERT_HIDDEN = "expert_hidden"  # inside a routed expert
GATE_UP = "gate_up"  # 2: gate, up

# Weights of the vision tower and its adapter.
VISION_WIDTH = "vision_width"
VISION_HEADS = "vision_heads"
VISION_HEAD_DIM = "vision_head_dim"
VISION_HIDDEN = "vision_hidden"
QKV = "qkv"  # 3: query, key, value
PATCH = "patch"  # channels * patch * patch
PATCHES = "patches"  # of a tile, with the class embedding
ADAPTER_INPUT = "adapter_input"
ADAPTER_HIDDEN = "adapter_hidden"
ADAPTER_WIDTH = "adapter_width"

# Weights of a LoRA adapter: its rank, and the parts of an axis that have factors of their own, such
# as query, key and value; 1 without parts.
RANK = "rank"
PARTS = "parts"

# Inputs and state of a step.
TOKENS = "tokens"
ROWS = "rows"
SLOTS = "slots"  # of the decode state
PAGES = "pages"
STRIPES = "stripes"  # parts of a page of the global layers; no array has this axis
PAGE = "page"  # slots of a page
TABLE = "table"  # entries of a page table
GROUPS = "groups"  # the chunk-local groups of layers
TILES = "tiles"
FEATURES = "features"  # image features of a tile
CHANNELS = "channels"  # of an image tile, as are its rows and columns below
PIXELS_Y = "pixels_y"
PIXELS_X = "pixels_x"
LAYERS = "layers"
SINGLE = "single"  # an axis of size 1, such as the experts of a dense block
LIST = "list"  # stop ids of a row, log-probabilities of a token

ALL = tuple(name for key, name in sorted(globals().items()) if key.isupper())
