"""The realised shares stay within one piece of the configured ones, whatever the lengths."""

from hypothesis import given
from hypothesis import strategies as st

from data.mixture import Mixture

LARGEST = 100
weights_and_lengths = st.lists(
    st.tuples(
        st.floats(0.001, 1.0),
        st.lists(st.integers(1, LARGEST), min_size=1, max_size=20),
    ),
    min_size=1,
    max_size=8,
)


def draw(mixture: Mixture, lengths: list[list[int]], taken: list[int]) -> int:
    """One choice; source i's pieces repeat `lengths[i]` for ever."""
    upcoming = [ls[n % len(ls)] for ls, n in zip(lengths, taken, strict=True)]
    source = mixture.choose(upcoming)
    taken[source] += 1
    return source


@given(weights_and_lengths)
def test_no_source_is_ever_more_than_a_piece_from_its_share(sources):
    weights, lengths = [s[0] for s in sources], [s[1] for s in sources]
    mixture = Mixture(weights, LARGEST)
    taken = [0] * len(sources)
    for _ in range(300):
        draw(mixture, lengths, taken)
        total = sum(mixture.tokens)
        for weight, tokens in zip(weights, mixture.tokens, strict=True):
            assert abs(tokens - weight / sum(weights) * total) <= LARGEST


@given(weights_and_lengths, st.integers(0, 100))
def test_a_restored_mixture_goes_on_alike(sources, steps):
    weights, lengths = [s[0] for s in sources], [s[1] for s in sources]
    mixture, taken = Mixture(weights, LARGEST), [0] * len(sources)
    for _ in range(steps):
        draw(mixture, lengths, taken)
    restored = Mixture(weights, LARGEST)
    restored.load_state_dict(mixture.state_dict())
    again = list(taken)
    expected = [draw(mixture, lengths, taken) for _ in range(50)]
    assert [draw(restored, lengths, again) for _ in range(50)] == expected
