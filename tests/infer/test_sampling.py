import pytest
import torch
from longtake.infer.sampling import sample


def frequencies(logits: torch.Tensor, num_draws: int, **options: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = sample(logits.expand(num_draws, -1), generator=generator, **options)
    return tokens.bincount(minlength=len(logits)) / num_draws


def test_temperature_zero_takes_the_most_likely_token_of_each_row():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 1.9]])
    assert sample(logits).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_the_tempered_probabilities(temperature):
    logits = torch.tensor([1.0, -1.0, 0.5, 2.0, -torch.inf])
    drawn = frequencies(logits, 40_000, temperature=temperature)
    expected = (logits / temperature).softmax(0)
    # four standard deviations of a frequency among 40,000 draws: 4 * sqrt(0.25 / 40,000) = 0.01
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0.01)
    assert drawn[-1] == 0


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.05, [3]), (0.5, [3]), (0.6, [1, 3]), (0.85, [0, 1, 3]), (1.0, range(4))]
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    probabilities = torch.tensor([0.125, 0.25, 0.0625, 0.5625])
    drawn = frequencies(probabilities.log(), 40_000, temperature=1.0, top_p=top_p)
    expected = torch.zeros(4)
    expected[list(kept)] = probabilities[list(kept)]
    torch.testing.assert_close(drawn, expected / expected.sum(), rtol=0, atol=0.01)  # as above


def test_draws_are_those_of_multinomial():
    torch.manual_seed(1)
    logits = torch.randn(500, 40)
    drawn = sample(logits, temperature=1.0, generator=torch.Generator().manual_seed(2))
    probabilities, order = logits.double().softmax(-1).sort(descending=True)
    expected = order.gather(1, torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(drawn, expected[:, 0])


def test_a_seed_repeats_its_tokens():
    torch.manual_seed(0)
    logits = torch.randn(64, 100)
    first, again, other = (
        sample(logits, temperature=1.0, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "got -0.1"),
        ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ({"top_p": 0.0}, "got 0.0"),
        ({"top_p": 1.5}, "got 1.5"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(1, 4), **options)
