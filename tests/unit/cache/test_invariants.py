"""The invariants of the cache, under random sequences of operations, against a plain model of the same cache.

The plain model keeps every token in full precision, knows by arithmetic alone which tokens are quantised, and
remembers what a quantised token read as when it was quantised: it must read as exactly that ever after.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

import kvquant
from kvquant.cache.layer import QuantizedLayer
from kvquant.engine.config import CacheConfig
from kvquant.engine.grouping import rows_to_states, states_to_rows
from kvquant.engine.packing import WIDTHS, unpack, widths_of
from kvquant.engine.trellis import Taps, level_indices
from kvquant.plugin import BackendSpec, Capabilities, Opaque, Scheme
from kvquant.transforms.smoothing import Smoothing
from tests.support import FORMATS, MinMax, possible_options, whole_width

OPTIONS = st.fixed_dictionaries(
    {
        "backend": st.sampled_from([f"test-{kind}" for kind in FORMATS]),
        "nbits_key": st.sampled_from(WIDTHS),
        "nbits_value": st.sampled_from(WIDTHS),
        "axis_key": st.sampled_from(["channel", "token"]),
        "axis_value": st.sampled_from(["channel", "token"]),
        "group_size": st.sampled_from([4, 8]),
        "residual_length": st.integers(0, 20),
        "sink_length": st.integers(0, 6),
        "smoothing_key": st.booleans(),
        "smoothing_value": st.booleans(),
        "scale_bits": st.sampled_from([8, 16, 16]),
        "outlier_share": st.sampled_from([0, 0, 0.1, 0.4]),
    }
).map(lambda options: possible_options(options, 8, 16))

pytestmark = pytest.mark.usefixtures("formats")


def tensors_inside(thing: object, seen: set[int] | None = None) -> list[Tensor]:
    """Find every tensor reachable from `thing`, without asking it."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return []
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, dict):
        children = list(thing.values())
    elif isinstance(thing, (list, tuple, set)):
        children = list(thing)
    elif type(thing).__module__.startswith("kvquant"):
        children = list(vars(thing).values()) if hasattr(thing, "__dict__") else []
    else:
        children = []
    return [tensor for child in children for tensor in tensors_inside(child, seen)]


def storage_bytes(tensors: list[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class CacheMachine(RuleBasedStateMachine):
    """One layer beside a plain model of it."""

    @initialize(options=OPTIONS, batch=st.integers(1, 3), heads=st.integers(1, 2), seed=st.integers(0, 2**16))
    def make(self, options, batch, heads, seed):
        self.layer = QuantizedLayer(CacheConfig(**options), 0)
        self.options, self.heads = options, heads
        self.random = torch.Generator().manual_seed(seed)
        self.block = 32 if "channel" not in (options["axis_key"], options["axis_value"]) else options["group_size"]
        self.start_again(batch)

    def start_again(self, batch):
        self.given = [torch.empty(batch, self.heads, 0, width) for width in (8, 16)]  # what was put in
        self.stored = [torch.empty(batch, self.heads, 0, width) for width in (8, 16)]  # what the body reads as
        self.body = 0
        self.smoothing = [None, None]

    @property
    def length(self):
        return self.given[0].shape[2]

    @property
    def sink(self):
        return min(self.length, self.options["sink_length"])

    def states(self, tokens):
        batch = self.given[0].shape[0]
        return [torch.randn(batch, self.heads, tokens, width, generator=self.random) for width in (8, 16)]

    @rule(tokens=st.one_of(st.integers(1, 5), st.integers(0, 90)))
    def update(self, tokens):
        new = self.states(tokens)
        returned = self.layer.update(*new)
        self.given = [torch.cat([held, added], dim=2) for held, added in zip(self.given, new, strict=True)]
        window = self.length - self.sink - self.body
        left = max(0, (window - self.options["residual_length"]) // self.block) * self.block
        self.body += left
        for at, states in enumerate((self.layer.keys, self.layer.values)):
            fresh = states[:, :, self.sink + self.body - left : self.sink + self.body]
            self.check_quantised(at, fresh, self.given[at][:, :, self.sink + self.body - left : self.sink + self.body])
            self.stored[at] = torch.cat([self.stored[at], fresh], dim=2)
        assert [list(states.shape) for states in returned] == [list(states.shape) for states in self.given]

    def check_quantised(self, at, read, given_):
        """What was just quantised reads as the backend's own arithmetic, done here, makes of it."""
        if not given_.shape[2]:
            return
        stream = ("key", "value")[at]
        if self.options[f"smoothing_{stream}"] and self.smoothing[at] is None:
            self.smoothing[at] = Smoothing.fit(given_[:, :, : self.block])
        smoothing = self.smoothing[at]
        smooth = given_ if smoothing is None else smoothing.apply(given_)
        widths = widths_of(self.options[f"nbits_{stream}"])
        parts = smooth.chunk(len(widths), dim=3)
        expected = torch.cat([self.read_back(stream, *each) for each in zip(widths, parts, strict=True)], dim=3)
        exact = self.outliers(read, smooth - expected, given_)
        expected = expected if smoothing is None else smoothing.undo(expected)
        if self.options["scale_bits"] == 8 and self.options["backend"] != "test-opaque":
            # Levels move a little: what is read is about as near to what was given.
            due = (expected - given_).square().mean().sqrt()
            assert (read - given_).square().mean().sqrt() <= 1.35 * due + 0.02
            return
        # rounding of scales to float16, in a frame that is as much as three times smaller
        tolerance = 8e-3 if smoothing is None else 3e-2
        torch.testing.assert_close(read[~exact], expected[~exact], rtol=0, atol=tolerance)

    def read_back(self, stream, nbits, states):
        """What the backend makes of states that it quantises in one width."""
        axis, group = self.options[f"axis_{stream}"], self.options["group_size"]
        quantizer = FORMATS[self.options["backend"].removeprefix("test-")](Scheme(nbits, axis, group))
        answer = quantizer.quantize(states_to_rows(states, axis, group))
        if isinstance(answer, Opaque):
            rows = quantizer.dequantize(answer)
        elif answer.taps is not None:
            rows = answer.table[level_indices(answer.codes, Taps(*answer.taps), 1).long()] * answer.scale[:, None]
            rows = rows if answer.offset is None else rows + answer.offset[:, None]
        elif answer.table is not None:
            rows = answer.table[answer.codes.long()] * answer.scale[:, None]
        else:
            rows = answer.codes * answer.scale[:, None] + answer.offset[:, None]
        return rows_to_states(rows, tuple(states.shape), axis, group)

    def outliers(self, read, errors, given_):
        """Return which tokens read as they were given: of each block so many, those that quantisation harms most."""
        if not (share := self.options["outlier_share"]):
            return torch.zeros(read.shape[:3], dtype=torch.bool)
        exact = (read == given_).all(-1).unflatten(2, (-1, self.block))
        summed = errors.square().sum(-1).unflatten(2, (-1, self.block))
        kept = max(1, round(share * self.block))
        assert (exact.sum(-1) >= kept).all()
        assert (summed <= summed.topk(kept).values[..., -1:] * 1.001)[~exact].all()
        return exact.flatten(2)

    @precondition(lambda self: self.length)
    @rule(data=st.data())
    def crop(self, data):
        tokens = data.draw(st.integers(0, self.length), label="tokens to remove")
        self.layer.crop(-tokens)
        self.given = [held[:, :, : held.shape[2] - tokens] for held in self.given]
        self.body = max(0, min(self.body, self.length - self.options["sink_length"]))
        self.stored = [held[:, :, : self.body] for held in self.stored]
        if not self.body:
            self.smoothing = [None, None]  # what comes next finds its own

    @precondition(lambda self: self.length)
    @rule(data=st.data())
    def reorder(self, data):
        batch = self.given[0].shape[0]
        self.select(
            self.layer.reorder_cache, data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch))
        )

    @precondition(lambda self: self.length)
    @rule(data=st.data())
    def select_indices(self, data):
        batch = self.given[0].shape[0]
        self.select(
            self.layer.batch_select_indices, data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4))
        )

    def select(self, method, indices):
        method(torch.tensor(indices))
        self.given = [held[indices] for held in self.given]
        self.stored = [held[indices] for held in self.stored]
        self.smoothing = [one and one.select(torch.tensor(indices)) for one in self.smoothing]

    @precondition(lambda self: self.length and self.given[0].shape[0] < 4)
    @rule(repeats=st.integers(1, 3))
    def repeat(self, repeats):
        self.layer.batch_repeat_interleave(repeats)
        self.given = [held.repeat_interleave(repeats, dim=0) for held in self.given]
        self.stored = [held.repeat_interleave(repeats, dim=0) for held in self.stored]
        rows = torch.arange(self.given[0].shape[0] // repeats).repeat_interleave(repeats)
        self.smoothing = [one and one.select(rows) for one in self.smoothing]

    @rule(batch=st.integers(1, 3))
    def reset(self, batch):
        self.layer.reset()
        self.start_again(batch)

    @invariant()
    def the_length_is_right(self):
        if hasattr(self, "layer"):
            assert self.layer.get_seq_length() == self.length
            assert self.layer.get_mask_sizes(3) == (self.length + 3, 0)

    @invariant()
    def exact_tokens_are_exact_and_stored_tokens_read_as_they_did(self):
        """Invariants 3, 4 and 5."""
        if not hasattr(self, "layer") or not self.length:
            return
        for states, given_, stored in zip((self.layer.keys, self.layer.values), self.given, self.stored, strict=True):
            body = slice(self.sink, self.sink + self.body)
            assert torch.equal(states[:, :, : body.start], given_[:, :, : body.start])
            assert torch.equal(states[:, :, body], stored)
            assert torch.equal(states[:, :, body.stop :], given_[:, :, body.stop :])

    @invariant()
    def the_bytes_are_those_of_the_tensors_held(self):
        """Invariant 8, counted without asking the cache what it holds."""
        if hasattr(self, "layer"):
            held = storage_bytes(tensors_inside(self.layer._stores))
            assert self.layer.memory().nbytes == held
            assert all(size >= 0 for size in self.layer.memory().parts.values())


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestCache = pytest.mark.usefixtures("formats")(CacheMachine.TestCase)


def body_contents(layer: QuantizedLayer) -> list[Tensor]:
    """Everything that the bodies of a layer say, page boundaries aside."""
    contents = []
    for store in layer.stores:
        scheme, pages = store.body.encoder.scheme, store.body.pages
        per = scheme.group_size if scheme.axis == "channel" else 1
        contents.append(torch.cat([unpack(p.codes[:, :, : p.length], p.nbits, store.head_dim) for p in pages], dim=2))
        for name in ("scale", "offset"):
            grids = [getattr(page, name) for page in pages]
            if grids[0] is not None:
                dtypes = torch.tensor(
                    [[grid.element_size()] for grid, page in zip(grids, pages, strict=True) for _ in range(page.length)]
                )
                kept = [grid[:, :, : page.length // per].float() for grid, page in zip(grids, pages, strict=True)]
                contents += [torch.cat(kept, dim=2), dtypes]
        if store.body.encoder.kept:
            outliers = [page.outliers.until(page.length) for page in pages]
            contents += [torch.cat([getattr(one, name) for one in outliers], 2) for name in ("positions", "states")]
    return contents


#: A block that comes once bytes are given up, and would have done with them, but not with 16 bits.
BEHIND_BYTES = {
    "backend": "test-affine",
    "nbits_key": 1,
    "nbits_value": 8,
    "axis_key": "channel",
    "axis_value": "channel",
    "group_size": 4,
    "residual_length": 0,
    "sink_length": 2,
    "smoothing_key": False,
    "smoothing_value": True,
    "scale_bits": 8,
    "outlier_share": 0,
}


@example(options=BEHIND_BYTES, splits=[1, 18, 37], loud=False, seed=0)
@given(
    options=OPTIONS.filter(lambda options: options["backend"] != "test-opaque"),
    splits=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    loud=st.booleans(),
    seed=st.integers(0, 999),
)
def test_append_only_any_split_gives_bit_identical_stores(options, splits, loud, seed):
    """Invariant 1: codes, scales and their precision are those of one append; `loud` blocks need float32 scales."""
    random = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, 2, sum(splits), width, generator=random) for width in (8, 16))
    if loud:
        keys[:, :, sum(splits) // 3 : sum(splits) // 2] *= 1e6
    whole, split = (QuantizedLayer(CacheConfig(**options), 0) for _ in range(2))
    whole.update(keys, values)
    for part_keys, part_values in zip(keys.split(splits, dim=2), values.split(splits, dim=2), strict=True):
        split.update(part_keys, part_values)
    assert torch.equal(whole.keys, split.keys)
    assert torch.equal(whole.values, split.values)
    assert len(whole.stores[0].body) == len(split.stores[0].body)
    if len(whole.stores[0].body):
        for one, other in zip(body_contents(whole), body_contents(split), strict=True):
            assert torch.equal(one, other)


@given(
    axis=st.sampled_from(["channel", "token"]),
    splits=st.lists(st.integers(1, 80), min_size=1, max_size=15),
    residual=st.integers(0, 40),
    sink=st.integers(0, 5),
)
def test_every_body_token_is_quantised_exactly_once(axis, splits, residual, sink):
    """Invariant 2: states carry their token's number, and the backend sees the number of every body token once."""
    seen: list[float] = []

    class Watching(MinMax):
        def quantize(self, rows):
            seen.extend(rows.flatten().tolist())
            return super().quantize(rows)

    kvquant.register(BackendSpec("test-watching", Watching, Capabilities(nbits=(4,))), replace=True)
    options = {"axis_key": axis, "axis_value": axis, "group_size": 4, "residual_length": residual, "sink_length": sink}
    layer = QuantizedLayer(CacheConfig(backend="test-watching", smoothing_key=False, **options), 0)
    numbers = torch.arange(float(sum(splits)))[None, None, :, None].expand(1, 1, -1, 4)
    for part in numbers.split(splits, dim=2):
        layer.update(part, part)
    body = len(layer.stores[0].body)
    tokens = [float(token) for token in range(sink, sink + body)]
    assert sorted(seen) == sorted(tokens * 4 * 2)  # 4 channels, keys and values


@given(options=OPTIONS, before=st.integers(1, 120), data=st.data())
def test_a_crop_that_stays_in_the_window_leaves_what_never_saw_the_tokens(options, before, data):
    """Invariant 4: the store equals one that never saw them, as long as no block has left the window for their sake."""
    keys, values = torch.randn(1, 1, before, 8), torch.randn(1, 1, before, 16)
    seen, unseen = (QuantizedLayer(CacheConfig(**options), 0) for _ in range(2))
    seen.update(keys, values)
    surplus = len(seen.stores[0].recent) - options["residual_length"]
    removed = data.draw(st.integers(0, max(0, min(surplus, before - 1))), label="removed")
    seen.crop(-removed)
    unseen.update(keys[:, :, : before - removed], values[:, :, : before - removed])
    more = torch.randn(1, 1, 70, 8), torch.randn(1, 1, 70, 16)
    for layer in (seen, unseen):
        layer.update(*more)
    assert torch.equal(seen.keys, unseen.keys)
    assert torch.equal(seen.values, unseen.values)
    assert len(seen.stores[0].body) == len(unseen.stores[0].body)


@pytest.mark.parametrize("kind", FORMATS)
def test_spare_capacity_stays_within_an_eighth_or_a_page(kind):
    """After every one of 3,000 appended tokens, what is allocated exceeds what is stored by an eighth or a page."""
    config = CacheConfig(backend=f"test-{kind}", nbits=whole_width(4, kind), group_size=8, residual_length=16)
    layer = QuantizedLayer(config, 0)
    for _ in range(300):
        layer.update(torch.randn(1, 1, 10, 8), torch.randn(1, 1, 10, 8))
        for store in layer.stores:
            stored = len(store.body)
            spare = sum(page.capacity - page.length for page in store.body.pages)
            assert spare <= max(store.policy.page_tokens, stored / 8)
            assert store.recent.data.shape[2] <= store.policy.most_recent


def test_pages_never_move_while_tokens_are_appended():
    """A page's tensors keep their address for life: nothing that grows is ever copied."""
    layer = QuantizedLayer(CacheConfig(backend="test-affine", group_size=8, residual_length=16), 0)
    addresses: dict[int, int] = {}
    for _ in range(200):
        layer.update(torch.randn(1, 1, 16, 8), torch.randn(1, 1, 16, 8))
        for page in layer.stores[0].body.pages:
            assert addresses.setdefault(id(page), page.codes.data_ptr()) == page.codes.data_ptr()
    assert len(addresses) > 5
