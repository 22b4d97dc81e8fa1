"""The buffer of recent tokens against a plain tensor."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvquant.engine.buffer import TokenBuffer

OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["append", "drop_front", "drop_back", "push_front", "select"]), st.integers(0, 40)),
    max_size=30,
)


@given(operations=OPERATIONS, slack=st.integers(1, 16), most=st.integers(0, 60))
def test_a_buffer_is_a_list_of_tokens(operations, slack, most):
    """Whatever is appended and dropped, the tokens held are those of a plain tensor, and spare stays bounded."""
    plain = torch.empty(2, 1, 0, 3)
    buffer = TokenBuffer(plain, slack, most)
    for operation, count in operations:
        if operation == "append":
            states = torch.randn(plain.shape[0], 1, count, 3)
            buffer.append(states)
            plain = torch.cat([plain, states], dim=2)
        elif operation == "push_front":
            states = torch.randn(plain.shape[0], 1, count, 3)
            buffer.push_front(states)
            plain = torch.cat([states, plain], dim=2)
        elif operation == "select":
            buffer.select(torch.tensor([1, 0]))
            plain = plain[[1, 0]]
        else:
            count = min(count, len(buffer))
            getattr(buffer, operation)(count)
            plain = plain[:, :, count:] if operation == "drop_front" else plain[:, :, : plain.shape[2] - count]
        assert len(buffer) == plain.shape[2]
        assert torch.equal(buffer.view(), plain)


def test_appending_one_by_one_seldom_moves_what_is_held():
    """10,000 appends move the tokens about once an eighth, not every time."""
    buffer, moves, address = TokenBuffer(torch.empty(1, 1, 0, 4), 8, 20_000), 0, 0
    for _ in range(10_000):
        buffer.append(torch.ones(1, 1, 1, 4))
        moves += buffer.data.data_ptr() != address
        address = buffer.data.data_ptr()
    assert moves < 80
    assert buffer.data.shape[2] <= 10_000 * 9 / 8 + 8


def test_no_room_is_made_that_will_not_be_needed():
    """A window that never holds more than 20 tokens takes 20, however tokens pass through it."""
    buffer = TokenBuffer(torch.empty(1, 1, 0, 4), 8, 20)
    for _ in range(100):
        buffer.append(torch.ones(1, 1, 5, 4))
        if len(buffer) > 15:
            buffer.drop_front(5)
    assert buffer.data.shape[2] == 20
