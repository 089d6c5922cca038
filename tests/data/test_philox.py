"""The generator gives the published numbers, and a sample's numbers depend on that sample only."""

import numpy as np
import pytest

from fastbeit.data.philox import MAX_INDEX, Stream, philox4x32, random_words, uniforms

ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
# Random123's file of known answers: rounds, four counter words and two key words, four results.
KNOWN_ANSWERS = [
    (7, (0,) * 6, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (ONES,) * 6, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0,) * 6, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (ONES,) * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("rounds", "words", "expected"), KNOWN_ANSWERS)
def test_known_answers(rounds, words, expected):
    counter, key = words[:4], words[4:]
    assert tuple(int(word) for word in philox4x32(counter, key, rounds)) == expected


def test_vectorised_equals_one_at_a_time_and_broadcasts():
    index = np.array([0, 1, 7, 2**32 - 1, 2**32, MAX_INDEX - 1])
    draws = np.arange(3)
    together = random_words(5, 2, index[:, None], Stream.MASK, draws)
    assert together[0].shape == (6, 3)
    for row, sample in enumerate(index):
        for column, draw in enumerate(draws):
            alone = random_words(5, 2, sample, Stream.MASK, draw)
            assert [int(w) for w in alone] == [int(w[row, column]) for w in together]


def test_every_part_of_the_counter_and_key_counts():
    base = {"seed": 1, "epoch": 1, "index": 1, "stream": Stream.CROP, "draw": 1}
    others = [
        base,
        base | {"seed": 2},
        base | {"seed": 1 + 2**32},
        base | {"epoch": 2},
        base | {"index": 2},
        base | {"index": 1 + 2**32},
        base | {"stream": Stream.MASK},
        base | {"draw": 2},
    ]
    results = {tuple(int(word) for word in random_words(**other)) for other in others}
    assert len(results) == len(others)


def test_the_counter_layout_is_fixed():
    # Runs are resumed by later versions: the place of each part must never move.
    words = random_words(0xA_0000_0003, 7, 0x5_0000_0009, Stream.COLOUR, 4)
    counter = (9, 5 | int(Stream.COLOUR) << 16, 7, 4)
    assert [int(w) for w in words] == [int(w) for w in philox4x32(counter, (3, 0xA))]
    assert {stream.name: int(stream) for stream in Stream} == {
        "CROP": 1,
        "COLOUR": 2,
        "MASK": 3,
        "DROP_PATH": 4,
        "ORDER": 5,
    }


def test_uniforms_are_words_on_the_open_unit_interval():
    words = random_words(3, 0, np.arange(1000), Stream.CROP, 0)
    for word, number in zip(words, uniforms(3, 0, np.arange(1000), Stream.CROP, 0), strict=True):
        np.testing.assert_array_equal(number, (word.astype(float) + 0.5) / 2**32)
        assert number.min() > 0.0
        assert number.max() < 1.0


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"seed must lie in \[0, 2\*\*64\), got -1"):
        uniforms(-1, 0, 0, Stream.CROP, 0)
    with pytest.raises(ValueError, match="seed"):
        uniforms(2**64, 0, 0, Stream.CROP, 0)
    with pytest.raises(ValueError, match="epoch must lie in"):
        uniforms(0, 2**32, 0, Stream.CROP, 0)
    with pytest.raises(ValueError, match=r"index must lie in .* got values from -1 to 3"):
        uniforms(0, 0, np.array([3, -1]), Stream.CROP, 0)
    with pytest.raises(ValueError, match="index must lie in"):
        uniforms(0, 0, MAX_INDEX, Stream.CROP, 0)
    with pytest.raises(ValueError, match="index must be whole numbers, got dtype float64"):
        uniforms(0, 0, np.array([0.5]), Stream.CROP, 0)
